//! Measuring and creating VHDX images.

use imgtool_core::source::{data_bytes, for_each_extent};
use imgtool_core::{
    CreateOptions, Error, ImageSink, ImageSource, ImageWriter, Manifest, Measure, OutputFactory, Result,
    TableMemory,
};

use crate::options::VhdxOptions;
use crate::sink::{BatWriter, VhdxSink};

/// Writer of images with these options.
#[derive(Debug)]
pub(crate) struct VhdxWriter(VhdxOptions);

impl VhdxWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        Ok(Self(VhdxOptions::parse(options)?))
    }
}

impl ImageWriter for VhdxWriter {
    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT).ok().filter(|_| !options.fixed);
        let layout = device.and_then(|device| options.layout(device.size).ok());
        layout.map_or(TableMemory::default(), |layout| BatWriter::memory(layout.bat))
    }

    /// Measures a new file. For a dynamic file, `required` includes every block that a data extent of the
    /// source touches, even if the block contains only zeros.
    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let Self(options) = self;
        let [device] = source.info().devices.as_slice() else {
            return Err(Error::unsupported(format!(
                "a VHDX image stores one device, not {}",
                source.info().devices.len()
            )));
        };
        let layout = options.layout(device.size).map_err(|e| e.device(&*device.name))?;
        let fully_allocated = layout.file_len(layout.shape.payload_blocks);
        if options.zero_unit.is_none() {
            return Ok(Measure { required: fully_allocated, fully_allocated, occupied: device.size });
        }
        // Unwritten parts of blocks are holes, even in a fixed file.
        let occupied = data_bytes(source, device)?;
        if options.fixed {
            return Ok(Measure { required: fully_allocated, fully_allocated, occupied });
        }
        let Some(random) = source.access().random() else {
            return Err(Error::unsupported("a stream can't be measured").hint("save it to a file first"));
        };
        let block_size = layout.shape.block_size;
        let mut blocks = 0;
        // Index of the first block that is not counted yet.
        let mut next_block = 0;
        for_each_extent(random, device.id, 0..device.size, |extent| {
            if extent.is_data() {
                let first = (extent.start / block_size).max(next_block);
                let end = extent.end().div_ceil(block_size);
                blocks += end.saturating_sub(first);
                next_block = next_block.max(end);
            }
            Ok(())
        })?;
        Ok(Measure { required: layout.file_len(blocks), fully_allocated, occupied })
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT)?;
        if device.open_ended {
            return Err(Error::unsupported("VHDX needs the size of a disk before its data")
                .hint("save the stream to a file first"));
        }
        let layout = options.layout(device.size).map_err(|e| e.device(&*device.name))?;
        let output = outputs.main()?;
        if output.is_stream() {
            return Err(Error::unsupported("a VHDX image can't be written to a stream")
                .path(output.location())
                .hint("write to a file"));
        }
        let min_len = layout.file_len(if options.fixed { layout.shape.payload_blocks } else { 0 });
        if let Some(capacity) = output.capacity()
            && capacity < min_len
        {
            return Err(Error::refused(format!(
                "not enough space: the target has {capacity} bytes, the image needs {min_len}"
            ))
            .path(output.location())
            .device(&*device.name));
        }
        Ok(Box::new(VhdxSink::new(output, device.size, options.clone(), layout, manifest.tables)))
    }
}
