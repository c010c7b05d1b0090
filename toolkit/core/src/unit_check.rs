//! [`UnitCheck`], the part of a structural check that most formats have in common: which units of the file the
//! tables refer to. [`SharedTables`] notices tables that are used twice.

use std::fmt;
use std::ops::Range;

use roaring::{RoaringBitmap, RoaringTreemap};

use crate::disk::Disk;
use crate::driver::CheckReport;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Lease, Memory};
use crate::table::PagedTable;

/// Maximum size in bytes of the tables that are used again after their first use. Our limit: an intact image
/// has none, since each table describes a different part of the disk. With many of them, a small file could
/// describe hundreds of millions of extents.
const MAX_SHARED_BYTES: u64 = 1 << 20;

/// Number of tables that may be used again whatever their size: a few of a damaged image.
const MIN_SHARED: u64 = 4;

/// Step in bytes by which the loan of a set grows.
const LOAN_STEP: u64 = 1 << 20;

/// Takes the result of opening an image for a check: damage goes into the report, and `None` is returned.
///
/// # Errors
/// Any error that is not about damage.
pub fn opened<T>(image: Result<T>, report: &mut CheckReport) -> Result<Option<T>> {
    match image {
        Ok(image) => Ok(Some(image)),
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
            report.corruption(format!("{error:#}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Takes the result of opening the parent of a checked image of `size` bytes: a parent with another content is damage,
/// one of another size gets a note. Where it may not or can't be opened, the report says so, and what was found in the
/// image itself stays.
///
/// # Errors
/// [`ErrorKind::Cancelled`] alone.
pub fn report_parent(parent: Result<Disk>, size: u64, report: &mut CheckReport) -> Result<()> {
    let error = match opened(parent, report) {
        Ok(found) => {
            if let Some(other) = found.map(|disk| disk.size()).filter(|found| *found != size) {
                report.findings.push(format!("note: the disk has {size} bytes, but its parent has {other}"));
            }
            return Ok(());
        }
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::Cancelled => return Err(error),
        ErrorKind::Refused | ErrorKind::Unsupported => {
            report.findings.push(format!("note: only this file was checked, not its parent: {error:#}"));
        }
        _ => {
            report.check_errors += 1;
            report.findings.push(format!("the parent can't be opened: {error:#}"));
        }
    }
    Ok(())
}

/// Maximum memory in bytes of a container without its numbers, twice its size, since a list that grows may take
/// twice its length: 48 bytes with the index entry, and what the allocator adds.
const CONTAINER_LEN: u64 = 128;

/// Memory in bytes for a number in a container whose numbers are a list, which may take twice its length.
const NUMBER_LEN: u64 = 4;

/// A set of numbers that borrows its memory. A container of the set holds the numbers that share their upper 48
/// bits, as a list or as a bitmap of 8 KiB.
#[derive(Debug)]
struct Seen {
    numbers: RoaringTreemap,
    /// Upper 48 bits of all numbers: one for each container.
    containers: RoaringTreemap,
    /// Upper 48 bits of the last number.
    last_high: Option<u64>,
    /// Upper bound for the memory of the set in bytes.
    bytes: u64,
    lease: Lease,
}

impl Seen {
    fn new(memory: &Memory) -> Result<Self> {
        let lease = memory.lease(0, "a set of clusters")?;
        let (numbers, containers) = (RoaringTreemap::new(), RoaringTreemap::new());
        Ok(Self { numbers, containers, last_high: None, bytes: 0, lease })
    }

    /// Adds a number. Returns false if it was there.
    fn insert(&mut self, number: u64) -> Result<bool> {
        let high = number >> 16;
        self.bytes += NUMBER_LEN;
        if self.last_high != Some(high) && self.containers.insert(high) {
            self.bytes += CONTAINER_LEN + NUMBER_LEN;
        }
        self.last_high = Some(high);
        if self.bytes > self.lease.bytes() {
            // Bitmaps take less than the lists that the bound assumes.
            self.bytes = memory_of(&self.numbers) + memory_of(&self.containers);
            self.lease.raise(self.bytes + LOAN_STEP, "a set of clusters")?;
        }
        Ok(self.numbers.insert(number))
    }

    /// Returns the number of numbers.
    fn len(&self) -> u64 {
        self.numbers.len()
    }
}

/// Returns an upper bound for the memory of a set in bytes.
fn memory_of(set: &RoaringTreemap) -> u64 {
    let of_part = |part: &RoaringBitmap| {
        let statistics = part.statistics();
        let stored = statistics.n_bytes_array_containers
            + statistics.n_bytes_run_containers
            + statistics.n_bytes_bitset_containers;
        u64::from(statistics.n_containers) * CONTAINER_LEN + stored
    };
    set.bitmaps().map(|(_, part)| of_part(part)).sum()
}

/// Notices tables of one length that several entries of another table use.
#[derive(Debug)]
pub struct SharedTables {
    table_len: u64,
    seen: Seen,
    shared: u64,
}

impl SharedTables {
    /// Refuses an image many of whose tables of `table_len` bytes are used several times. `entries` of `table`,
    /// `N` bytes each, refer to them; `file_offset` returns the place that an entry has, if any. The record borrows
    /// from `memory`.
    ///
    /// # Errors
    /// Same as [`SharedTables::new`] and [`SharedTables::add`]; any error of reading the entries.
    pub fn check<const N: usize>(
        table: &PagedTable,
        entries: Range<u64>,
        table_len: u64,
        memory: &Memory,
        file_offset: impl Fn([u8; N]) -> Option<u64>,
    ) -> Result<()> {
        let mut shared = Self::new(table_len, memory)?;
        let mut index = entries.start;
        while index < entries.end {
            let (entry, equal) = table.run::<N>(index, entries.end - index)?;
            if let Some(file_offset) = file_offset(entry) {
                shared.add(file_offset, equal)?;
            }
            index += equal;
        }
        Ok(())
    }

    /// Starts with no tables of `table_len` bytes. The record borrows from `memory`.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if nothing is free.
    pub fn new(table_len: u64, memory: &Memory) -> Result<Self> {
        Ok(Self { table_len: table_len.max(1), seen: Seen::new(memory)?, shared: 0 })
    }

    /// Counts the table at `file_offset`, which `times` entries use.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if many entries share tables, or use tables that overlap.
    pub fn add(&mut self, file_offset: u64, times: u64) -> Result<()> {
        // Two tables that start in the same unit overlap.
        let is_new = self.seen.insert(file_offset / self.table_len)?;
        self.shared += times - u64::from(is_new && times > 0);
        let most = (MAX_SHARED_BYTES / self.table_len).max(MIN_SHARED);
        if self.shared > most {
            return Err(Error::corrupt(format!("more than {most} tables are used several times"))
                .at(file_offset)
                .hint("the image is damaged: use a backup"));
        }
        Ok(())
    }
}

/// Collects the units (clusters, blocks) of a file that the entries of a table refer to, and reports those that
/// two entries share or that the file does not contain.
///
/// Two entries share a unit if what they refer to begins in the same one. Where a format allows clusters at any
/// sector, some that overlap are not found.
#[derive(Debug)]
pub struct UnitCheck {
    unit: u64,
    file_len: u64,
    /// Numbers of the units that entries refer to.
    used: Seen,
    /// File offset at which the last structure or unit ends.
    end: u64,
    allocated: u64,
    compressed: u64,
    /// Number of units that do not directly follow the previous one in the file.
    fragmented: u64,
    /// File offset at which the previous unit ends.
    expected: Option<u64>,
}

impl UnitCheck {
    /// Starts a check of a file of `file_len` bytes with units of `unit` bytes. `structures_end` is the file
    /// offset at which its header and its first table end. The record of the units borrows from `memory`.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if nothing is free.
    pub fn new(unit: u64, structures_end: u64, file_len: u64, memory: &Memory) -> Result<Self> {
        Ok(Self {
            unit: unit.max(1),
            file_len,
            used: Seen::new(memory)?,
            end: structures_end,
            allocated: 0,
            compressed: 0,
            fragmented: 0,
            expected: None,
        })
    }

    /// Counts the unit at `file_offset`, of which the disk uses `used` bytes. `name` names the table entry.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if the record needs more memory than is free.
    pub fn stored(
        &mut self,
        name: impl fmt::Display,
        file_offset: u64,
        used: u64,
        report: &mut CheckReport,
    ) -> Result<()> {
        if !self.claim(&name, file_offset, used, report)? {
            return Ok(());
        }
        self.allocated += 1;
        if self.expected.is_some_and(|expected| expected != file_offset) {
            self.fragmented += 1;
        }
        self.expected = file_offset.checked_add(self.unit);
        Ok(())
    }

    /// Counts a table of `len` bytes at `file_offset`, all of which the file must contain. Returns true if the
    /// file contains it and nothing else uses its first unit.
    ///
    /// # Errors
    /// Same as [`UnitCheck::stored`].
    pub fn table(
        &mut self,
        name: impl fmt::Display,
        file_offset: u64,
        len: u64,
        report: &mut CheckReport,
    ) -> Result<bool> {
        self.claim(&name, file_offset, len, report)
    }

    /// Counts a unit stored in `len` compressed bytes at `file_offset`, which may share a cluster with others.
    pub fn compressed(
        &mut self,
        name: impl fmt::Display,
        file_offset: u64,
        len: u64,
        report: &mut CheckReport,
    ) {
        if self.fits(&name, file_offset, len, report) {
            self.allocated += 1;
            self.compressed += 1;
        }
    }

    /// Returns the number of different units that entries refer to.
    pub fn units(&self) -> u64 {
        self.used.len()
    }

    /// Fills in the counts of the report, for a disk of `total` units.
    pub fn finish(self, total: u64, report: &mut CheckReport) {
        report.image_end_offset = Some(self.end.min(self.file_len));
        report.total_clusters = Some(total);
        report.allocated_clusters = Some(self.allocated);
        report.fragmented_clusters = Some(self.fragmented);
        report.compressed_clusters = (self.compressed > 0).then_some(self.compressed);
    }

    fn claim(
        &mut self,
        name: &dyn fmt::Display,
        file_offset: u64,
        len: u64,
        report: &mut CheckReport,
    ) -> Result<bool> {
        if !self.used.insert(file_offset / self.unit)? {
            report.corruption(format!("{name} refers to bytes at {file_offset}, which another entry uses"));
            return Ok(false);
        }
        Ok(self.fits(name, file_offset, len, report))
    }

    fn fits(
        &mut self,
        name: &dyn fmt::Display,
        file_offset: u64,
        len: u64,
        report: &mut CheckReport,
    ) -> bool {
        let end = file_offset.checked_add(len).filter(|end| *end <= self.file_len);
        let Some(end) = end else {
            report.corruption(format!(
                "{name} needs {len} bytes at {file_offset}, but the file ends at {}",
                self.file_len
            ));
            return false;
        };
        self.end = self.end.max(end);
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reports_shared_and_missing_units() {
        let report = &mut CheckReport::default();
        let mut check = UnitCheck::new(100, 100, 1000, &Memory::default()).unwrap();
        check.stored("entry 0", 200, 100, report).unwrap();
        check.stored("entry 1", 300, 100, report).unwrap();
        check.stored("entry 2", 500, 100, report).unwrap();
        check.compressed("entry 3", 610, 20, report);
        check.compressed("entry 4", 630, 20, report);
        assert_eq!(report.corruptions, 0);
        check.stored("entry 5", 300, 100, report).unwrap();
        check.stored("entry 6", 901, 100, report).unwrap();
        check.compressed("entry 7", u64::MAX, 2, report);
        assert!(!check.table("table 8", 1000, 11, report).unwrap());
        assert_eq!((report.corruptions, report.findings.len()), (4, 4), "{:?}", report.findings);
        check.finish(9, report);
        assert_eq!((report.allocated_clusters, report.fragmented_clusters), (Some(5), Some(1)));
        assert_eq!((report.compressed_clusters, report.image_end_offset), (Some(2), Some(650)));
    }

    #[test]
    fn refuses_many_uses_of_a_table() {
        let memory = Memory::default();
        let mut tables = SharedTables::new(512 << 10, &memory).unwrap();
        for at in 0..100 {
            tables.add(at * (512 << 10), 1).unwrap();
        }
        tables.add(512 << 10, 3).unwrap();
        tables.add((512 << 10) + 8, 1).unwrap();
        assert_eq!(tables.add(0, 1).unwrap_err().kind(), ErrorKind::Corrupt);
        let mut tables = SharedTables::new(8, &memory).unwrap();
        tables.add(8, 131_073).unwrap();
        assert!(tables.add(8, 1).is_err());
    }

    #[test]
    fn the_record_of_scattered_units_borrows_its_memory() {
        let memory = Memory::new(64 << 20);
        let mut seen = Seen::new(&memory).unwrap();
        let error = (0..1 << 20).find_map(|number| seen.insert(number << 20).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        drop(seen);
        assert_eq!(memory.free(), 40 << 20);
    }

    /// Clusters that a guest allocated at random: every number is in another container than the last.
    #[test]
    fn the_record_of_shuffled_units_borrows_little() {
        let memory = Memory::new(64 << 20);
        let mut seen = Seen::new(&memory).unwrap();
        let (count, step) = (1 << 20, 65_537);
        for number in 0..count {
            assert!(seen.insert(number * step % count).unwrap());
        }
        assert_eq!(seen.len(), count);
        // Bitmaps for all of them take 128 KiB.
        assert!(seen.lease.bytes() < 4 << 20, "{} bytes", seen.lease.bytes());
    }

    /// The bound holds for what the set allocates, with lists, bitmaps and containers of one number.
    #[test]
    fn the_loan_covers_the_memory_of_the_set() {
        for step in [1, 3, 1000, 1 << 14, 1 << 16, 1 << 20] {
            let memory = Memory::default();
            let mut seen = Seen::new(&memory).unwrap();
            for number in 0..100_000 {
                seen.insert(number * step).unwrap();
                if number % 10_000 == 0 {
                    let needed = memory_of(&seen.numbers) + memory_of(&seen.containers);
                    assert!(needed <= seen.lease.bytes(), "{number} · {step}: {needed} bytes");
                }
            }
        }
    }
}
