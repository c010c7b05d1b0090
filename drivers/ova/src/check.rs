//! The check of a package: its archive, the digests of its manifest, and the content of every disk.

use imgtool_core::source::for_each_extent;
use imgtool_core::{CheckReport, Disk, Error, ErrorKind, ImageSource, Input, OpenOptions, Result};

use crate::source::PackageSource;

/// Length in bytes of a read.
const PIECE: u64 = 1 << 20;

/// Checks a package, and reads all of it.
///
/// # Errors
/// If it can't be opened or read.
pub(crate) fn check(format: &'static str, input: Input, options: &OpenOptions) -> Result<CheckReport> {
    // The checks go over the files of a package twice: for their digests, and for the disks.
    let input = if input.is_stream() { options.externals.saved(input)? } else { input };
    let source = PackageSource::open(format, input, options)?;
    let mut report = CheckReport::default();
    for line in source.lines() {
        record(source.check_line(line), &mut report)?;
    }
    for disk in source.disks() {
        let result = disk.disk.as_ref().map_or(Ok(()), read_all);
        record(result.map_err(|e| e.device(&*disk.device.name)), &mut report)?;
    }
    report.findings.extend(source.info().notes.iter().cloned());
    Ok(report)
}

/// Counts damage, which is no error of the check.
fn record(result: Result<()>, report: &mut CheckReport) -> Result<()> {
    let is_damage = |error: &Error| matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed);
    match result {
        Err(error) if is_damage(&error) => {
            report.corruption(error);
            Ok(())
        }
        result => result,
    }
}

/// Reads all data of a disk.
fn read_all(disk: &Disk) -> Result<()> {
    let Some(random) = disk.image().access().random() else { return Ok(()) };
    let mut buf = vec![0; PIECE as usize];
    for_each_extent(random, disk.device().id, 0..disk.size(), |extent| {
        let mut position = extent.start;
        while extent.is_data() && position < extent.end() {
            // At most a piece, so it fits.
            let len = (extent.end() - position).min(PIECE - position % PIECE) as usize;
            disk.read_at(&mut buf[..len], position).map_err(|e| e.guest(position..position + len as u64))?;
            position += len as u64;
        }
        Ok(())
    })?;
    disk.image().verify()
}
