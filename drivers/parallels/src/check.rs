//! The structural check of an image: its header and every entry of its table.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Input, Memory, Result};

use crate::image::Image;

/// Maximum number of entries past those of the disk that the check looks at. Our limit: the table of a sparse
/// file may have billions.
const MAX_SPARE_ENTRIES: u64 = 1 << 20;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a Parallels image or has an unsupported version. Damage is not an error:
/// the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let header = &image.header;
    let mut check = UnitCheck::new(header.cluster_size, header.table_end(), image.input.len(), memory)?;
    let mut index = 0;
    let entries = header.entries.min(header.clusters().saturating_add(MAX_SPARE_ENTRIES));
    while index < entries {
        let (bytes, equal) = image.table.run::<4>(index, entries - index)?;
        if let Some(file_offset) = header.cluster_offset(bytes) {
            // Equal neighbours share a cluster, which is reported for each of them.
            for index in index..index + equal {
                check_entry(&image, index, file_offset, &mut check, &mut report)?;
            }
        }
        index += equal;
    }
    check.finish(header.clusters(), &mut report);
    Ok(report)
}

fn check_entry(
    image: &Image,
    index: u64,
    file_offset: u64,
    check: &mut UnitCheck,
    report: &mut CheckReport,
) -> Result<()> {
    let (header, name) = (&image.header, format!("table entry {index}"));
    if file_offset < header.table_end() {
        report.corruption(format!("{name} refers to bytes at {file_offset}, within the table"));
    } else if index >= header.clusters() {
        report.leak(1, format!("{name} stores a cluster past the end of the disk"));
    } else {
        check.stored(name, file_offset, header.used_len(index), report)?;
    }
    Ok(())
}
