//! Measuring: the size of an image before it is made.

use imgtool_toolkit::source::data_bytes;
use imgtool_toolkit::{CreateOptions, Error, ImageSource, Measure, Result};

use crate::options::VhdxOptions;

/// Measures the file that `source` would make. The length is exact if every data extent of the source holds
/// data in each block that it touches.
pub(crate) fn measure(source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
    let options = VhdxOptions::parse(options)?;
    let [device] = source.info().devices.as_slice() else {
        return Err(Error::unsupported(format!(
            "vhdx holds one device, not {}",
            source.info().devices.len()
        )));
    };
    let layout = options.layout(device.size).map_err(|e| e.device(&*device.name))?;
    let fully_allocated = layout.file_len(layout.shape.payload_blocks);
    if options.zero_unit.is_none() {
        return Ok(Measure { required: fully_allocated, fully_allocated, occupied: device.size });
    }
    // Unwritten parts of blocks are holes, in a fixed file too.
    let occupied = data_bytes(source, device)?;
    if options.fixed {
        return Ok(Measure { required: fully_allocated, fully_allocated, occupied });
    }
    let Some(random) = source.random() else {
        return Err(Error::unsupported("a stream can't be measured").hint("save it to a file first"));
    };
    let block_size = layout.shape.block_size;
    let mut blocks = 0;
    // Blocks below this index are counted.
    let mut next_block = 0;
    let mut guest_offset = 0;
    while guest_offset < device.size {
        for extent in random.extents(device.id, guest_offset..device.size)? {
            guest_offset = extent.end();
            if extent.is_data() {
                let first = (extent.start / block_size).max(next_block);
                let end = guest_offset.div_ceil(block_size);
                blocks += end.saturating_sub(first);
                next_block = next_block.max(end);
            }
        }
    }
    Ok(Measure { required: layout.file_len(blocks), fully_allocated, occupied })
}
