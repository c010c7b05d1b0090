//! Structure check of an archive, which continues after every fault.

use imgtool_core::error::escape_control;
use imgtool_core::{CancelToken, CheckReport, DeviceKind, ErrorKind, Input, OpenOptions, Result};

use crate::header::ArchiveHeader;
use crate::info;
use crate::layout::{EXTENT_HEADER, clusters_of};
use crate::reference;
use crate::scan::{ScanExtent, ScanItem, Scanner};
use crate::tracker::Tracker;
use crate::window::Window;

/// Checks the header and every extent, and that every cluster occurs exactly once. Reports damage as
/// findings, not as an error.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    // The check turns read errors into findings, but cancellation is not a finding.
    let cancel = input.cancel_token();
    let report = check_until_cancelled(input, options, &cancel);
    cancel.check()?;
    report
}

fn check_until_cancelled(input: Input, options: &OpenOptions, cancel: &CancelToken) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut window = Window::new(input)?;
    let header = match ArchiveHeader::read_from(&mut window) {
        Ok(header) => header,
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
            report.corruption(format!("{error:#}"));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let mut checker = Checker {
        tracker: Tracker::new(&header, &options.memory)?,
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
            ScanItem::Extent(extent) => checker.extent(&scanner, &extent),
            // Trailing bytes after a complete archive are not checked if the options allow them.
            ScanItem::Fault { .. } if options.ignore_trailing && checker.tracker.is_complete() => break,
            ScanItem::Fault { file, message, .. } => checker.fault(file.start, &message),
            ScanItem::End => break,
        }
    }
    Ok(checker.finish(&header))
}

/// State of a check.
struct Checker {
    tracker: Tracker,
    report: CheckReport,
    /// Number of clusters with stored sub-blocks.
    allocated: u64,
    /// Archive offset of the end of the last extent.
    end: u64,
    /// Number of extents with non-zero reserved bytes, which readers ignore.
    reserved_used: u64,
    /// Number of clusters past the end of their device, which readers drop.
    beyond: u64,
    /// Number of sub-blocks past the end of a device in its last cluster, which readers drop.
    dropped_blocks: u64,
}

impl Checker {
    fn fault(&mut self, file_offset: u64, message: &str) {
        self.report.corruption(format!("file offset {file_offset}: {message}"));
    }

    fn extent(&mut self, scanner: &Scanner, extent: &ScanExtent) {
        let at = extent.file_offset;
        self.end = at + EXTENT_HEADER as u64 + extent.usable;
        self.reserved_used += u64::from(extent.header.reserved_used);
        if let Some(fault) = &extent.fault {
            self.fault(at, fault);
        }
        if !scanner.window().is_readable(&(at..self.end)) {
            self.fault(at, "the data of the extent can't be read in full");
        }
        let block_count = u32::from(extent.header.block_count);
        let mut marked = 0;
        for (index, slot) in extent.header.slots.iter().enumerate().filter(|(_, slot)| slot.dev_id != 0) {
            marked += slot.stored();
            match self.tracker.admit_slot(slot, index as u8, false) {
                Ok(cluster) if cluster.is_beyond() => self.beyond += 1,
                Ok(cluster) => {
                    self.allocated += u64::from(cluster.mask != 0);
                    self.dropped_blocks += u64::from((cluster.mask & !cluster.mask_within()).count_ones());
                }
                Err(error) => self.report.corruption(format!("{:#}", error.at(at))),
            }
        }
        if marked > block_count {
            self.fault(at, reference::TOO_MANY_BLOCKS);
        } else if marked < block_count {
            self.fault(at, reference::MISSING_BLOCKS);
        }
    }

    /// Adds the missing clusters, the notes and the counts to the report.
    fn finish(mut self, header: &ArchiveHeader) -> CheckReport {
        let short = self.tracker.short_states();
        let short_notes: Vec<String> =
            short.iter().map(|(device, guest)| info::short_state(header, *device, guest)).collect();
        let disks = header.devices.iter().enumerate();
        for (index, device) in disks.filter(|(_, device)| device.kind == DeviceKind::Disk) {
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
        let max_notes = CheckReport::MAX_FINDINGS.saturating_sub(report.findings.len());
        let counted = [
            (self.reserved_used, "extents have non-zero reserved bytes, which readers ignore"),
            (self.beyond, "clusters lie past the end of their device and are left out"),
            (self.dropped_blocks, "sub-blocks lie past the end of their device and are left out"),
        ];
        let counted = counted
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("note: {count} {what}"));
        let facts = header.notes.iter().chain(&short_notes).map(|note| format!("note: {note}"));
        let notes = facts.chain(counted);
        report.findings.extend(notes.take(max_notes));
        report.image_end_offset = Some(self.end);
        report.total_clusters = Some(header.devices.iter().map(|device| clusters_of(device.size)).sum());
        report.allocated_clusters = Some(self.allocated);
        report
    }
}
