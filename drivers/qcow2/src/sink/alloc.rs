//! Allocation of host clusters in a new image: a pointer that only moves forward, and the refcounts of the
//! clusters before it.
//!
//! The allocator keeps the refcounts in memory, encoded, from the first unfinished refcount block on. A block
//! is finished when the pointer has left its range and no more compressed data can be added there. The
//! allocator then writes it at the pointer, so memory contains only a few blocks, whatever the size of the
//! image.

use imgtool_core::{Error, Output, Result};

use crate::layout::MAX_REFCOUNT_TABLE_BYTES;
use crate::layout::entry::{max_refcount, refcount, set_refcount};
use crate::layout::table::{encode_table, write_table};
use crate::refcounts::refcount_clusters;

/// Maximum length in bytes of one write of refcount blocks, unless a block is longer. Our choice: with small
/// clusters, blocks are small.
pub const BATCH_BYTES: usize = 256 << 10;

/// End of the host offsets that fit into L1 and L2 entries, 56 bits. Specification, "L1 table entry".
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Location of the refcount table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountTable {
    /// Host offset of the first byte.
    pub offset: u64,
    /// Length in clusters.
    pub clusters: u64,
}

/// Allocator of host clusters.
#[derive(Debug)]
pub struct Allocator {
    cluster_bits: u32,
    refcount_order: u32,
    /// Length in bytes of one write of refcount blocks.
    batch: usize,
    /// Index of the next free host cluster.
    next: u64,
    /// Host offsets of the refcount blocks written so far.
    written: Vec<u64>,
    /// Encoded refcount blocks from block `written.len()` on.
    tail: Vec<u8>,
    /// Host offset of the end of the latest compressed data, where more may follow; 0 if there is none.
    cursor: u64,
}

impl Allocator {
    /// Creates an allocator with no cluster allocated.
    pub fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        Self {
            cluster_bits,
            refcount_order,
            batch: BATCH_BYTES,
            next: 0,
            written: Vec::new(),
            tail: Vec::new(),
            cursor: 0,
        }
    }

    /// Writes refcount blocks in batches of `batch` bytes.
    #[must_use]
    pub fn with_batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the number of entries in a refcount block.
    fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Returns the index of the first host cluster whose refcount is in `tail`.
    fn tail_start(&self) -> u64 {
        self.written.len() as u64 * self.block_entries()
    }

    /// Returns the host offset of the end of the allocated clusters.
    pub fn end(&self) -> u64 {
        self.next << self.cluster_bits
    }

    /// Allocates `clusters` adjacent clusters with a refcount of one each. Returns their host offset.
    pub fn allocate(&mut self, clusters: u64) -> Result<u64> {
        let first = self.next;
        let end = first.checked_add(clusters).filter(|end| *end <= MAX_HOST_OFFSET >> self.cluster_bits);
        let Some(end) = end else {
            return Err(Error::limit("the image would be larger than 2^56 bytes"));
        };
        self.grow_tail(end);
        let tail_start = self.tail_start();
        for cluster in first..end {
            // `tail` contains every entry up to `end`, so the index fits.
            set_refcount(&mut self.tail, self.refcount_order, (cluster - tail_start) as usize, 1);
        }
        self.next = end;
        Ok(first << self.cluster_bits)
    }

    /// Allocates a run of `clusters` adjacent clusters, however long. Right after the run, writes the
    /// refcount blocks that it fills, so that its refcounts need not fit into memory. Returns its host
    /// offset.
    pub fn allocate_run(&mut self, clusters: u64, output: &Output) -> Result<u64> {
        let first = self.next;
        let end = first.checked_add(clusters).filter(|end| *end <= MAX_HOST_OFFSET >> self.cluster_bits);
        let Some(end) = end else {
            return Err(Error::limit("the image would be larger than 2^56 bytes"));
        };
        let entries = self.block_entries();
        let tail_start = self.tail_start();
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
                let start = tail_start + block * entries;
                self.fill_ones(&mut batch[filled..], first.saturating_sub(start)..entries);
            }
            if batch.len() >= BATCH_BYTES || block + 1 == complete {
                output.write_at(&batch, batch_offset)?;
                batch_offset += batch.len() as u64;
                batch.clear();
            }
        }
        self.tail = known;
        self.next = end;
        let blocks = end << self.cluster_bits;
        self.written.extend((0..complete).map(|block| blocks + (block << self.cluster_bits)));
        let tail_start = self.tail_start();
        self.grow_tail(end.max(tail_start));
        let mut tail = std::mem::take(&mut self.tail);
        self.fill_ones(&mut tail, first.saturating_sub(tail_start)..end.saturating_sub(tail_start));
        self.tail = tail;
        self.allocate(complete)?;
        Ok(first << self.cluster_bits)
    }

    /// Sets the refcounts `entries` of `block` to one.
    fn fill_ones(&self, block: &mut [u8], entries: std::ops::Range<u64>) {
        for entry in entries {
            // Within a block or the tail, which are in memory.
            set_refcount(block, self.refcount_order, entry as usize, 1);
        }
    }

    /// Allocates `len` bytes, less than a cluster, for compressed data. Returns their host offset: right
    /// after the latest compressed data where possible, so that compressed clusters share host clusters.
    pub fn allocate_bytes(&mut self, len: u64) -> Result<u64> {
        let cluster_size = self.cluster_size();
        let within = self.cursor & (cluster_size - 1);
        let cluster = self.cursor >> self.cluster_bits;
        let available = cluster_size - within;
        let adjacent = len <= available || self.next == cluster + 1;
        if within != 0 && adjacent && self.add_reference(cluster) {
            let start = self.cursor;
            if len > available {
                self.allocate(1)?;
            }
            self.cursor = start + len;
            return Ok(start);
        }
        let start = self.allocate(1)?;
        self.cursor = start + len;
        Ok(start)
    }

    /// Adds a reference to `cluster`. Returns false if its refcount was already written or is at its maximum.
    fn add_reference(&mut self, cluster: u64) -> bool {
        let Some(index) =
            cluster.checked_sub(self.tail_start()).and_then(|index| usize::try_from(index).ok())
        else {
            return false;
        };
        let count = refcount(&self.tail, self.refcount_order, index);
        if count >= max_refcount(self.refcount_order) {
            return false;
        }
        set_refcount(&mut self.tail, self.refcount_order, index, count + 1);
        true
    }

    /// Grows `tail` by whole refcount blocks, to cover all clusters below `end`.
    fn grow_tail(&mut self, end: u64) {
        let blocks = (end - self.tail_start()).div_ceil(self.block_entries());
        let len = (blocks as usize) << self.cluster_bits;
        if self.tail.is_empty() {
            // Zeroed by the allocator, so that unused entries of a large block take no memory.
            self.tail = vec![0; len];
        } else if len > self.tail.len() {
            self.tail.resize(len, 0);
        }
    }

    /// Writes finished refcount blocks, in whole batches only.
    pub fn write_finished_blocks(&mut self, output: &Output) -> Result<()> {
        let batch_blocks = (self.batch >> self.cluster_bits).max(1) as u64;
        let batch_entries = batch_blocks * self.block_entries();
        loop {
            let tail_start = self.tail_start();
            if self.next - tail_start < batch_entries {
                return Ok(());
            }
            let cursor_cluster = self.cursor >> self.cluster_bits;
            if self.cursor != 0 && cursor_cluster < tail_start + batch_entries {
                if self.next - tail_start < 2 * batch_entries {
                    return Ok(());
                }
                // The latest compressed data is at least a batch behind: give up the rest of its cluster.
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

    /// Refuses `blocks` refcount blocks if their table would exceed QEMU's limit.
    fn check_table_len(&self, blocks: u64) -> Result<()> {
        if blocks * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::limit(format!(
                "the refcount table would be above {MAX_REFCOUNT_TABLE_BYTES} bytes"
            ))
            .hint("use a larger cluster_size or fewer refcount_bits"));
        }
        Ok(())
    }

    /// Writes the refcount table and the remaining refcount blocks at the end of the file.
    pub fn finish(&mut self, output: &Output) -> Result<RefcountTable> {
        self.finish_before(output, 0).map(|(table, _)| table)
    }

    /// Like [`Allocator::finish`], but allocates `following` more clusters behind them. Also returns their host
    /// offset.
    pub fn finish_before(&mut self, output: &Output, following: u64) -> Result<(RefcountTable, u64)> {
        let written = self.written.len() as u64;
        // `blocks` exceeds `written`: written blocks cover only full ranges, and clusters follow these.
        let (blocks, table_clusters) =
            refcount_clusters(self.next - written + following, self.block_entries(), self.cluster_size());
        self.check_table_len(blocks)?;
        let table_offset = self.allocate(table_clusters + (blocks - written))?;
        let following = self.allocate(following)?;
        let first_block = table_offset + (table_clusters << self.cluster_bits);
        self.grow_tail(blocks * self.block_entries());
        self.written.extend((0..blocks - written).map(|block| first_block + (block << self.cluster_bits)));
        let mut table = Vec::new();
        encode_table(&self.written, &mut table);
        table.resize((table_clusters as usize) << self.cluster_bits, 0);
        write_table(output, &table, table_offset)?;
        write_table(output, &self.tail, first_block)?;
        self.tail = Vec::new();
        Ok((RefcountTable { offset: table_offset, clusters: table_clusters }, following))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use imgtool_testing::conformance::{new_file, scratch};

    use super::*;

    /// Creates an output in a temporary directory, which is removed at once.
    fn output() -> Output {
        new_file(&scratch().path().join("x"))
    }

    /// Reads a refcount back through the refcount table.
    fn stored_refcount(output: &Output, table: RefcountTable, alloc: &Allocator, cluster: u64) -> u64 {
        let mut entry = [0; 8];
        output.read_exact_at(&mut entry, table.offset + cluster / alloc.block_entries() * 8).unwrap();
        let mut block = vec![0; 1 << alloc.cluster_bits];
        output.read_exact_at(&mut block, u64::from_be_bytes(entry)).unwrap();
        refcount(&block, alloc.refcount_order, (cluster % alloc.block_entries()) as usize)
    }

    #[test]
    fn counts_one_reference_per_allocated_cluster() {
        for (cluster_bits, order, clusters) in
            [(9, 4, 100_000), (9, 6, 70_000), (9, 0, 50_000), (12, 4, 3), (16, 3, 0)]
        {
            let output = output();
            let mut alloc = Allocator::new(cluster_bits, order);
            for _ in 0..clusters {
                alloc.allocate(1).unwrap();
                alloc.write_finished_blocks(&output).unwrap();
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
    fn counts_a_long_run_like_single_clusters() {
        for (cluster_bits, order, run) in
            [(9, 4, 1_000_000), (9, 4, 1), (9, 4, 256), (9, 0, 9_000), (16, 4, 40_000)]
        {
            let output = output();
            let mut alloc = Allocator::new(cluster_bits, order);
            alloc.allocate(700).unwrap();
            assert_eq!(alloc.allocate_run(run, &output).unwrap(), 700 << cluster_bits);
            alloc.allocate(300).unwrap();
            alloc.write_finished_blocks(&output).unwrap();
            let table = alloc.finish(&output).unwrap();
            assert!(alloc.next >= 1000 + run);
            for cluster in (0..alloc.next).step_by(if run > 100_000 { 97 } else { 1 }) {
                assert_eq!(stored_refcount(&output, table, &alloc, cluster), 1, "cluster {cluster}");
            }
        }
    }

    #[test]
    fn compressed_data_shares_clusters_up_to_the_maximum_refcount() {
        let mut alloc = Allocator::new(9, 1);
        alloc.allocate(1).unwrap();
        let offsets: Vec<u64> = (0..5).map(|_| alloc.allocate_bytes(100).unwrap()).collect();
        // A refcount of two bits is at most three, so the fourth allocation starts a new cluster.
        assert_eq!(offsets, [512, 612, 712, 1024, 1124]);
        // Data crosses a cluster boundary if the next cluster is free.
        assert_eq!(alloc.allocate_bytes(400).unwrap(), 1224);
        assert_eq!(alloc.allocate_bytes(400).unwrap(), 1624);
        assert_eq!(alloc.next, 4);
        let mut single = Allocator::new(9, 0);
        assert_eq!([single.allocate_bytes(9).unwrap(), single.allocate_bytes(9).unwrap()], [0, 512]);
    }
}
