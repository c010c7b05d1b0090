//! The check of an image: its header, every entry of its table, and the checksum of every block.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Error, ErrorKind, Input, Memory, Result};

use crate::image::Image;
use crate::layout::HEADER_LEN;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a cloop image or has an unsupported version. Damage is not an error: the
/// report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let header = &image.header;
    let table_end = HEADER_LEN + header.table_len();
    let mut check = UnitCheck::new(header.block_size, table_end, image.input.len(), memory)?;
    let _lease = memory.lease(header.block_size + header.max_stored(), "the blocks of a cloop image")?;
    // At most 64 MiB, so it fits.
    let mut block = vec![0; header.block_size as usize];
    let mut end = table_end;
    let mut index = 0;
    while index < header.blocks {
        let empty = empty_blocks(&image, index, &mut report)?;
        if empty > 0 {
            index += empty;
            continue;
        }
        let found = image.stored(index).and_then(|stored| {
            if stored.start < end {
                // It is not decoded again: a small file could have millions of such blocks.
                return Err(Error::malformed(format!("block {index} overlaps the blocks before {end}"))
                    .at(stored.start));
            }
            end = stored.end;
            check.compressed(format!("block {index}"), stored.start, stored.end - stored.start, &mut report);
            image.decode(index, &mut block)
        });
        match found {
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
                report.corruption(format!("{error:#}"));
            }
            found => found?,
        }
        index += 1;
    }
    check.finish(header.blocks, &mut report);
    Ok(report)
}

/// Returns the number of blocks from `index` on that end where they begin, and reports them as one finding: the
/// table of a sparse file may have billions.
fn empty_blocks(image: &Image, index: u64, report: &mut CheckReport) -> Result<u64> {
    let (offset, equal) = image.table.run::<8>(index, image.header.blocks + 1 - index)?;
    let empty = equal - 1;
    if empty > 0 {
        report.corruption(format!(
            "blocks {index} to {} are stored in no bytes, at {}",
            index + empty - 1,
            u64::from_be_bytes(offset)
        ));
    }
    Ok(empty)
}
