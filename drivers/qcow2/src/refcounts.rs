//! Refcounts of an image: reading them, and computing the space that they need.

use std::collections::BTreeSet;
use std::ops::Range;

use imgtool_core::{Cache, CheckReport, RandomInput, Result};

use crate::layout::entry::{RefcountTableEntry, refcount};
use crate::layout::header::Header;
use crate::layout::table::{decode_table, read_zero_filled};

/// Size in bytes of a page, the unit in which refcount blocks are read. Our choice: small, because the tables
/// of a crafted image may refer to clusters in any order.
const PAGE: u64 = 4096;

/// Maximum number of pages in memory. Our limit: 16 MiB.
const MAX_PAGES: usize = 4096;

/// Refcount of a host cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refcount {
    /// Stored refcount; 0 without a refcount block.
    Known(u64),
    /// The host offset of the refcount block is not aligned to clusters or is too large.
    Unreadable,
}

/// Location and width of the refcounts of an image, within the bounds that the header check enforces.
#[derive(Debug, Clone, Copy)]
pub struct RefcountGeometry {
    table_offset: u64,
    table_clusters: u32,
    cluster_bits: u32,
    order: u32,
}

impl RefcountGeometry {
    /// Takes the geometry from the header.
    pub fn of(header: &Header) -> Self {
        Self {
            table_offset: header.refcount_table_offset,
            table_clusters: header.refcount_table_clusters,
            cluster_bits: header.shape.cluster_bits,
            order: header.refcount_order,
        }
    }
}

/// Refcount table in memory, with cached pages of refcount blocks.
pub struct Refcounts {
    input: RandomInput,
    /// Entries of the refcount table.
    table: Vec<u64>,
    cluster_bits: u32,
    order: u32,
    /// Pages of refcount blocks, by host offset.
    pages: Cache<u64, Vec<u8>>,
}

impl Refcounts {
    /// Reads the refcount table.
    pub fn read(input: &RandomInput, geometry: RefcountGeometry) -> Result<Self> {
        let len = u64::from(geometry.table_clusters) << geometry.cluster_bits;
        // The header check bounds the length to 8 MiB.
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let bytes = read_zero_filled(input, geometry.table_offset, len)?;
        Ok(Self {
            input: input.clone(),
            table: decode_table(&bytes),
            cluster_bits: geometry.cluster_bits,
            order: geometry.order,
            pages: Cache::new(MAX_PAGES),
        })
    }

    /// True if at least `threshold` clusters of the file have a refcount above 0. Reads at most
    /// `max_blocks` refcount blocks.
    pub fn uses_at_least(&self, threshold: u64, max_blocks: u64) -> Result<bool> {
        let file_clusters = self.input.len().div_ceil(self.cluster_size());
        let mut in_use = 0;
        let blocks = self.blocks(file_clusters);
        for (index, block_offset) in
            blocks.into_iter().take(usize::try_from(max_blocks).unwrap_or(usize::MAX))
        {
            let first = index as u64 * self.block_entries();
            let entries = file_clusters.saturating_sub(first).min(self.block_entries());
            let len = self.cluster_size().min(self.input.len() - block_offset);
            // A cluster is at most 2 MiB.
            let bytes = self.input.read_vec(block_offset, len as usize)?;
            in_use +=
                (0..entries).filter(|entry| refcount(&bytes, self.order, *entry as usize) > 0).count() as u64;
            if in_use >= threshold {
                return Ok(true);
            }
        }
        Ok(in_use >= threshold)
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the number of entries in a refcount block.
    fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.order
    }

    /// True if the refcount block at `block_offset` starts beyond the end of the file.
    fn is_outside(&self, block_offset: u64, file_clusters: u64) -> bool {
        block_offset >> self.cluster_bits >= file_clusters
    }

    /// Reports damaged entries of the refcount table.
    pub fn report_damage(&self, file_clusters: u64, report: &mut CheckReport) {
        for (index, entry) in self.table.iter().map(|entry| RefcountTableEntry(*entry)).enumerate() {
            let block_offset = entry.block_offset();
            if entry.reserved() != 0 {
                report.corruption(format!("ERROR refcount table entry {index} has reserved bits set"));
            } else if !block_offset.is_multiple_of(self.cluster_size()) {
                report.corruption(format!(
                    "ERROR refcount block {index} is not cluster aligned, at {block_offset}"
                ));
            } else if block_offset != 0 && self.is_outside(block_offset, file_clusters) {
                report.corruption(format!(
                    "ERROR refcount block {index} is outside the image, at {block_offset}"
                ));
            }
        }
    }

    /// Returns the index and host offset of each refcount block whose table entry is valid.
    pub fn blocks(&self, file_clusters: u64) -> Vec<(usize, u64)> {
        let sound = |entry: &RefcountTableEntry| {
            let block_offset = entry.block_offset();
            block_offset != 0
                && entry.reserved() == 0
                && block_offset.is_multiple_of(self.cluster_size())
                && !self.is_outside(block_offset, file_clusters)
        };
        let entries = self.table.iter().map(|entry| RefcountTableEntry(*entry)).enumerate();
        entries
            .filter(|(_, entry)| sound(entry))
            .map(|(index, entry)| (index, entry.block_offset()))
            .collect()
    }

    /// Returns the indices of the windows, of `window` clusters each, that refcount blocks cover in the file.
    pub fn covered_windows(&self, window: u64, file_clusters: u64) -> BTreeSet<u64> {
        let mut windows = BTreeSet::new();
        for (index, _) in self.table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let first = index as u64 * self.block_entries();
            let end = (first + self.block_entries()).min(file_clusters);
            if first < end {
                windows.extend(first / window..=(end - 1) / window);
            }
        }
        windows
    }

    /// True if no refcount block covers `clusters`, which must not be empty. All refcounts there are then 0.
    pub fn lacks_blocks(&self, clusters: Range<u64>) -> bool {
        let entries = self.block_entries();
        let (first, last) = (clusters.start / entries, (clusters.end - 1) / entries);
        let first = usize::try_from(first).unwrap_or(usize::MAX).min(self.table.len());
        let end = usize::try_from(last + 1).unwrap_or(usize::MAX).min(self.table.len());
        self.table[first..end].iter().all(|entry| RefcountTableEntry(*entry).block_offset() == 0)
    }

    /// Reads the refcount of a host cluster.
    pub fn get(&mut self, cluster: u64) -> Result<Refcount> {
        let entries = self.block_entries();
        let table_entry = usize::try_from(cluster / entries).ok().and_then(|index| self.table.get(index));
        let block_offset = table_entry.map_or(0, |entry| RefcountTableEntry(*entry).block_offset());
        if block_offset == 0 {
            return Ok(Refcount::Known(0));
        }
        // File positions are below 2^63.
        let end = block_offset.checked_add(self.cluster_size()).and_then(|end| i64::try_from(end).ok());
        if !block_offset.is_multiple_of(self.cluster_size()) || end.is_none() {
            return Ok(Refcount::Unreadable);
        }
        let index = cluster % entries;
        let byte = (index << self.order) / 8;
        let page_offset =
            block_offset.checked_add(byte - byte % PAGE).filter(|offset| *offset < self.input.len());
        let Some(page_offset) = page_offset else { return Ok(Refcount::Known(0)) };
        let per_page = (PAGE * 8) >> self.order;
        // Less than the number of entries in a page.
        let within = (index % per_page) as usize;
        if let Some(page) = self.pages.get(&page_offset) {
            return Ok(Refcount::Known(refcount(page, self.order, within)));
        }
        if self.pages.is_full() {
            self.pages.evict_older_half();
        }
        let len = PAGE.min(self.cluster_size()).min(self.input.len() - page_offset);
        let page = self.input.read_vec(page_offset, len as usize)?;
        let found = refcount(&page, self.order, within);
        self.pages.insert(page_offset, page);
        Ok(Refcount::Known(found))
    }
}

/// Returns the numbers of refcount blocks and of refcount table clusters for an image with `counted`
/// other clusters. `block_entries` is the number of entries of a refcount block.
pub fn refcount_clusters(counted: u64, block_entries: u64, cluster_size: u64) -> (u64, u64) {
    let (mut blocks, mut table) = (1, 1);
    // The blocks and the table need refcounts themselves. Both numbers only grow, by less in each round.
    loop {
        let needed_blocks = (counted + blocks + table).div_ceil(block_entries);
        let needed_table = (needed_blocks * 8).div_ceil(cluster_size);
        if (needed_blocks, needed_table) == (blocks, table) {
            return (blocks, table);
        }
        (blocks, table) = (needed_blocks, needed_table);
    }
}
