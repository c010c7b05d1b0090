//! Checking the structure of an archive: all of it, whatever is found on the way.

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{CancelToken, CheckReport, ErrorKind, Input, OpenOptions, Result};

use crate::header::ArchiveHeader;
use crate::layout::{EXTENT_HEADER, clusters_of};
use crate::scan::{Found, FoundExtent, Scanner, Window};
use crate::tracker::Tracker;

/// Checks the header, every extent, and that every cluster comes once.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    // What can't be read is a finding here; that nobody wants to read on is none.
    let cancel = input.cancel_token();
    let report = look(input, options, &cancel);
    cancel.check()?;
    report
}

fn look(input: Input, options: &OpenOptions, cancel: &CancelToken) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut window = Window::new(input)?;
    let header = match ArchiveHeader::from_bytes(&mut window) {
        Ok(header) => header,
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
            report.corruption(error.to_string());
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let mut checker = Checker {
        tracker: Tracker::new(&header.devices),
        report,
        allocated: 0,
        end: u64::from(header.header_size),
        reserved_used: 0,
        beyond: 0,
        dropped_blocks: 0,
    };
    let mut scanner = Scanner::new(window, *header.uuid.as_bytes(), checker.end);
    while !cancel.is_cancelled() {
        match scanner.next() {
            Found::Extent(found) => checker.extent(&scanner, &found),
            // What stands behind a complete archive is not looked at where it is allowed.
            Found::Fault { .. } if options.ignore_trailing && checker.tracker.is_complete() => break,
            Found::Fault { file, message } => checker.fault(file.start, &message),
            Found::End => break,
        }
    }
    Ok(checker.finish(&header))
}

struct Checker {
    tracker: Tracker,
    report: CheckReport,
    /// Clusters of which something is stored.
    allocated: u64,
    /// Where the last extent ends.
    end: u64,
    /// Extents with something in bytes that readers ignore.
    reserved_used: u64,
    /// Clusters past the end of their device, which are left out.
    beyond: u64,
    /// Sub-blocks past the end of their device in its last cluster, which are left out.
    dropped_blocks: u64,
}

impl Checker {
    fn fault(&mut self, file_offset: u64, message: &str) {
        self.report.corruption(format!("file offset {file_offset}: {message}"));
    }

    fn extent(&mut self, scanner: &Scanner, found: &FoundExtent) {
        let at = found.file_offset;
        self.end = at + EXTENT_HEADER as u64 + found.usable;
        self.reserved_used += u64::from(found.header.reserved_used);
        if let Some(fault) = &found.fault {
            self.fault(at, fault);
        }
        if !scanner.window().is_readable(&(at..self.end)) {
            self.fault(at, "the data of the extent can't be read in full");
        }
        let announced = u32::from(found.header.block_count);
        let mut blocks = 0;
        for (number, slot) in found.header.slots.iter().enumerate().filter(|(_, slot)| slot.dev_id != 0) {
            blocks += slot.stored();
            match self.tracker.take(slot, number as u8, false) {
                Ok(placed) if placed.is_beyond() => self.beyond += 1,
                Ok(placed) => {
                    self.allocated += u64::from(placed.mask != 0);
                    self.dropped_blocks += u64::from((placed.mask & !placed.mask_within()).count_ones());
                }
                Err(error) => self.report.corruption(error.at(at).to_string()),
            }
        }
        if blocks > announced {
            self.fault(at, "short vma extent - too many blocks");
        } else if blocks < announced {
            self.fault(at, "vma extent error - missing blocks");
        }
    }

    fn finish(mut self, header: &ArchiveHeader) -> CheckReport {
        for (index, device) in header.devices.iter().enumerate() {
            let mut from = 0;
            while let Some(missing) = self.tracker.next_missing(index, from) {
                from = missing.end;
                let which = match missing.end - missing.start {
                    1 => format!("cluster {} of {} is", missing.start, clusters_of(device.size)),
                    _ => format!(
                        "clusters {} to {} of {} are",
                        missing.start,
                        missing.end - 1,
                        clusters_of(device.size)
                    ),
                };
                let name = escape_control(&device.name);
                self.report.corruption(format!("{which} missing (device {name})"));
            }
        }
        let mut report = self.report;
        let room = CheckReport::MAX_FINDINGS.saturating_sub(report.findings.len());
        let counted = [
            (self.reserved_used, "extents have something in bytes that are reserved"),
            (self.beyond, "clusters lie past the end of their device and are left out"),
            (self.dropped_blocks, "sub-blocks lie past the end of their device and are left out"),
        ];
        let counted = counted
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("note: {count} {what}"));
        let notes = header.notes.iter().map(|note| format!("note: {note}")).chain(counted);
        report.findings.extend(notes.take(room));
        report.image_end_offset = Some(self.end);
        report.total_clusters = Some(header.devices.iter().map(|device| clusters_of(device.size)).sum());
        report.allocated_clusters = Some(self.allocated);
        report
    }
}
