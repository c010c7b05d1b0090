//! L2 tables of an image in the making: a bounded number in memory, the rest in the file.
//!
//! A table gets its place when it is first written, not when it is first touched: tables that leave
//! memory together stand together, and the data before them is contiguous.

use std::collections::HashMap;

use imgtool_toolkit::{Error, Output, Result};

use super::alloc::Allocator;
use super::write::write_table;
use crate::layout::entry::{L1Entry, Shape};
use crate::layout::{MAX_L1_BYTES, decode_table, encode_table};

/// Bytes of L2 tables in memory. Ours: 128 GiB of disk with clusters of 64 KiB before one has to be
/// written early.
const OPEN_BYTES: u64 = 16 << 20;

/// Bytes in one write of neighbouring tables. Ours.
const WRITE_LEN: usize = 1 << 20;

/// The L1 table and the L2 tables in memory.
pub struct Tables {
    shape: Shape,
    l1: Vec<u64>,
    open: HashMap<u64, OpenTable>,
    max_open: usize,
    clock: u64,
}

struct OpenTable {
    words: Vec<u64>,
    used: u64,
}

impl Tables {
    /// With no entries.
    pub fn new(shape: Shape) -> Self {
        // At least 8 with the largest clusters.
        let max_open = (OPEN_BYTES >> shape.cluster_bits) as usize;
        Self { shape, l1: Vec::new(), open: HashMap::new(), max_open, clock: 0 }
    }

    /// The words of the L2 entry for the cluster at `guest_offset`.
    pub fn entry(&mut self, guest_offset: u64, alloc: &mut Allocator, output: &Output) -> Result<&mut [u64]> {
        let l1_index = guest_offset >> self.shape.l2_reach_bits();
        if !self.open.contains_key(&l1_index) {
            if self.open.len() >= self.max_open {
                self.close_older_half(alloc, output)?;
            }
            let words = self.load(l1_index, output)?;
            self.open.insert(l1_index, OpenTable { words, used: 0 });
        }
        self.clock += 1;
        let words = self.shape.l2_entry_words();
        let index =
            (guest_offset >> self.shape.cluster_bits & (self.shape.l2_entries() - 1)) as usize * words;
        match self.open.get_mut(&l1_index) {
            Some(table) => {
                table.used = self.clock;
                Ok(&mut table.words[index..index + words])
            }
            None => Err(Error::limit("an L2 table is missing")),
        }
    }

    /// An empty table, or the one that was written before.
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

    fn close_older_half(&mut self, alloc: &mut Allocator, output: &Output) -> Result<()> {
        let mut ages: Vec<u64> = self.open.values().map(|table| table.used).collect();
        let middle = ages.len() / 2;
        let median = *ages.select_nth_unstable(middle).1;
        let mut indices: Vec<u64> =
            self.open.iter().filter(|(_, table)| table.used <= median).map(|(index, _)| *index).collect();
        indices.sort_unstable();
        self.close(&indices, alloc, output)
    }

    /// Writes these tables (ascending) and forgets them. They must be in the file before they can be
    /// touched again, so this does not wait for the pipeline.
    fn close(&mut self, indices: &[u64], alloc: &mut Allocator, output: &Output) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let is_new = |l1: &[u64], index: u64| L1Entry(l1[index as usize]).l2_offset() == 0;
        let new = indices.iter().filter(|index| is_new(&self.l1, **index)).count() as u64;
        let mut place = if new > 0 { alloc.allocate(new)? } else { 0 };
        let mut batch = Vec::new();
        let mut batch_offset = 0;
        for index in indices {
            let Some(table) = self.open.remove(index) else { continue };
            // Below the number of L1 entries.
            let entry = &mut self.l1[*index as usize];
            if L1Entry(*entry).l2_offset() == 0 {
                *entry = L1Entry::new(place).0;
                place += cluster_size;
            }
            let offset = L1Entry(*entry).l2_offset();
            if batch_offset + batch.len() as u64 != offset || batch.len() >= WRITE_LEN {
                write_table(output, &batch, batch_offset)?;
                batch.clear();
                batch_offset = offset;
            }
            encode_table(&table.words, &mut batch);
        }
        write_table(output, &batch, batch_offset)
    }

    /// Writes all tables that are in memory; the L1 table for a disk of `virtual_size` bytes.
    pub fn finish(&mut self, virtual_size: u64, alloc: &mut Allocator, output: &Output) -> Result<Vec<u64>> {
        let mut indices: Vec<u64> = self.open.keys().copied().collect();
        indices.sort_unstable();
        self.close(&indices, alloc, output)?;
        let entries = usize::try_from(self.shape.l1_entries(virtual_size)).unwrap_or(usize::MAX);
        if self.l1.len() > entries || entries > (MAX_L1_BYTES / 8) as usize {
            return Err(Error::out_of_bounds(format!(
                "data was written beyond the disk's {virtual_size} bytes"
            )));
        }
        let mut l1 = std::mem::take(&mut self.l1);
        l1.resize(entries, 0);
        Ok(l1)
    }
}
