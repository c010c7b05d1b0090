//! [`FoundGrains`], the grains of a stream by their markers, for a salvage of a file whose tables may be
//! damaged.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

use imgtool_core::zero::is_zero;
use imgtool_core::{Error, ErrorKind, Lease, Memory, RandomInput, Result};

use super::Place;
use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::Header;
use crate::layout::marker::{GRAIN_HEAD, Kind, Marker};

/// Length of a sector as an index.
const SECTOR: usize = SECTOR_SIZE as usize;

/// Number of bytes that are read at a time where the next marker is not known. Our choice: 64 KiB, a grain.
const SEARCH_LEN: u64 = 64 << 10;

/// Memory in bytes for a table besides its entries. Our estimate.
const TABLE_BYTES: u64 = 128;

/// Maximum number of gaps. Our limit, for the memory of a badly damaged file: beyond it, the last gap grows.
const MAX_GAPS: usize = 4096;

/// The grains of a stream whose markers are intact.
pub(super) struct FoundGrains {
    /// Sector of each grain, 0 without one, by the index of its table.
    tables: HashMap<u64, Box<[u32]>>,
    table_entries: u64,
    /// Ranges of grains, ascending, in which markers may be damaged: no marker shows that a grain is missing
    /// there.
    gaps: Vec<Range<u64>>,
    lease: Lease,
}

impl FoundGrains {
    /// Walks over the markers of a stream that has this header. Where one is damaged, looks at every sector
    /// for the next one.
    ///
    /// # Errors
    /// `LimitExceeded` if the grains take too much memory; `Cancelled`. What can't be read counts as damaged.
    pub(super) fn search(input: &RandomInput, header: &Header, memory: &Memory) -> Result<Self> {
        let lease = memory.lease(SEARCH_LEN, "the grains of a damaged stream")?;
        let table_entries = header.table_entries.into();
        let found = Self { tables: HashMap::new(), table_entries, gaps: Vec::new(), lease };
        let search = Search { input, header, found, window: Vec::new(), window_at: 0, next_grain: 0 };
        search.run()
    }

    /// Returns the sectors of the grains of a table, 0 for those that were not found; `None` if no grain was.
    pub(super) fn table(&self, index: u64) -> Option<&[u32]> {
        self.tables.get(&index).map(|table| &**table)
    }

    /// Completes the table `index` by the grains that were found, or replaces one that can't be read. A grain
    /// that was not found stays where the table says, and is lost when it is read. Returns true if the table
    /// was wrong.
    pub(super) fn merge(&self, index: u64, stored: Option<&[Place]>) -> (Arc<[Place]>, bool) {
        let first = index.saturating_mul(self.table_entries);
        let sectors = self.table(index);
        let mut differs = stored.is_none();
        let place = |within: u64| {
            let found = sectors.and_then(|table| table.get(within as usize)).filter(|sector| **sector != 0);
            let stored = stored.and_then(|table| table.get(within as usize)).copied();
            match (found, stored) {
                (Some(sector), stored) => {
                    let place = Place::At(u64::from(*sector) * SECTOR_SIZE);
                    differs |= stored != Some(place);
                    place
                }
                (None, Some(stored)) => stored,
                (None, None) if self.is_in_gap(first.saturating_add(within)) => Place::Lost,
                (None, None) => Place::Absent,
            }
        };
        ((0..self.table_entries).map(place).collect(), differs)
    }

    /// True if the marker of a grain may be damaged.
    pub(super) fn is_in_gap(&self, grain: u64) -> bool {
        let at = self.gaps.partition_point(|gap| gap.end <= grain);
        self.gaps.get(at).is_some_and(|gap| gap.start <= grain)
    }

    fn add(&mut self, grain: u64, sector: u64) -> Result<()> {
        // No table can list a grain beyond 2 TiB.
        let Ok(sector) = u32::try_from(sector) else { return Ok(()) };
        let (index, within) = (grain / self.table_entries, (grain % self.table_entries) as usize);
        let table = match self.tables.entry(index) {
            Entry::Occupied(table) => table.into_mut(),
            Entry::Vacant(place) => {
                let bytes = self.lease.bytes() + self.table_entries * 4 + TABLE_BYTES;
                self.lease.raise(bytes, "the grains of a damaged stream")?;
                place.insert(vec![0; self.table_entries as usize].into())
            }
        };
        // The first of two markers counts.
        if let Some(entry) = table.get_mut(within).filter(|entry| **entry == 0) {
            *entry = sector;
        }
        Ok(())
    }

    /// Adds a gap behind all others.
    fn add_gap(&mut self, grains: Range<u64>) {
        if grains.is_empty() {
            return;
        }
        let is_full = self.gaps.len() >= MAX_GAPS;
        match self.gaps.last_mut().filter(|last| is_full || last.end >= grains.start) {
            Some(last) => last.end = grains.end,
            None => self.gaps.push(grains),
        }
    }
}

/// Sector of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Grain(u64),
    Metadata(Kind),
    /// Zeros, which look like an end marker.
    Zeros,
    Damaged,
}

/// A walk over the markers of a file.
struct Search<'a> {
    input: &'a RandomInput,
    header: &'a Header,
    found: FoundGrains,
    /// Bytes that were read last, in whole sectors.
    window: Vec<u8>,
    /// File offset of `window`.
    window_at: u64,
    /// The grain behind the last one that was found.
    next_grain: u64,
}

impl Search<'_> {
    fn run(mut self) -> Result<FoundGrains> {
        let (mut at, mut is_damaged) = (self.start(), false);
        let (mut has_footer, mut has_end) = (false, false);
        while at < self.input.len() {
            let (step, end) = self.step(at, is_damaged || has_end)?;
            at = match step {
                Step::Grain(grain) => {
                    if is_damaged || has_end {
                        self.found.add_gap(self.next_grain..grain);
                    }
                    self.found.add(grain, at / SECTOR_SIZE)?;
                    self.next_grain = self.next_grain.max(grain + 1);
                    has_end = false;
                    // Its length may be damaged: a marker must follow.
                    is_damaged = end < self.input.len() && self.step(end, false)?.0 == Step::Damaged;
                    if is_damaged { at + SECTOR_SIZE } else { end }
                }
                Step::Metadata(kind) => {
                    has_footer |= kind == Kind::Footer;
                    end
                }
                Step::Zeros => {
                    has_end = true;
                    self.end_of_zeros(at, end)?
                }
                Step::Damaged => {
                    is_damaged = true;
                    end
                }
            };
        }
        let is_in_front = self.header.directory < self.header.overhead;
        if !has_end || is_damaged || !has_footer && !is_in_front {
            self.found.add_gap(self.next_grain..self.header.capacity.div_ceil(self.header.grain_size));
        }
        Ok(self.found)
    }

    /// Returns the file offset of the first marker: behind header and descriptor, and the tables if they are
    /// in front.
    fn start(&self) -> u64 {
        let Header { descriptor_offset, descriptor_size, overhead, .. } = *self.header;
        let descriptor_end = descriptor_offset.saturating_add(descriptor_size).max(1);
        let file_end = self.input.len() / SECTOR_SIZE;
        let first = if (descriptor_end..file_end).contains(&overhead) { overhead } else { descriptor_end };
        first.saturating_mul(SECTOR_SIZE)
    }

    /// Decodes the sector at `at`. Returns it with the file offset of the next one.
    fn step(&mut self, at: u64, is_searching: bool) -> Result<(Step, u64)> {
        let len = self.input.len();
        let header = self.header;
        let sector = self.sector(at, is_searching)?;
        let next = at + SECTOR_SIZE;
        let marker = sector.first_chunk().map_or(Marker::Unknown(0), Marker::decode);
        Ok(match marker {
            Marker::Metadata { kind: Kind::End, .. } if is_zero(sector) => (Step::Zeros, next),
            Marker::Metadata { kind: Kind::Progress, .. } => (Step::Metadata(Kind::Progress), next),
            marker if !marker.is_plausible(sector, header) => (Step::Damaged, next),
            Marker::Grain { lba, len: stored } => {
                let end = at.saturating_add(GRAIN_HEAD as u64 + u64::from(stored));
                match end <= len {
                    true => (Step::Grain(lba / header.grain_size), end.next_multiple_of(SECTOR_SIZE)),
                    false => (Step::Damaged, next),
                }
            }
            Marker::Metadata { kind, sectors } => {
                (Step::Metadata(kind), next.saturating_add(sectors.saturating_mul(SECTOR_SIZE)))
            }
            Marker::Unknown(_) => (Step::Damaged, next),
        })
    }

    /// Reads the sector at `at`, which is within the file. What can't be read is zeros, as is what follows
    /// the end.
    fn sector(&mut self, at: u64, is_searching: bool) -> Result<&[u8; SECTOR]> {
        let within = at.wrapping_sub(self.window_at);
        if within >= self.window.len() as u64 {
            let len = if is_searching { SEARCH_LEN } else { SECTOR_SIZE };
            let there = len.min(self.input.len().saturating_sub(at)) as usize;
            self.window.clear();
            self.window.resize(there, 0);
            let mut cancelled = None;
            self.input.read_salvage(&mut self.window, at, |_, error| {
                cancelled = cancelled.take().or(Some(error).filter(|e| e.kind() == ErrorKind::Cancelled));
            });
            if let Some(error) = cancelled {
                return Err(error);
            }
            self.window.resize(there.next_multiple_of(SECTOR), 0);
            self.window_at = at;
        }
        // The window begins at a marker and has whole sectors.
        let within = (at - self.window_at) as usize;
        let sector = self.window.get(within..).and_then(|rest| rest.first_chunk());
        sector.ok_or_else(|| Error::corrupt("a marker is behind the end of the file").at(at))
    }

    /// Returns the file offset at which a hole ends that contains the zeros at `at`; `next` if they are
    /// stored.
    fn end_of_zeros(&self, at: u64, next: u64) -> Result<u64> {
        // Once in each part that is read.
        if at != self.window_at {
            return Ok(next);
        }
        match self.input.run(at) {
            Ok(run) if !run.is_data => Ok((run.end / SECTOR_SIZE * SECTOR_SIZE).max(next)),
            Err(error) if error.kind() == ErrorKind::Cancelled => Err(error),
            _ => Ok(next),
        }
    }
}
