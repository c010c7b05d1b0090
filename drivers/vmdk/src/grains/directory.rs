//! The grain directory of a sparse file: read, compared with its redundant copy, and searched for tables that
//! several entries share.

use std::sync::atomic::Ordering;

use imgtool_core::{Error, ErrorKind, Lease, Memory, RandomInput, Remedy, Result};

use super::{Entries, FileSettings, GrainFile, Place, Shape};
use crate::layout::SECTOR_SIZE;

/// Maximum length of a grain directory in bytes. Our limit: the directory of a 64 TiB disk in SE sparse form.
const MAX_DIRECTORY_LEN: u64 = 32 << 20;

/// Name of the loan of memory for a directory, for messages.
const DIRECTORY: &str = "the grain directory of a VMDK image";

/// Maximum number of entries of the grain directory that share tables whose entries differ. Our limit: an
/// intact image has none, and a crafted file could contain a disk of terabytes in a few KiB.
const MAX_TABLE_SHARES: usize = 1024;

/// Maximum number of tables that several entries share, whatever is in them. Our limit: each of them is read
/// when the file is opened, and an intact image has none.
const MAX_SHARED_TABLES: usize = 16 * MAX_TABLE_SHARES;

/// Reads the directory, and returns it with the memory for it: file offsets, or entries in SE sparse form.
pub(super) fn read(
    input: &RandomInput,
    shape: &Shape,
    settings: FileSettings<'_>,
) -> Result<(Vec<u64>, Lease)> {
    let len = shape.directory_entries.saturating_mul(shape.entries.width());
    if len > MAX_DIRECTORY_LEN {
        return Err(Error::limit(format!(
            "the grain directory has {len} bytes; the limit is {MAX_DIRECTORY_LEN}"
        )));
    }
    let offset = shape.directory.checked_mul(SECTOR_SIZE).ok_or_else(|| {
        Error::malformed(format!("the grain directory is at sector {}, out of bounds", shape.directory))
    })?;
    // The directory is read in one piece, and has 8 bytes an entry in memory.
    let bytes = len + shape.directory_entries * 8;
    let lease = settings.memory.lease(bytes, DIRECTORY)?;
    // At most `MAX_DIRECTORY_LEN`.
    let mut raw = input.read_vec(offset, len as usize)?;
    let mut directory: Vec<u64> = match shape.entries {
        Entries::Sectors { .. } => offsets(&raw).collect(),
        Entries::SeSparse { .. } => raw.as_chunks().0.iter().map(|e| u64::from_le_bytes(*e)).collect(),
    };
    if let Some(copy) = shape.redundant_directory.filter(|copy| *copy != shape.directory) {
        let copy = copy.saturating_mul(SECTOR_SIZE);
        // A copy outside of the file is a finding of the check.
        if copy.checked_add(len).is_some_and(|end| end <= input.len()) {
            match input.read_exact_at(&mut raw, copy) {
                Ok(()) => compare(&mut directory, &raw, offset, settings.salvage)?,
                Err(_) if settings.salvage => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok((directory, lease))
}

/// Entry of a directory that can't be read: no table is there.
pub(super) const LOST: u64 = u64::MAX;

/// Like [`read`], but takes all tables for lost if the directory is damaged. Returns true in this case.
pub(super) fn read_damaged(
    input: &RandomInput,
    shape: &Shape,
    settings: FileSettings<'_>,
) -> Result<(Vec<u64>, Lease, bool)> {
    match read(input, shape, settings) {
        Ok((directory, lease)) => Ok((directory, lease, false)),
        Err(error) if !is_damage(&error) => Err(error),
        Err(_) => {
            let lease = settings.memory.lease(shape.directory_entries.saturating_mul(8), DIRECTORY)?;
            // `read` has checked their number, or failed before it.
            let entries = usize::try_from(shape.directory_entries).unwrap_or(usize::MAX);
            Ok((vec![LOST; entries], lease, true))
        }
    }
}

/// True if an error shows damage of a file, which other parts of it may make good in a salvage.
pub(crate) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed | ErrorKind::Io)
}

/// Decodes entries of 32-bit sectors to file offsets.
fn offsets(raw: &[u8]) -> impl Iterator<Item = u64> {
    raw.as_chunks().0.iter().map(|entry| u64::from(u32::from_le_bytes(*entry)) * SECTOR_SIZE)
}

/// Refuses a directory at file offset `offset` that lacks a table which its redundant copy has, or the other
/// way round: one of them has lost it, and its grains would become holes. A salvage uses the table.
fn compare(directory: &mut [u64], copy: &[u8], offset: u64, salvage: bool) -> Result<()> {
    for ((index, own), copy) in (0u64..).zip(directory).zip(offsets(copy)) {
        if (*own == 0) == (copy == 0) {
            continue;
        }
        if !salvage {
            return Err(Error::malformed(format!(
                "the grain directory and its redundant copy disagree: only one of them has grain table {index}"
            ))
            .at(offset.saturating_add(index * 4))
            .remedied_by(Remedy::Salvage("use a backup".into())));
        }
        *own = copy.max(*own);
    }
    Ok(())
}

/// Content of a grain table that several entries of the directory share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shared {
    /// Every entry has this place, which is no grain of the file.
    Same(Place),
    /// The table can't be read or is not valid.
    Lost,
}

impl GrainFile {
    /// Refuses a directory too many of whose entries share tables. Remembers the other shared tables: they are read
    /// once, however many entries refer to them.
    pub(super) fn check_shares(&mut self, memory: &Memory) -> Result<()> {
        if self.directory.len() <= MAX_TABLE_SHARES {
            return Ok(());
        }
        let mut known = Vec::new();
        let bytes = self.directory.len() as u64 * 16;
        let _lease = memory.lease(bytes, "the check of a grain directory for shared tables")?;
        let tables = self.directory.iter().enumerate().map(|(index, table)| (*table, index as u64));
        let mut sorted: Vec<(u64, u64)> = tables.filter(|(table, _)| *table != 0).collect();
        sorted.sort_unstable();
        let (mut tables, mut sharing) = (0, 0);
        for run in sorted.chunk_by(|a, b| a.0 == b.0).filter(|run| run.len() > 1) {
            let (offset, index) = run[0];
            tables += 1;
            if tables > MAX_SHARED_TABLES {
                return Err(Error::limit(format!(
                    "more than {MAX_SHARED_TABLES} grain tables belong to several entries of the directory"
                ))
                .at(offset));
            }
            match self.shared(index, offset) {
                Some(shared) => known.push((offset, shared)),
                None => sharing += run.len(),
            }
            if sharing > MAX_TABLE_SHARES {
                return Err(Error::malformed(format!(
                    "more than {MAX_TABLE_SHARES} entries of the grain directory share tables"
                ))
                .at(offset));
            }
        }
        let bytes = known.capacity() * size_of::<(u64, Shared)>();
        self.shared_lease = Some(memory.lease(bytes as u64, "the shared grain tables of a VMDK image")?);
        self.shared = known;
        Ok(())
    }

    /// Returns the content of the shared table `index` at `offset`, or `None` if its entries differ or refer to
    /// grains.
    fn shared(&self, index: u64, offset: u64) -> Option<Shared> {
        // The error is reported where the table is used.
        let Ok(places) = self.read_table(index, offset) else { return Some(Shared::Lost) };
        let first = places.first().filter(|first| !matches!(first, Place::At(_)))?;
        places.iter().all(|place| place == first).then_some(Shared::Same(*first))
    }

    /// Returns what the table of the directory entry `index` is known to contain as a whole, without reading it.
    pub(super) fn known_table(&self, index: usize) -> Option<Shared> {
        let offset = *self.directory.get(index)?;
        let end = offset.saturating_add(self.table_entries * self.entries.width());
        if let Some(found) = &self.found {
            let first = (index as u64).saturating_mul(self.table_entries);
            let is_lost = end > self.input.len();
            self.is_rebuilt.fetch_or(is_lost, Ordering::Relaxed);
            return match found.table(index as u64) {
                None if is_lost && found.is_in_gap(first) => Some(Shared::Lost),
                None if is_lost || offset == 0 => Some(Shared::Same(Place::Absent)),
                _ => None,
            };
        }
        let found = self.shared.binary_search_by_key(&offset, |(shared, _)| *shared);
        match found {
            Ok(at) => self.shared.get(at).map(|(_, shared)| *shared),
            Err(_) if offset == 0 => Some(Shared::Same(Place::Absent)),
            Err(_) => (end > self.input.len()).then_some(Shared::Lost),
        }
    }

    /// Returns the number of directory entries from `index` on, at most `max`, whose tables are known to contain
    /// `expected`.
    pub(super) fn known_tables(&self, index: usize, expected: Shared, max: u64) -> u64 {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let rest = self.directory.get(index..).unwrap_or_default();
        let mut last = None;
        let is_expected = |(at, offset): (usize, &u64)| {
            // Neighbours usually share the same table.
            let known = last == Some(*offset) || self.known_table(index + at) == Some(expected);
            last = Some(*offset).filter(|_| known);
            known
        };
        rest.iter().enumerate().take(max).map(is_expected).take_while(|known| *known).count() as u64
    }
}
