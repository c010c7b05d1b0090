//! L1 and L2 tables of an existing image, changed in copies.
//!
//! A changed L2 table is written to a new cluster. The image refers to it only once [`ShadowTables::switch`]
//! has replaced the L1 entry, so every earlier moment leaves the old tables whole.

use imgtool_core::{Cache, Error, Lease, Memory, Output, Result};

use super::refcounts::{Clusters, RefcountEditor};
use crate::layout::entry::{L1Entry, L2Entry, Shape};
use crate::layout::header::{Header, INCOMPATIBLE_DATA_FILE};
use crate::layout::table::{decode_table, encode_table};

/// Memory in bytes for L2 tables, unless two tables are larger. Our choice, as for a new image.
const CACHE_BYTES: u64 = 8 << 20;

/// Minimum number of L2 tables in memory.
const MIN_TABLES: u64 = 2;

/// One or two words of an L2 entry; the second is 0 without extended L2 entries.
pub type Words = [u64; 2];

/// An L2 table in memory.
struct Table {
    words: Vec<u64>,
    changed: bool,
}

/// Tables of an image, and the copies of those that changed.
pub struct ShadowTables {
    output: Output,
    shape: Shape,
    /// True if guest data is in a data file, whose clusters have no refcounts.
    external_data: bool,
    l1_offset: u64,
    /// L1 table as the file has it.
    old: Vec<u64>,
    /// L1 table with the copies.
    new: Vec<u64>,
    open: Cache<usize, Table>,
    _lease: Lease,
}

impl ShadowTables {
    /// Reads the L1 table. The header check bounds it to 32 MiB.
    pub fn open(output: &Output, header: &Header, memory: &Memory) -> Result<Self> {
        let shape = header.shape;
        let len = u64::from(header.l1_entries) * 8;
        let tables = (CACHE_BYTES >> shape.cluster_bits).max(MIN_TABLES);
        let needed = shape.l1_entries(header.virtual_size).clamp(1, tables);
        // The file's table, the new one, and both in bytes while they are read or written.
        let cost = (len * 4).saturating_add((needed + 2) << shape.cluster_bits);
        let lease = memory.lease(cost, "the tables of a qcow2 image")?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        output.read_exact_at(&mut bytes, header.l1_offset)?;
        let old = decode_table(&bytes);
        Ok(Self {
            output: output.clone(),
            shape,
            external_data: header.has(INCOMPATIBLE_DATA_FILE),
            l1_offset: header.l1_offset,
            new: old.clone(),
            old,
            open: Cache::new(usize::try_from(needed).unwrap_or(usize::MAX)),
            _lease: lease,
        })
    }

    fn l1_index(&self, guest_offset: u64) -> Result<usize> {
        let index = usize::try_from(guest_offset >> self.shape.l2_reach_bits()).ok();
        index.filter(|index| *index < self.old.len()).ok_or_else(|| {
            Error::out_of_bounds("a guest offset is after the end of the L1 table")
                .path(self.output.location())
        })
    }

    /// True if no L2 table describes `guest_offset`.
    pub fn is_empty_at(&mut self, guest_offset: u64) -> Result<bool> {
        let index = self.l1_index(guest_offset)?;
        Ok(L1Entry(self.new[index]).l2_offset() == 0 && self.open.get(&index).is_none())
    }

    /// Returns the L1 table as the file has it.
    pub fn l1(&self) -> &[u64] {
        &self.old
    }

    /// Empties the entries of all clusters that start at or after `size` bytes.
    pub fn empty_from(&mut self, size: u64, refcounts: &mut RefcountEditor) -> Result<()> {
        let reach = 1u64 << self.shape.l2_reach_bits();
        let first_table = usize::try_from(size.div_ceil(reach)).unwrap_or(usize::MAX);
        let mut cluster = size.next_multiple_of(self.shape.cluster_size());
        while cluster < size.next_multiple_of(reach) && !self.is_empty_at(cluster)? {
            if self.get(cluster, refcounts)? != [0, 0] {
                self.set(cluster, [0, 0], refcounts)?;
            }
            cluster += self.shape.cluster_size();
        }
        self.new.iter_mut().skip(first_table).for_each(|entry| *entry = 0);
        Ok(())
    }

    /// Returns the position of the entry for `guest_offset` in the words of its table.
    fn position(&self, guest_offset: u64) -> usize {
        let cluster = guest_offset >> self.shape.cluster_bits & (self.shape.l2_entries() - 1);
        // An L2 table has at most 2^18 words.
        cluster as usize * self.shape.l2_entry_words()
    }

    /// Returns the L2 entry for `guest_offset`.
    pub fn get(&mut self, guest_offset: u64, refcounts: &mut RefcountEditor) -> Result<Words> {
        let at = self.position(guest_offset);
        let extended = self.shape.extended_l2;
        let table = self.table(self.l1_index(guest_offset)?, refcounts)?;
        Ok([table.words[at], if extended { table.words[at + 1] } else { 0 }])
    }

    /// Replaces the L2 entry for `guest_offset`.
    pub fn set(&mut self, guest_offset: u64, words: Words, refcounts: &mut RefcountEditor) -> Result<()> {
        let at = self.position(guest_offset);
        let extended = self.shape.extended_l2;
        let table = self.table(self.l1_index(guest_offset)?, refcounts)?;
        table.words[at] = words[0];
        if extended {
            table.words[at + 1] = words[1];
        }
        table.changed = true;
        Ok(())
    }

    fn table(&mut self, index: usize, refcounts: &mut RefcountEditor) -> Result<&mut Table> {
        if self.open.get(&index).is_none() {
            if self.open.is_full() {
                let older = self.open.evict_older_half();
                self.write(older, refcounts)?;
            }
            let words = self.read(L1Entry(self.new[index]))?;
            self.open.insert(index, Table { words, changed: false });
        }
        self.open.get(&index).ok_or_else(|| Error::limit("an L2 table is missing"))
    }

    /// Reads the L2 table of an L1 entry; an empty table if it has none.
    fn read(&self, entry: L1Entry) -> Result<Vec<u64>> {
        let cluster_size = self.shape.cluster_size() as usize;
        if entry.l2_offset() == 0 {
            return Ok(vec![0; cluster_size / 8]);
        }
        let mut bytes = vec![0; cluster_size];
        self.output.read_exact_at(&mut bytes, entry.l2_offset())?;
        Ok(decode_table(&bytes))
    }

    /// Writes the changed ones of `tables` into their copies.
    fn write(&mut self, mut tables: Vec<(usize, Table)>, refcounts: &mut RefcountEditor) -> Result<()> {
        tables.retain(|(_, table)| table.changed);
        tables.sort_unstable_by_key(|(index, _)| *index);
        for (index, table) in tables {
            if self.new[index] == self.old[index] {
                self.new[index] = L1Entry::new(refcounts.allocate()?).0;
            }
            let mut bytes = Vec::new();
            encode_table(&table.words, &mut bytes);
            self.output.write_at(&bytes, L1Entry(self.new[index]).l2_offset())?;
        }
        Ok(())
    }

    /// Writes all changed tables.
    pub fn write_changed(&mut self, refcounts: &mut RefcountEditor) -> Result<()> {
        let all = self.open.drain().collect();
        self.write(all, refcounts)
    }

    /// Replaces the L1 entries of all tables with a copy. Every entry is whole in every sector, so a crash
    /// leaves each of them old or new.
    pub fn switch(&self) -> Result<()> {
        let changed = |index: &usize| self.new[*index] != self.old[*index];
        let Some(first) = (0..self.new.len()).find(changed) else { return Ok(()) };
        let last = (0..self.new.len()).rfind(changed).unwrap_or(first);
        let mut bytes = Vec::new();
        encode_table(&self.new[first..=last], &mut bytes);
        self.output.write_at(&bytes, self.l1_offset + first as u64 * 8)
    }

    /// Releases the clusters to which only replaced tables refer, and these tables themselves.
    pub fn release_replaced(&self, refcounts: &mut RefcountEditor) -> Result<()> {
        for (old, new) in self.old.iter().zip(&self.new).filter(|(old, new)| old != new) {
            let old = L1Entry(*old);
            if old.l2_offset() == 0 {
                continue;
            }
            let (before, after) = (self.read(old)?, self.read(L1Entry(*new))?);
            let words = self.shape.l2_entry_words();
            for (before, after) in before.chunks(words).zip(after.chunks(words)) {
                let (before, after) = (L2Entry(before[0]), L2Entry(after[0]));
                if self.clusters(before) != self.clusters(after) {
                    self.clusters(before).map_or(Ok(()), |clusters| refcounts.release(clusters))?;
                }
            }
            refcounts.release(Clusters { offset: old.l2_offset(), count: 1 })?;
        }
        Ok(())
    }

    /// Returns the clusters of the image to which an L2 entry refers, if any.
    fn clusters(&self, entry: L2Entry) -> Option<Clusters> {
        if self.external_data {
            return None;
        }
        if !entry.is_compressed() {
            return (entry.host_offset() != 0).then(|| Clusters { offset: entry.host_offset(), count: 1 });
        }
        let range = entry.compressed_range(self.shape);
        // Both are below 2^62. The range ends with its last sector.
        let last = range.host_offset + range.max_len - 1;
        let first = range.host_offset >> self.shape.cluster_bits;
        let count = (last >> self.shape.cluster_bits) - first + 1;
        Some(Clusters { offset: first << self.shape.cluster_bits, count })
    }
}
