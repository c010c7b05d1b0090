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
    for index in 0..header.blocks {
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
    }
    check.finish(header.blocks, &mut report);
    Ok(report)
}
