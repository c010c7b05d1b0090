//! The structural check of an image: its header and every entry of its tables.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Input, Memory, Result};

use crate::image::Image;
use crate::layout::Entry;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a QED image or requires unknown features. Damage is not an error: the
/// report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, 0, memory), &mut report)? else { return Ok(report) };
    let header = &image.header;
    let mut check = UnitCheck::new(header.cluster_size, header.header_len, image.input.len(), memory)?;
    check.table("the header", header.l1_offset, header.table_len, &mut report)?;
    let tables = header.virtual_size.div_ceil(header.l2_span());
    let mut index = 0;
    while index < tables {
        let (entry, equal) = image.entry(header.l1_offset, index, tables - index)?;
        if entry != Entry::Absent {
            for index in index..index + equal {
                check_table(&image, index, entry, &mut check, &mut report)?;
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
    entry: Entry,
    check: &mut UnitCheck,
    report: &mut CheckReport,
) -> Result<()> {
    let header = &image.header;
    let table = match image.check_l2(entry, l1_index) {
        Ok(table) => table,
        Err(error) => {
            report.corruption(format!("{error:#}"));
            return Ok(());
        }
    };
    // A table that another entry uses was walked already.
    if !check.table(format!("entry {l1_index} of the first table"), table, header.table_len, report)? {
        return Ok(());
    }
    let first = l1_index * header.entries();
    let entries = header.entries().min(header.clusters().saturating_sub(first));
    let mut index = 0;
    while index < entries {
        let (entry, equal) = image.entry(table, index, entries - index)?;
        if let Entry::At(cluster) = entry {
            for index in index..index + equal {
                let name = format!("entry {index} of the table at {table}");
                if image.is_cluster(cluster) {
                    check.stored(name, cluster, header.used_len(first + index), report)?;
                } else {
                    report.corruption(format!(
                        "{name} refers to {cluster}, not a cluster offset after the header"
                    ));
                }
            }
        }
        index += equal;
    }
    Ok(())
}
