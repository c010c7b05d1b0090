//! Repair: the log is replayed into the file, and damaged copies of headers and region tables are restored from
//! the other copy.

use imgtool_core::{CheckReport, Error, Memory, Output, Repair, Result};
use uuid::Uuid;

use crate::check;
use crate::image::{Image, UnreadableHeader};
use crate::layout::region::{REGION_TABLE_LEN, REGION_TABLE_OFFSETS};
use crate::update::headers::HeaderPair;
use crate::update::successor;

/// Repairs the image in `output`. Returns the report of a check before the repair. VHDX has no leaks that a check
/// finds, so [`Repair::Leaks`] changes nothing.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the BAT is damaged; nothing has been written then.
pub(crate) fn repair(output: &Output, what: Repair, memory: &Memory) -> Result<CheckReport> {
    let report = check::check(output.reopen(memory)?, memory)?;
    let image = Image::open(output.reopen(memory)?, UnreadableHeader::UseOther, 0, memory)?;
    let copies = check::faults_of_copies(&image);
    if report.check_errors > 0 || report.corruptions > copies || image.region_tables_differ {
        let first = report.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
        return Err(Error::refused(format!("the tables of the image are damaged{first}"))
            .path(output.location())
            .hint("use a backup, or salvage what is intact"));
    }
    if what == Repair::All && (copies > 0 || image.replay_stats.is_some()) {
        restore(output, &image)?;
    }
    Ok(report)
}

fn restore(output: &Output, image: &Image) -> Result<()> {
    let mut headers = HeaderPair::new(output, image);
    headers.change(|header| header.file_write_guid = successor(header.file_write_guid, "file write"))?;
    if image.replay_stats.is_some() {
        image.file.apply_log(output)?;
        headers.change(|header| header.log_guid = Uuid::nil())?;
    }
    for (index, fault) in image.region_faults.iter().enumerate() {
        if fault.is_some() {
            let mut table = vec![0; REGION_TABLE_LEN];
            output.read_exact_at(&mut table, REGION_TABLE_OFFSETS[1 - index])?;
            output.write_at(&table, REGION_TABLE_OFFSETS[index])?;
        }
    }
    // The second time, for the other copy.
    headers.change(|_| ())
}
