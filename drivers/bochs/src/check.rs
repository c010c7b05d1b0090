//! The structural check of an image: its header and every entry of its catalog.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Input, Memory, Result};

use crate::image::Image;

/// Maximum number of entries past those of the disk that the check looks at. Our limit: the table of a sparse
/// file may have billions.
const MAX_SPARE_ENTRIES: u64 = 1 << 20;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a growing Bochs image or has an unsupported version. Damage is not an
/// error: the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let header = &image.header;
    let mut check = UnitCheck::new(header.stored_len(), header.catalog_end(), image.input.len(), memory)?;
    let mut index = 0;
    let entries = header.entries.min(header.extents().saturating_add(MAX_SPARE_ENTRIES));
    while index < entries {
        let (entry, equal) = image.catalog.run::<4>(index, entries - index)?;
        if let Some(extent) = header.extent_offset(entry) {
            for index in index..index + equal {
                let name = format!("catalog entry {index}");
                if index < header.extents() {
                    check.stored(name, extent, header.bitmap_len + header.used_len(index), &mut report)?;
                } else {
                    report.leak(1, format!("{name} stores an extent past the end of the disk"));
                }
            }
        }
        index += equal;
    }
    check.finish(header.extents(), &mut report);
    Ok(report)
}
