//! Size of an archive before it is written.

use imgtool_core::source::for_each_extent;
use imgtool_core::{DeviceKind, Error, ImageSource, Manifest, Measure, Result};

use crate::layout::{CLUSTERS_PER_EXTENT, EXTENT_HEADER, SUB_BLOCK, clusters_of};
use crate::options::VmaOptions;
use crate::plan::ArchivePlan;

/// Returns the size of the archive: its header, the extent headers, and every sub-block in which the source
/// has data. If some of that data is zero, the archive becomes smaller. Guest state counts in full, as does
/// every device if zeros are stored.
pub(crate) fn measure(source: &dyn ImageSource, options: &VmaOptions) -> Result<Measure> {
    let info = source.info();
    let Some(random) = source.access().random() else {
        return Err(Error::unsupported("a stream can't be measured").hint("save it to a file first"));
    };
    let manifest = Manifest {
        devices: info.devices.clone(),
        attachments: info.attachments.clone(),
        machine: info.machine.clone(),
        ..Manifest::default()
    };
    let plan = ArchivePlan::new(&manifest, options)?;
    let mut required = plan.header.len() as u64;
    let mut fully_allocated = required;
    for device in &info.devices {
        let headers = clusters_of(device.size).div_ceil(CLUSTERS_PER_EXTENT as u64) * EXTENT_HEADER as u64;
        let all = device.size.next_multiple_of(SUB_BLOCK);
        fully_allocated += headers + all;
        if device.kind == DeviceKind::VmState || options.zero_unit.is_none() {
            required += headers + all;
            continue;
        }
        let (mut stored, mut counted_to) = (0, 0);
        for_each_extent(random, device.id, 0..device.size, |extent| {
            if extent.is_data() {
                // Count a sub-block once if two extents share it.
                let start = (extent.start / SUB_BLOCK * SUB_BLOCK).max(counted_to);
                counted_to = extent.end().next_multiple_of(SUB_BLOCK);
                stored += counted_to.saturating_sub(start);
            }
            Ok(())
        })?;
        required += headers + stored;
    }
    Ok(Measure { required, fully_allocated, occupied: required, ..Measure::default() })
}
