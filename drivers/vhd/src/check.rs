//! The structural check of an image: both footers, the header and every entry of the BAT.

use imgtool_core::unit_check::{opened, report_parent};
use imgtool_core::{CheckReport, Input, Memory, OpenOptions, RandomInput, Result};

use crate::image::{Blocks, Image};
use crate::layout::footer::{DiskType, FOOTER_LEN, Footer};
use crate::layout::{ABSENT, ENTRY_LEN, SECTOR_SIZE, bitmap_len};
use crate::{parent, stream};

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a VHD image or requires an unsupported feature. Damage is not an error:
/// the report lists it.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    let memory = &options.memory;
    let mut report = CheckReport::default();
    if input.is_stream() {
        opened(stream::read_through(input), &mut report)?;
        return Ok(report);
    }
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    match &image.blocks {
        Some(blocks) => {
            check_footers(&image, &mut report)?;
            check_blocks(&image, blocks, memory, &mut report)?;
            if image.footer.disk_type == DiskType::Differencing {
                let parent = parent::open(&image, blocks, options).map(|(parent, _)| parent);
                report_parent(parent, image.footer.current_size, &mut report)?;
            }
        }
        None => check_length(&image, &mut report),
    }
    Ok(report)
}

/// Reports a damaged footer and copies that differ. One valid footer is enough to read the image.
fn check_footers(image: &Image, report: &mut CheckReport) -> Result<()> {
    if image.used_copy {
        report.corruption("the footer at the end is missing or damaged");
        return Ok(());
    }
    match read_copy(&image.input)? {
        None => report.corruption("the copy of the footer at the start is damaged"),
        Some(copy) if copy != image.footer => report.corruption("the footer and its copy differ"),
        Some(_) => {}
    }
    Ok(())
}

fn read_copy(input: &RandomInput) -> Result<Option<Footer>> {
    Ok(Footer::decode(&input.read_vec(0, FOOTER_LEN)?).ok())
}

/// Reports bytes between the disk and the footer of a fixed image.
fn check_length(image: &Image, report: &mut CheckReport) {
    let expected = image.footer.current_size + FOOTER_LEN as u64;
    let found = image.input.len();
    if found > expected {
        report.leak(1, format!("{} bytes lie between the disk and the footer", found - expected));
    }
    report.image_end_offset = Some(found);
}

/// Checks every entry of the BAT, and fills in the counts of the report.
fn check_blocks(image: &Image, blocks: &Blocks, memory: &Memory, report: &mut CheckReport) -> Result<()> {
    let block_len = bitmap_len(blocks.header.block_size) + blocks.header.block_size;
    // The header bounds the BAT: 16 MiB.
    let _lease = memory.lease(blocks.header.entries * ENTRY_LEN, "the blocks of a VHD image")?;
    let mut sectors: Vec<u32> = Vec::with_capacity(blocks.header.entries as usize);
    let mut fragmented = 0;
    let mut expected = None;
    let mut index = 0;
    while index < blocks.header.entries {
        let (bytes, equal) = blocks.bat.run::<4>(index, blocks.header.entries - index)?;
        let entry = u32::from_be_bytes(bytes);
        if entry != ABSENT {
            if let Err(error) = image.stored_block(blocks, index, entry) {
                report.corruption(format!("BAT entry {index}: {error:#}"));
            }
            fragmented += u64::from(expected.is_some_and(|expected| expected != u64::from(entry)));
            expected = Some(u64::from(entry) + block_len / SECTOR_SIZE);
            sectors.extend(std::iter::repeat_n(entry, equal as usize));
        }
        index += equal;
    }
    sectors.sort_unstable();
    for pair in sectors.windows(2) {
        if u64::from(pair[1] - pair[0]) * SECTOR_SIZE < block_len {
            report.corruption(format!(
                "the blocks at {} and {} overlap",
                u64::from(pair[0]) * SECTOR_SIZE,
                u64::from(pair[1]) * SECTOR_SIZE
            ));
        }
    }
    let end =
        sectors.last().map_or(blocks.header.bat_end(), |last| u64::from(*last) * SECTOR_SIZE + block_len);
    report.image_end_offset = Some((end + FOOTER_LEN as u64).min(image.input.len()));
    report.total_clusters = Some(blocks.header.entries);
    report.allocated_clusters = Some(sectors.len() as u64);
    report.fragmented_clusters = Some(fragmented);
    Ok(())
}
