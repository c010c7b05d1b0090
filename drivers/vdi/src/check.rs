//! The structural check of an image: its header, every entry of its block map, and the identifiers of its parent.

use imgtool_core::unit_check::{UnitCheck, opened, report_parent};
use imgtool_core::{CheckReport, Input, OpenOptions, Result};

use crate::image::Image;
use crate::layout::{Entry, Header, ImageType};
use crate::parent;

/// Maximum number of entries past those of the disk that the check looks at. Our limit: the map of a sparse file
/// may have a billion.
const MAX_SPARE_ENTRIES: u64 = 1 << 20;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a VDI image or requires an unsupported feature. Damage is not an error:
/// the report lists it.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    let memory = &options.memory;
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let (header, file_len) = (&image.header, image.input.len());
    let unit = header.block_extra + header.block_size;
    let mut check = UnitCheck::new(unit, header.map_end(), file_len, memory)?;
    let entries = header.blocks.min(header.disk_blocks().saturating_add(MAX_SPARE_ENTRIES));
    let mut index = 0;
    while index < entries {
        let (bytes, equal) = image.map.run::<4>(index, entries - index)?;
        if let Entry::Stored(position) = Entry::decode(bytes) {
            let file_offset = header.block_data(position);
            // The rest of the last block counts as far as the file has it.
            let rest = header.block_size.min(file_len.saturating_sub(file_offset));
            let used = image.used_len(index).max(rest);
            check.stored(format!("map entry {index}"), file_offset, used, &mut report)?;
            if equal > 1 {
                let (next, last) = (index + 1, index + equal - 1);
                report.corruption(format!(
                    "map entries {next} to {last} refer to the block at {file_offset}, which entry {index} uses"
                ));
            }
        }
        index += equal;
    }
    if entries == header.blocks {
        check_count(header, check.units(), &mut report);
    }
    check.finish(header.disk_blocks(), &mut report);
    if header.image_type == ImageType::Differencing {
        let found = parent::find(&image, options);
        let parent = found.and_then(|(name, _)| parent::open(&name, &image, options));
        report_parent(parent, header.virtual_size, &mut report)?;
    }
    Ok(report)
}

/// Compares the number of blocks with the header's: a block that no entry refers to wastes space.
fn check_count(header: &Header, found: u64, report: &mut CheckReport) {
    let stated = header.allocated;
    if stated > found {
        report.leak(stated - found, format!("the header counts {stated} blocks, the map has {found}"));
    } else if stated < found {
        report.corruption(format!("the header counts {stated} blocks, but the map has {found}"));
    }
}
