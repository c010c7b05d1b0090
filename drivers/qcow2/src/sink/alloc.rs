//! Host clusters for a new image: a pointer that only moves forward, and the refcounts of what it
//! has passed.
//!
//! Refcounts are kept as the refcount blocks that they will be, from the first block that is not
//! finished. A block is finished when the pointer has left its range and no compressed cluster can
//! be added there; it is then written behind the pointer, so that memory stays at a few blocks
//! whatever the size of the image.

use imgtool_toolkit::{Error, Output, Result};

use super::write::write_table;
use crate::layout::MAX_REFCOUNT_TABLE_BYTES;
use crate::layout::encode_table;
use crate::layout::entry::{refcount, set_refcount};

/// Finished refcount blocks are written in batches of about so many bytes. Ours: with small
/// clusters a block is small too.
const BATCH: usize = 256 << 10;

/// Specification: L1, L2 and refcount offsets have 56 bits.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Where the refcount table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountTable {
    /// Its first byte.
    pub offset: u64,
    /// Its clusters.
    pub clusters: u64,
}

/// The allocator of one image.
#[derive(Debug)]
pub struct Allocator {
    cluster_bits: u32,
    refcount_order: u32,
    /// The next free host cluster.
    next: u64,
    /// Refcount blocks that have their place.
    written: Vec<u64>,
    /// Encoded refcounts from block `written.len()` on.
    tail: Vec<u8>,
    /// Where the next compressed data may go: right behind the last, 0 before the first.
    cursor: u64,
}

impl Allocator {
    /// Nothing is allocated yet.
    pub fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        Self { cluster_bits, refcount_order, next: 0, written: Vec::new(), tail: Vec::new(), cursor: 0 }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of a refcount block.
    fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The first host cluster whose refcount is in `tail`.
    fn base(&self) -> u64 {
        self.written.len() as u64 * self.block_entries()
    }

    /// One past the last allocated byte.
    pub fn end(&self) -> u64 {
        self.next << self.cluster_bits
    }

    /// Takes `clusters` neighbouring clusters, each referenced once; their offset.
    pub fn allocate(&mut self, clusters: u64) -> Result<u64> {
        let first = self.next;
        let end = first.checked_add(clusters).filter(|end| *end <= MAX_HOST_OFFSET >> self.cluster_bits);
        let Some(end) = end else {
            return Err(Error::limit("the image would be larger than 2^56 bytes"));
        };
        self.grow_tail(end);
        let base = self.base();
        for cluster in first..end {
            // `tail` holds every entry up to `end`, so the index fits.
            set_refcount(&mut self.tail, self.refcount_order, (cluster - base) as usize, 1);
        }
        self.next = end;
        Ok(first << self.cluster_bits)
    }

    /// Takes a run of clusters that may be much longer than memory has refcounts for: the refcount
    /// blocks that it fills are written right behind it.
    pub fn allocate_run(&mut self, clusters: u64, output: &Output) -> Result<u64> {
        let first = self.next;
        let end = first.checked_add(clusters).filter(|end| *end <= MAX_HOST_OFFSET >> self.cluster_bits);
        let Some(end) = end else {
            return Err(Error::limit("the image would be larger than 2^56 bytes"));
        };
        let entries = self.block_entries();
        let base = self.base();
        let complete = end / entries - self.written.len() as u64;
        self.check_table_len(self.written.len() as u64 + complete)?;
        let mut known = std::mem::take(&mut self.tail);
        let mut batch = Vec::new();
        let mut batch_offset = end << self.cluster_bits;
        for block in 0..complete {
            let filled = batch.len();
            batch.resize(filled + self.cluster_size() as usize, 0);
            if known.is_empty() {
                self.fill_ones(&mut batch[filled..], 0..entries);
            } else {
                let rest = known.split_off(self.cluster_size() as usize);
                batch[filled..].copy_from_slice(&known);
                known = rest;
                let start = base + block * entries;
                self.fill_ones(&mut batch[filled..], first.saturating_sub(start)..entries);
            }
            if batch.len() >= BATCH || block + 1 == complete {
                output.write_at(&batch, batch_offset)?;
                batch_offset += batch.len() as u64;
                batch.clear();
            }
        }
        self.tail = known;
        self.next = end;
        let blocks = end << self.cluster_bits;
        self.written.extend((0..complete).map(|block| blocks + (block << self.cluster_bits)));
        let base = self.base();
        self.grow_tail(end.max(base));
        let mut tail = std::mem::take(&mut self.tail);
        self.fill_ones(&mut tail, first.saturating_sub(base)..end.saturating_sub(base));
        self.tail = tail;
        self.allocate(complete)?;
        Ok(first << self.cluster_bits)
    }

    fn fill_ones(&self, block: &mut [u8], entries: std::ops::Range<u64>) {
        for entry in entries {
            // Within a block or the tail, which are in memory.
            set_refcount(block, self.refcount_order, entry as usize, 1);
        }
    }

    /// Takes `len` bytes (less than a cluster) for compressed data: right behind the last such data
    /// where possible, so that clusters are shared; their offset.
    pub fn allocate_bytes(&mut self, len: u64) -> Result<u64> {
        let cluster_size = self.cluster_size();
        let within = self.cursor & (cluster_size - 1);
        let cluster = self.cursor >> self.cluster_bits;
        let room = cluster_size - within;
        let adjacent = len <= room || self.next == cluster + 1;
        if within != 0 && adjacent && self.add_reference(cluster) {
            let start = self.cursor;
            if len > room {
                self.allocate(1)?;
            }
            self.cursor = start + len;
            return Ok(start);
        }
        let start = self.allocate(1)?;
        self.cursor = start + len;
        Ok(start)
    }

    /// One more reference to a cluster, unless its refcount can't hold it.
    fn add_reference(&mut self, cluster: u64) -> bool {
        let Some(index) = cluster.checked_sub(self.base()).and_then(|index| usize::try_from(index).ok())
        else {
            return false;
        };
        let count = refcount(&self.tail, self.refcount_order, index);
        let max = if self.refcount_order == 6 { u64::MAX } else { (1 << (1u64 << self.refcount_order)) - 1 };
        if count >= max {
            return false;
        }
        set_refcount(&mut self.tail, self.refcount_order, index, count + 1);
        true
    }

    /// Room in `tail` for all clusters below `end`, in whole blocks.
    fn grow_tail(&mut self, end: u64) {
        let blocks = (end - self.base()).div_ceil(self.block_entries());
        let len = (blocks as usize) << self.cluster_bits;
        if len > self.tail.len() {
            self.tail.resize(len, 0);
        }
    }

    /// Writes the refcount blocks that are finished, when there are enough of them.
    pub fn settle(&mut self, output: &Output) -> Result<()> {
        let batch_blocks = (BATCH >> self.cluster_bits).max(1) as u64;
        let batch_entries = batch_blocks * self.block_entries();
        loop {
            let base = self.base();
            if self.next - base < batch_entries {
                return Ok(());
            }
            let cursor_cluster = self.cursor >> self.cluster_bits;
            if self.cursor != 0 && cursor_cluster < base + batch_entries {
                if self.next - base < 2 * batch_entries {
                    return Ok(());
                }
                // Nothing compressed came for long: give up the rest of that cluster.
                self.cursor = 0;
            }
            let offset = self.allocate(batch_blocks)?;
            let rest = self.tail.split_off((batch_blocks as usize) << self.cluster_bits);
            let blocks = std::mem::replace(&mut self.tail, rest);
            output.write_at(&blocks, offset)?;
            self.written.extend((0..batch_blocks).map(|block| offset + (block << self.cluster_bits)));
            self.check_table_len(self.written.len() as u64)?;
        }
    }

    fn check_table_len(&self, blocks: u64) -> Result<()> {
        if blocks * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::limit(format!(
                "the refcount table would be above {MAX_REFCOUNT_TABLE_BYTES} bytes"
            ))
            .hint("use a larger cluster_size or fewer refcount_bits"));
        }
        Ok(())
    }

    /// Writes the remaining refcount blocks and the refcount table: the last that is allocated.
    pub fn finish(&mut self, output: &Output) -> Result<RefcountTable> {
        let written = self.written.len() as u64;
        let (mut blocks, mut table_clusters) = (written.max(1), 1);
        // Blocks and table count themselves; both only grow, by less each time round.
        loop {
            let total = self.next + (blocks - written) + table_clusters;
            let wanted_blocks = total.div_ceil(self.block_entries()).max(written);
            let wanted_table = (wanted_blocks * 8).div_ceil(self.cluster_size());
            if wanted_blocks <= blocks && wanted_table <= table_clusters {
                break;
            }
            blocks = blocks.max(wanted_blocks);
            table_clusters = table_clusters.max(wanted_table);
        }
        self.check_table_len(blocks)?;
        let table_offset = self.allocate(table_clusters + (blocks - written))?;
        let first_block = table_offset + (table_clusters << self.cluster_bits);
        self.grow_tail(blocks * self.block_entries());
        self.written.extend((0..blocks - written).map(|block| first_block + (block << self.cluster_bits)));
        let mut table = Vec::new();
        encode_table(&self.written, &mut table);
        table.resize((table_clusters as usize) << self.cluster_bits, 0);
        write_table(output, &table, table_offset)?;
        write_table(output, &self.tail, first_block)?;
        self.tail = Vec::new();
        Ok(RefcountTable { offset: table_offset, clusters: table_clusters })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn output() -> Output {
        Output::from_new_file("x", tempfile::tempfile().unwrap())
    }

    /// Reads a refcount back the way a reader finds it.
    fn stored_refcount(output: &Output, table: RefcountTable, alloc: &Allocator, cluster: u64) -> u64 {
        let mut entry = [0; 8];
        output.read_exact_at(&mut entry, table.offset + cluster / alloc.block_entries() * 8).unwrap();
        let mut block = vec![0; 1 << alloc.cluster_bits];
        output.read_exact_at(&mut block, u64::from_be_bytes(entry)).unwrap();
        refcount(&block, alloc.refcount_order, (cluster % alloc.block_entries()) as usize)
    }

    #[test]
    fn every_allocated_cluster_has_one_reference_and_no_other() {
        for (cluster_bits, order, clusters) in
            [(9, 4, 100_000), (9, 6, 70_000), (9, 0, 50_000), (12, 4, 3), (16, 3, 0)]
        {
            let output = output();
            let mut alloc = Allocator::new(cluster_bits, order);
            for _ in 0..clusters {
                alloc.allocate(1).unwrap();
                alloc.settle(&output).unwrap();
            }
            let table = alloc.finish(&output).unwrap();
            for cluster in 0..alloc.next {
                assert_eq!(stored_refcount(&output, table, &alloc, cluster), 1, "cluster {cluster}");
            }
            let covered = alloc.written.len() as u64 * alloc.block_entries();
            for cluster in alloc.next..covered {
                assert_eq!(stored_refcount(&output, table, &alloc, cluster), 0, "cluster {cluster}");
            }
        }
    }

    #[test]
    fn a_long_run_is_counted_like_single_clusters() {
        for (cluster_bits, order, run) in
            [(9, 4, 1_000_000), (9, 4, 1), (9, 4, 256), (9, 0, 9_000), (16, 4, 40_000)]
        {
            let output = output();
            let mut alloc = Allocator::new(cluster_bits, order);
            alloc.allocate(700).unwrap();
            assert_eq!(alloc.allocate_run(run, &output).unwrap(), 700 << cluster_bits);
            alloc.allocate(300).unwrap();
            alloc.settle(&output).unwrap();
            let table = alloc.finish(&output).unwrap();
            assert!(alloc.next >= 1000 + run);
            for cluster in (0..alloc.next).step_by(if run > 100_000 { 97 } else { 1 }) {
                assert_eq!(stored_refcount(&output, table, &alloc, cluster), 1, "cluster {cluster}");
            }
        }
    }

    #[test]
    fn compressed_data_shares_clusters_up_to_the_refcount_maximum() {
        let mut alloc = Allocator::new(9, 1);
        alloc.allocate(1).unwrap();
        let places: Vec<u64> = (0..5).map(|_| alloc.allocate_bytes(100).unwrap()).collect();
        // Two bits count to three; the fourth starts anew.
        assert_eq!(places, [512, 612, 712, 1024, 1124]);
        // Across a cluster boundary, as the next cluster is free.
        assert_eq!(alloc.allocate_bytes(400).unwrap(), 1224);
        assert_eq!(alloc.allocate_bytes(400).unwrap(), 1624);
        assert_eq!(alloc.next, 4);
        let mut single = Allocator::new(9, 0);
        assert_eq!([single.allocate_bytes(9).unwrap(), single.allocate_bytes(9).unwrap()], [0, 512]);
    }
}
