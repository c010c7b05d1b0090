//! The structural check of an image: its header and every entry of its tables.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Input, Memory, Result};

use crate::image::{Image, is_cluster};
use crate::layout::{ENTRY_LEN, Entry};

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a QCOW image of version 1 or has an unknown encryption. Damage is not an
/// error: the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let header = &image.header;
    let tables = header.l1_entries();
    let l1_end = header.l1_offset + tables * ENTRY_LEN;
    let mut check = UnitCheck::new(header.cluster_size(), l1_end, image.input.len(), memory)?;
    let mut index = 0;
    while index < tables {
        let (bytes, equal) = image.entry(header.l1_offset, index, tables - index)?;
        let table = u64::from_be_bytes(bytes);
        if table != 0 {
            for index in index..index + equal {
                check_table(&image, index, table, &mut check, &mut report)?;
            }
        }
        index += equal;
    }
    check.finish(header.clusters(), &mut report);
    Ok(report)
}

/// Checks a table of the second level, which the entry `l1_index` of the first refers to.
fn check_table(
    image: &Image,
    l1_index: u64,
    table: u64,
    check: &mut UnitCheck,
    report: &mut CheckReport,
) -> Result<()> {
    let header = &image.header;
    if let Err(error) = image.check_l2(table, l1_index) {
        report.corruption(format!("{error:#}"));
        return Ok(());
    }
    // A table that another entry uses was walked already.
    if !check.table(format!("entry {l1_index} of the first table"), table, header.l2_len(), report)? {
        return Ok(());
    }
    let first = l1_index * header.l2_entries();
    let entries = header.l2_entries().min(header.clusters().saturating_sub(first));
    for index in 0..entries {
        let (bytes, _) = image.entry(table, index, 1)?;
        let name = format!("entry {index} of the table at {table}");
        match header.entry(bytes) {
            Entry::Absent => {}
            Entry::Compressed { file_offset, len } => check.compressed(name, file_offset, len, report),
            Entry::Stored(cluster) if is_cluster(cluster) => {
                check.stored(name, cluster, header.used_len(first + index), report)?;
            }
            Entry::Stored(cluster) => {
                report
                    .corruption(format!("{name} refers to {cluster}, not a sector offset after the header"));
            }
        }
    }
    Ok(())
}
