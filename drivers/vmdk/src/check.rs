//! The check of an image: every entry of its tables, the markers and the content of compressed grains, and
//! whether any two structures or grains overlap.

use imgtool_core::unit_check::report_parent;
use imgtool_core::{CheckReport, ErrorKind, Input, Lease, Memory, OpenOptions, Result};

use crate::grains::{Form, GrainFile, Place};
use crate::image::{Content, Image};
use crate::inflate::{Inflater, check_head};
use crate::layout::SECTOR_SIZE;
use crate::layout::marker::{Kind, Marker};
use crate::parent;

/// Checks an image and the files of its extents. Of its parent, checks only the content identifier, if the user
/// allowed to open it.
///
/// # Errors
/// If a file can't be read, is not a VMDK image or requires an unsupported feature. Damage is not an error: the
/// report lists it.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    // A snapshot's delta can be checked without the disk below it.
    let options = OpenOptions { force: true, info_only: false, salvage: false, ..options.clone() };
    let mut image = match Image::open(input, &options) {
        Ok(image) => image,
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
            report.corruption(format!("{error:#}"));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    // They are compared here as a whole.
    for extent in &mut image.extents {
        if let Content::Grains { file, .. } = &mut extent.content {
            file.redundant = None;
        }
    }
    for extent in &image.extents {
        match &extent.content {
            Content::Grains { file, .. } => {
                FileCheck::new(file, &image, &options.memory)?.run(&mut report)?
            }
            Content::NoAccess => {
                report.check_errors += 1;
                report.findings.push(format!(
                    "the descriptor allows no access to the guest bytes {}..{} (NOACCESS)",
                    extent.start,
                    extent.start + extent.len
                ));
            }
            Content::Flat { .. } | Content::Zero | Content::Closed(_) | Content::Lost { .. } => {}
        }
    }
    if let Some(error) = image.contradiction() {
        report.corruption(format!("{error:#}"));
    }
    if let Some((descriptor, id)) = image.parent_id() {
        let parent = parent::open(&image, descriptor, id, &options).map(|parent| parent.disk);
        report_parent(parent, image.virtual_size, &mut report)?;
    }
    Ok(report)
}

/// A walk over the tables of a sparse file, with its counts so far.
struct FileCheck<'a> {
    file: &'a GrainFile,
    /// Start of messages: the name of the file, if the image has several.
    prefix: String,
    /// Ranges of the file in use, joined where they follow each other.
    used: Vec<(u64, u64)>,
    /// Memory for `used`.
    lease: Lease,
    fragmented: u64,
    /// End of the previous grain in the file.
    expected: Option<u64>,
    allocated: u64,
    /// Number of stored bytes of compressed grains that may still be decoded. Grains that share bytes exhaust
    /// it, so that a small file can't keep the check busy.
    budget: u64,
    decoder: Inflater,
    content: Vec<u8>,
}

/// Number of ranges after which memory is borrowed for more.
const RANGES_PER_LOAN: usize = 64 << 10;

impl<'a> FileCheck<'a> {
    fn new(file: &'a GrainFile, image: &Image, memory: &Memory) -> Result<Self> {
        let lease = memory.lease(0, "the check of a VMDK image")?;
        let prefix = if image.single { String::new() } else { format!("{}: ", file.input.location()) };
        let is_compressed = file.form != Form::Plain;
        // The decoder has the compressed bytes of one grain, the check its content: 1 MiB at most.
        let grain_size = if is_compressed { file.grain_size } else { 0 };
        let decoder = Inflater::new(grain_size, 0, memory)?;
        let content = vec![0; grain_size as usize];
        let (used, budget) = (Vec::new(), file.input.len());
        Ok(Self {
            file,
            prefix,
            used,
            lease,
            fragmented: 0,
            expected: None,
            allocated: 0,
            budget,
            decoder,
            content,
        })
    }

    fn run(mut self, report: &mut CheckReport) -> Result<()> {
        for range in &self.file.reserved.clone() {
            self.enter(range.start, range.end)?;
        }
        self.check_redundant(report)?;
        self.enter_tables()?;
        let mut grain = 0;
        while grain < self.file.grains() {
            grain += self.check_run(grain, report)?;
        }
        let end = self.check_overlaps(report);
        self.check_end(end, report)?;
        let add = |count: &mut Option<u64>, more: u64| *count = Some(count.unwrap_or(0) + more);
        add(&mut report.total_clusters, self.file.grains());
        add(&mut report.allocated_clusters, self.allocated);
        add(&mut report.fragmented_clusters, self.fragmented);
        if self.file.form != Form::Plain {
            add(&mut report.compressed_clusters, self.allocated);
        }
        Ok(())
    }

    /// Enters a range in use.
    fn enter(&mut self, start: u64, end: u64) -> Result<()> {
        match self.used.last_mut() {
            _ if start >= end => {}
            Some(last) if last.1 == start => last.1 = end,
            _ => {
                if self.used.len().is_multiple_of(RANGES_PER_LOAN) {
                    // Twice, since a vector doubles.
                    let bytes = 2 * (self.used.len() + RANGES_PER_LOAN) as u64 * 16;
                    self.lease.raise(bytes, "the check of a fragmented VMDK image")?;
                }
                self.used.push((start, end));
            }
        }
        Ok(())
    }

    fn enter_tables(&mut self) -> Result<()> {
        if self.file.hosted.is_none() && self.file.kind != "COWD" {
            // The tables of SE sparse files are in an area of their own, which is reserved.
            return Ok(());
        }
        let len = (self.file.table_entries * 4).next_multiple_of(SECTOR_SIZE);
        let file = self.file;
        for table in file.directory.iter().filter(|table| **table != 0) {
            self.enter(*table, table + len)?;
        }
        Ok(())
    }

    /// Checks the grains from `grain` on that the file looks up together. Returns their number.
    fn check_run(&mut self, grain: u64, report: &mut CheckReport) -> Result<u64> {
        let found = self.file.run(grain, self.file.grains() - grain);
        let (place, len) = match found {
            Ok((Place::At(offset), len)) if self.file.form == Form::Plain => {
                self.enter_grains(offset, offset + self.file.grain_size * len, len)?;
                return Ok(len);
            }
            Ok((Place::At(_), _)) => (self.file.run(grain, 1)?.0, 1),
            Ok((place, len)) => (place, len),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
                report.corruption(format!("{}{error:#}", self.prefix));
                let at = grain * self.file.grain_size;
                let lost = self.file.to_unit_end(at, self.file.capacity.saturating_sub(at));
                return Ok(lost / self.file.grain_size);
            }
            Err(error) => return Err(error),
        };
        if let (Place::At(offset), Form::Compressed(head)) = (place, self.file.form) {
            let bytes = self.file.input.read_vec(offset, head)?;
            match check_head(self.file, grain, &bytes) {
                Ok(stored) => {
                    let end = (offset + head as u64 + u64::from(stored)).next_multiple_of(SECTOR_SIZE);
                    if end > self.file.input.len().next_multiple_of(SECTOR_SIZE) {
                        report.corruption(format!("{}grain {grain} ends behind the file", self.prefix));
                    } else {
                        self.decode(grain, stored.into(), report)?;
                    }
                    self.enter_grains(offset, end, 1)?;
                }
                Err(error) => report.corruption(format!("{}{error:#}", self.prefix)),
            }
        }
        Ok(len)
    }

    /// Decodes a grain of `stored` compressed bytes, which end in a checksum of its content.
    fn decode(&mut self, grain: u64, stored: u64, report: &mut CheckReport) -> Result<()> {
        let Some(budget) = self.budget.checked_sub(stored) else { return Ok(()) };
        self.budget = budget;
        match self.decoder.decode(self.file, grain, &mut self.content) {
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
                report.corruption(format!("{}grain {grain}: {error:#}", self.prefix));
                Ok(())
            }
            decoded => decoded,
        }
    }

    fn enter_grains(&mut self, start: u64, end: u64, grains: u64) -> Result<()> {
        self.allocated += grains;
        self.fragmented += u64::from(self.expected.is_some_and(|expected| expected != start));
        self.expected = Some(end);
        self.enter(start, end)
    }

    /// Reports ranges that overlap an earlier one. Returns the end of the last range.
    fn check_overlaps(&mut self, report: &mut CheckReport) -> u64 {
        self.used.sort_unstable();
        let mut before = (0, 0);
        for range in &self.used {
            if range.0 < before.1 {
                report.corruption(format!(
                    "{}the bytes {}..{} and {}..{} of the file overlap, but belong to different grains or \
                     tables",
                    self.prefix, before.0, before.1, range.0, range.1
                ));
            }
            if range.1 > before.1 {
                before = *range;
            }
        }
        let end = before.1.min(self.file.input.len());
        report.image_end_offset = Some(report.image_end_offset.unwrap_or(0).max(end));
        end
    }

    /// Compares the redundant directory and its tables with the ones in use.
    fn check_redundant(&mut self, report: &mut CheckReport) -> Result<()> {
        let redundant = self.file.hosted.as_ref().and_then(|header| header.redundant_directory);
        let own = self.file.hosted.as_ref().map(|header| header.directory);
        let Some(directory) = redundant.filter(|sector| *sector != 0 && Some(*sector) != own) else {
            return Ok(());
        };
        let (file, offset) = (self.file, directory.saturating_mul(SECTOR_SIZE));
        let table_len = (file.table_entries * 4) as usize;
        let mut differing = 0u64;
        // Many entries may name the same pair of tables.
        let mut last = ((0, 0), true);
        // In pieces of a page, so the memory is bounded.
        for (piece, tables) in (0u64..).zip(file.directory.chunks(1024)) {
            let at = offset.saturating_add(piece * 4096);
            let Ok(entries) = file.input.read_vec(at, tables.len() * 4) else {
                report.corruption(format!("{}the redundant grain directory exceeds the file", self.prefix));
                return Ok(());
            };
            for (entry, table) in entries.as_chunks().0.iter().zip(tables) {
                let copy = u64::from(u32::from_le_bytes(*entry)) * SECTOR_SIZE;
                let same = match (copy, *table) {
                    (0, 0) => true,
                    pair if pair == last.0 => last.1,
                    (0, _) | (_, 0) => false,
                    (copy, table) => {
                        match (file.input.read_vec(copy, table_len), file.input.read_vec(table, table_len)) {
                            (Ok(copy), Ok(table)) => copy == table,
                            _ => false,
                        }
                    }
                };
                last = ((copy, *table), same);
                differing += u64::from(!same);
                if copy != 0 && copy != *table {
                    self.enter(copy, copy + table_len as u64)?;
                }
            }
        }
        self.enter(offset, offset.saturating_add(file.directory.len() as u64 * 4))?;
        if differing > 0 {
            report.corruption(format!(
                "{}{differing} grain tables differ from their redundant copies",
                self.prefix
            ));
        }
        Ok(())
    }

    /// Notes a stream without its end marker: the content is complete, but some importers refuse it. `used_end` is
    /// the end of the last grain or table.
    fn check_end(&self, used_end: u64, report: &mut CheckReport) -> Result<()> {
        let file = self.file;
        if !file.hosted.as_ref().is_some_and(|header| header.markers) || file.input.len() < 2 * SECTOR_SIZE {
            return Ok(());
        }
        let at = file.input.len() / SECTOR_SIZE * SECTOR_SIZE - SECTOR_SIZE;
        let last = file.input.read_vec(at, 16)?;
        let marker = last.first_chunk().map(Marker::decode);
        // The last sector of a grain can look like a marker.
        if at < used_end || !matches!(marker, Some(Marker::Metadata { kind: Kind::End, .. })) {
            report.findings.push(
                "note: the stream has no end marker, without which some importers refuse it".to_owned(),
            );
        }
        Ok(())
    }
}
