//! [`Tables`], the comparison of a stream's tables with its grains.

use std::collections::VecDeque;
use std::ops::Range;

use imgtool_core::{Error, Lease, Remedy, Result};

use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::{GD_AT_END, Header};

/// Maximum number of tables that are behind the grains of later tables. Our limit; programs write each table
/// right behind its grains.
const MAX_OPEN_TABLES: usize = 64;

/// Maximum length of a grain directory in bytes. Our limit, as in files.
const MAX_DIRECTORY_LEN: u64 = 32 << 20;

/// The tables of a stream, as far as they are known.
pub(super) struct Tables {
    table_entries: u64,
    directory_entries: u64,
    kind: Kind,
    /// Memory for everything here.
    lease: Lease,
}

enum Kind {
    /// Known before the first grain.
    Front {
        /// Sector of each grain, 0 without one. A grain that was met is set to 0.
        expected: Vec<u32>,
        /// Number of grains that were not met yet.
        missing: u64,
    },
    /// Derived from the grains, and compared with the tables that follow.
    Behind {
        /// Sector of each table that was met, 0 without one.
        directory: Vec<u32>,
        /// Tables that were not met yet: their index, and the sectors of their grains.
        open: VecDeque<(u64, Vec<u32>)>,
        /// Sectors of tables without grains.
        empty: Vec<u32>,
        /// Sector of the directory that the header states, if it does.
        stated_at: Option<u64>,
        /// Sector of the directory, once it was met.
        directory_at: Option<u64>,
        has_footer: bool,
    },
    /// Damaged, in a salvage.
    Unknown {
        /// True if an end marker follows the last grain.
        ended: bool,
    },
}

fn contradiction(what: &str) -> Error {
    Error::corrupt(format!("{what} contradicts the grains of the stream"))
        .remedied_by(Remedy::Salvage("the stream is damaged: copy it again, or use a backup".into()))
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
}

impl Tables {
    /// Reads the tables from `front`, the bytes before the first grain.
    pub(super) fn in_front(header: &Header, front: &[u8], mut lease: Lease) -> Result<Self> {
        let part = |sector: u64, len: u64| {
            let start = usize::try_from(sector.checked_mul(SECTOR_SIZE)?).ok()?;
            front.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        };
        let table_entries = u64::from(header.table_entries);
        let grains = header.capacity.div_ceil(header.grain_size);
        let outside = || {
            Error::unsupported("the tables of the stream are neither before its grains nor behind them")
                .hint("save the stream to a file first")
        };
        let directory = part(header.directory, header.directory_entries() * 4).ok_or_else(outside)?;
        // Absent and shared tables are in memory, too. The multiplication is bounded by the disk's 2^54 sectors.
        let len = header.directory_entries() * table_entries;
        lease.raise(2 * front.len() as u64 + 4 * len, "the tables of a stream")?;
        let mut expected: Vec<u32> = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        for sector in entries(directory).take(header.directory_entries() as usize) {
            let len = expected.len() + table_entries as usize;
            match sector {
                0 => expected.resize(len, 0),
                sector => {
                    let table = part(sector.into(), table_entries * 4).ok_or_else(outside)?;
                    // Entry 1 means zeros, which have no grain in the stream.
                    let is_zeros = |entry: &u32| *entry == 1 && header.zeroed_grains;
                    expected.extend(entries(table).map(|entry| if is_zeros(&entry) { 0 } else { entry }));
                }
            }
        }
        expected.truncate(usize::try_from(grains).unwrap_or(usize::MAX));
        let missing = expected.iter().filter(|entry| **entry != 0).count() as u64;
        let directory_entries = header.directory_entries();
        Ok(Self { table_entries, directory_entries, kind: Kind::Front { expected, missing }, lease })
    }

    /// Expects the tables behind the grains.
    pub(super) fn behind(header: &Header, mut lease: Lease) -> Result<Self> {
        let directory_entries = header.directory_entries();
        let len = directory_entries.saturating_mul(4);
        if len > MAX_DIRECTORY_LEN {
            return Err(Error::limit(format!(
                "the grain directory has {len} bytes; the limit is {MAX_DIRECTORY_LEN}"
            )));
        }
        // The directory, and its copy from the stream; the open tables.
        let tables = MAX_OPEN_TABLES as u64 * u64::from(header.table_entries) * 4;
        lease.raise(2 * len + SECTOR_SIZE + tables, "the tables of a stream")?;
        let kind = Kind::Behind {
            directory: vec![0; directory_entries as usize],
            open: VecDeque::new(),
            empty: Vec::new(),
            stated_at: (header.directory != GD_AT_END).then_some(header.directory),
            directory_at: None,
            has_footer: false,
        };
        Ok(Self { table_entries: header.table_entries.into(), directory_entries, kind, lease })
    }

    /// Expects nothing.
    pub(super) fn unknown(header: &Header, lease: Lease) -> Self {
        let kind = Kind::Unknown { ended: false };
        // No directory can be as long, so none is read.
        Self { table_entries: header.table_entries.into(), directory_entries: u64::MAX, kind, lease }
    }

    /// Returns the number of sectors of a table.
    pub(super) fn table_sectors(&self) -> u64 {
        (self.table_entries * 4).div_ceil(SECTOR_SIZE)
    }

    /// Returns the number of sectors of the directory.
    pub(super) fn directory_sectors(&self) -> u64 {
        self.directory_entries.saturating_mul(4).div_ceil(SECTOR_SIZE)
    }

    /// Enters a grain whose marker is at `sector`.
    pub(super) fn meet_grain(&mut self, grain: u64, sector: u64) -> Result<()> {
        let sector = u32::try_from(sector)
            .map_err(|_| Error::malformed("a grain is beyond 2 TiB, where no table can list it"))?;
        match &mut self.kind {
            Kind::Front { expected, missing } => {
                let entry = usize::try_from(grain).ok().and_then(|grain| expected.get_mut(grain));
                match entry {
                    Some(entry) if *entry != 0 => {
                        let stated = std::mem::take(entry);
                        *missing -= 1;
                        if stated == sector { Ok(()) } else { Err(contradiction("the grain table")) }
                    }
                    _ => Err(contradiction("the grain table")),
                }
            }
            Kind::Unknown { ended } => {
                *ended = false;
                Ok(())
            }
            Kind::Behind { directory_at: Some(_), .. } => Err(contradiction("a directory before its grain")),
            Kind::Behind { directory, open, .. } => {
                let (index, within) = (grain / self.table_entries, (grain % self.table_entries) as usize);
                if directory.get(index as usize).is_none_or(|sector| *sector != 0) {
                    return Err(contradiction("a grain table before its grain"));
                }
                if open.back().is_none_or(|(last, _)| *last != index) {
                    if open.len() == MAX_OPEN_TABLES {
                        return Err(Error::limit(format!(
                            "more than {MAX_OPEN_TABLES} grain tables are not behind their grains"
                        ))
                        .hint("save the stream to a file first"));
                    }
                    open.push_back((index, vec![0; self.table_entries as usize]));
                }
                if let Some((_, table)) = open.back_mut() {
                    table[within] = sector;
                }
                Ok(())
            }
        }
    }

    /// Compares a table that is at `sector`.
    pub(super) fn meet_table(&mut self, bytes: &[u8], sector: u64) -> Result<()> {
        let (directory, open, empty, directory_at) = match &mut self.kind {
            Kind::Behind { directory, open, empty, directory_at, .. } => {
                (directory, open, empty, directory_at)
            }
            Kind::Unknown { .. } => return Ok(()),
            Kind::Front { .. } => {
                return Err(Error::malformed(
                    "a grain table follows, although the header has the tables in front",
                ));
            }
        };
        if directory_at.is_some() {
            return Err(contradiction("a directory before its table"));
        }
        let sector = u32::try_from(sector).map_err(|_| Error::malformed("a grain table is beyond 2 TiB"))?;
        let found: Vec<u32> = entries(bytes).take(self.table_entries as usize).collect();
        if found.iter().all(|entry| *entry == 0) {
            empty.push(sector);
            let bytes = self.lease.bytes() + 8;
            return self.lease.raise(bytes, "the empty tables of a stream");
        }
        let place = open.iter().position(|(_, table)| *table == found);
        let Some((index, _)) = place.and_then(|place| open.remove(place)) else {
            return Err(contradiction("a grain table"));
        };
        directory[index as usize] = sector;
        Ok(())
    }

    /// Compares the directory, which is at `sector`.
    pub(super) fn meet_directory(&mut self, bytes: &[u8], sector: u64) -> Result<()> {
        let (directory, open, empty, stated_at, directory_at) = match &mut self.kind {
            Kind::Behind { directory, open, empty, stated_at, directory_at, .. } => {
                (directory, open, empty, stated_at, directory_at)
            }
            Kind::Unknown { .. } => return Ok(()),
            Kind::Front { .. } => {
                return Err(Error::malformed("a directory follows, although the header has one in front"));
            }
        };
        let agrees = |(found, expected): (u32, &u32)| {
            found == *expected || *expected == 0 && empty.binary_search(&found).is_ok()
        };
        // A salvage goes on with one that is wrong.
        let is_second = directory_at.replace(sector).is_some();
        if is_second || !open.is_empty() || !entries(bytes).zip(directory.iter()).all(agrees) {
            return Err(contradiction("the grain directory"));
        }
        if stated_at.is_some_and(|stated| stated != sector) {
            return Err(contradiction("the place of the directory in the header"));
        }
        Ok(())
    }

    /// Compares the place of the directory in the footer.
    pub(super) fn meet_footer(&mut self, directory: u64) -> Result<()> {
        match &mut self.kind {
            Kind::Behind { directory_at, has_footer, .. } => {
                *has_footer = true;
                match *directory_at == Some(directory) {
                    true => Ok(()),
                    false => Err(contradiction("the place of the directory in the footer")),
                }
            }
            Kind::Front { .. } | Kind::Unknown { .. } => Ok(()),
        }
    }

    /// Calls `each` with the runs of `grains` that the tables list and that were not met. Returns false if
    /// the tables are not known, and nothing else shows that no grain follows.
    pub(super) fn each_missing(&self, grains: &Range<u64>, each: &mut dyn FnMut(Range<u64>)) -> bool {
        let expected = match &self.kind {
            Kind::Front { expected, .. } => expected,
            Kind::Behind { .. } => return false,
            Kind::Unknown { ended } => return *ended,
        };
        let index = |grain: u64| usize::try_from(grain).unwrap_or(usize::MAX).min(expected.len());
        let (start, end) = (index(grains.start), index(grains.end));
        let mut at = grains.start;
        for run in expected.get(start..end).unwrap_or_default().chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let next = at.saturating_add(run.len() as u64);
            if run.first().is_some_and(|entry| *entry != 0) {
                each(at..next);
            }
            at = next;
        }
        true
    }

    /// True if the tables show that every grain was met even if the stream has no end marker.
    pub(super) fn is_complete_without_end(&self) -> bool {
        matches!(&self.kind, Kind::Front { missing: 0, .. })
    }

    /// Checks at the end marker that nothing is missing.
    pub(super) fn check_complete(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Front { missing: 0, .. } => Ok(()),
            Kind::Front { missing, .. } => Err(Error::corrupt(format!(
                "the stream ends, but {missing} grains of its tables are missing"
            ))
            .remedied_by(Remedy::Salvage("copy it again, or use a backup".into()))),
            Kind::Behind { directory_at: Some(_), has_footer: true, .. } => Ok(()),
            Kind::Unknown { ended } => {
                *ended = true;
                Err(Error::corrupt("the tables of the stream are damaged"))
            }
            Kind::Behind { .. } => Err(Error::corrupt("the stream ends without its directory and footer")
                .remedied_by(Remedy::Salvage("copy it again, or use a backup".into()))),
        }
    }
}
