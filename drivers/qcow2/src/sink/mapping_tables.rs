//! L1 and L2 tables of a new image: a bounded number of L2 tables is in memory, the rest in the file.
//!
//! A table gets its host offset when it is first written, not when it is first used. Tables that leave
//! memory together are therefore adjacent in the file, and the data before them is contiguous.

use imgtool_core::{Cache, Error, Output, Result};

use super::alloc::Allocator;
use crate::layout::MAX_L1_BYTES;
use crate::layout::entry::{L1Entry, Shape};
use crate::layout::table::{decode_table, encode_table, write_table};

/// Length in bytes at which a batch of adjacent tables is written. Our choice.
const WRITE_LEN: usize = 1 << 20;

/// L1 table, and the L2 tables in memory.
pub struct MappingTables {
    shape: Shape,
    l1: Vec<u64>,
    /// Words of the L2 tables in memory, by L1 index.
    open: Cache<u64, Vec<u64>>,
}

impl MappingTables {
    /// Creates empty tables and keeps at most `max_open` of them in memory.
    pub fn new(shape: Shape, max_open: usize) -> Self {
        Self { shape, l1: Vec::new(), open: Cache::new(max_open) }
    }

    /// Returns the one or two words of the L2 entry for `guest_offset`. Loads its table if necessary, which
    /// may write older tables to `output`.
    pub fn entry(&mut self, guest_offset: u64, alloc: &mut Allocator, output: &Output) -> Result<&mut [u64]> {
        let l1_index = guest_offset >> self.shape.l2_reach_bits();
        let words = self.shape.l2_entry_words();
        let index =
            (guest_offset >> self.shape.cluster_bits & (self.shape.l2_entries() - 1)) as usize * words;
        if self.open.get(&l1_index).is_none() {
            if self.open.is_full() {
                let mut older = self.open.evict_older_half();
                older.sort_unstable_by_key(|(l1_index, _)| *l1_index);
                self.close(older, alloc, output)?;
            }
            let table = self.load(l1_index, output)?;
            self.open.insert(l1_index, table);
        }
        match self.open.get(&l1_index) {
            Some(table) => Ok(&mut table[index..index + words]),
            None => Err(Error::limit("an L2 table is missing")),
        }
    }

    /// Reads back an L2 table that was written early, or creates an empty table.
    fn load(&mut self, l1_index: u64, output: &Output) -> Result<Vec<u64>> {
        let index = usize::try_from(l1_index).unwrap_or(usize::MAX);
        if index >= (MAX_L1_BYTES / 8) as usize {
            return Err(Error::limit(format!(
                "the disk is too large for clusters of {} bytes",
                self.shape.cluster_size()
            ))
            .hint("use a larger cluster_size"));
        }
        if index >= self.l1.len() {
            self.l1.resize(index + 1, 0);
        }
        let cluster_size = self.shape.cluster_size() as usize;
        let offset = L1Entry(self.l1[index]).l2_offset();
        if offset == 0 {
            return Ok(vec![0; cluster_size / 8]);
        }
        let mut bytes = vec![0; cluster_size];
        output.read_exact_at(&mut bytes, offset)?;
        Ok(decode_table(&bytes))
    }

    /// Writes `tables`, which have left memory and are sorted by L1 index. Bypasses the pipeline, because the
    /// next use of a table reads it back.
    fn close(&mut self, tables: Vec<(u64, Vec<u64>)>, alloc: &mut Allocator, output: &Output) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let is_new = |l1: &[u64], index: u64| L1Entry(l1[index as usize]).l2_offset() == 0;
        let new = tables.iter().filter(|(index, _)| is_new(&self.l1, *index)).count() as u64;
        let mut next_offset = if new > 0 { alloc.allocate(new)? } else { 0 };
        let mut batch = Vec::new();
        let mut batch_offset = 0;
        for (index, words) in tables {
            // `load` has grown the L1 table to include the index.
            let entry = &mut self.l1[index as usize];
            if L1Entry(*entry).l2_offset() == 0 {
                *entry = L1Entry::new(next_offset).0;
                next_offset += cluster_size;
            }
            let offset = L1Entry(*entry).l2_offset();
            if batch_offset + batch.len() as u64 != offset || batch.len() >= WRITE_LEN {
                write_table(output, &batch, batch_offset)?;
                batch.clear();
                batch_offset = offset;
            }
            encode_table(&words, &mut batch);
        }
        write_table(output, &batch, batch_offset)
    }

    /// Writes all tables that are in memory. Returns the L1 table for a disk of `virtual_size` bytes.
    pub fn finish(&mut self, virtual_size: u64, alloc: &mut Allocator, output: &Output) -> Result<Vec<u64>> {
        let mut open: Vec<_> = self.open.drain().collect();
        open.sort_unstable_by_key(|(l1_index, _)| *l1_index);
        self.close(open, alloc, output)?;
        let entries = usize::try_from(self.shape.l1_entries(virtual_size)).unwrap_or(usize::MAX);
        if self.l1.len() > entries || entries > (MAX_L1_BYTES / 8) as usize {
            return Err(Error::out_of_bounds(format!(
                "data was written beyond the disk of {virtual_size} bytes"
            )));
        }
        let mut l1 = std::mem::take(&mut self.l1);
        l1.resize(entries, 0);
        Ok(l1)
    }
}
