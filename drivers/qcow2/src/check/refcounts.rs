//! The refcounts as the image has them.

use std::collections::{BTreeSet, HashMap};

use imgtool_toolkit::{CheckReport, RandomInput, Result};

use crate::layout::decode_table;
use crate::layout::entry::{RefcountTableEntry, refcount};
use crate::layout::header::Header;

/// Refcount blocks are read in parts of this many bytes: tables of hostile images jump about.
const PAGE: u64 = 4096;

/// Pages kept. Ours: 16 MiB.
const MAX_PAGES: usize = 4096;

/// One refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refcount {
    /// The number.
    Known(u64),
    /// The refcount block can't be found.
    Unreadable,
}

/// The two-level table.
pub struct Refcounts {
    input: RandomInput,
    table: Vec<u64>,
    cluster_bits: u32,
    order: u32,
    pages: HashMap<u64, Vec<u8>>,
}

impl Refcounts {
    /// Reads the refcount table; the header's check bounded it.
    pub fn read(input: &RandomInput, header: &Header) -> Result<Self> {
        let len = u64::from(header.refcount_table_clusters) * header.shape.cluster_size();
        let bytes =
            input.read_vec(header.refcount_table_offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        Ok(Self {
            input: input.clone(),
            table: decode_table(&bytes),
            cluster_bits: header.shape.cluster_bits,
            order: header.refcount_order,
            pages: HashMap::new(),
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.order
    }

    fn is_outside(&self, block_offset: u64, file_clusters: u64) -> bool {
        block_offset >> self.cluster_bits >= file_clusters
    }

    /// Reports what is wrong with the table's entries.
    pub fn report(&self, file_clusters: u64, report: &mut CheckReport) {
        for (index, entry) in self.table.iter().map(|entry| RefcountTableEntry(*entry)).enumerate() {
            let block = entry.block_offset();
            if entry.reserved() != 0 {
                report.corruption(format!("ERROR refcount table entry {index} has reserved bits set"));
            } else if !block.is_multiple_of(self.cluster_size()) {
                report.corruption(format!("ERROR refcount block {index} is not cluster aligned, at {block}"));
            } else if block != 0 && self.is_outside(block, file_clusters) {
                report.corruption(format!("ERROR refcount block {index} is outside the image, at {block}"));
            }
        }
    }

    /// The places of the refcount blocks that have a sound entry, with their index.
    pub fn blocks(&self, file_clusters: u64) -> Vec<(usize, u64)> {
        let sound = |entry: &RefcountTableEntry| {
            let block = entry.block_offset();
            block != 0
                && entry.reserved() == 0
                && block.is_multiple_of(self.cluster_size())
                && !self.is_outside(block, file_clusters)
        };
        let entries = self.table.iter().map(|entry| RefcountTableEntry(*entry)).enumerate();
        entries
            .filter(|(_, entry)| sound(entry))
            .map(|(index, entry)| (index, entry.block_offset()))
            .collect()
    }

    /// Windows of `window` clusters, within the file, that some refcount block is for.
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

    /// The refcount of a host cluster.
    pub fn get(&mut self, cluster: u64) -> Result<Refcount> {
        let entries = self.block_entries();
        let entry = usize::try_from(cluster / entries).ok().and_then(|index| self.table.get(index));
        let block = entry.map_or(0, |entry| RefcountTableEntry(*entry).block_offset());
        if block == 0 {
            return Ok(Refcount::Known(0));
        }
        if !block.is_multiple_of(self.cluster_size()) {
            return Ok(Refcount::Unreadable);
        }
        let index = cluster % entries;
        let byte = (index << self.order) / 8;
        let page_offset = block.checked_add(byte - byte % PAGE).filter(|offset| *offset < self.input.len());
        let Some(page_offset) = page_offset else { return Ok(Refcount::Known(0)) };
        let per_page = (PAGE * 8) >> self.order;
        if !self.pages.contains_key(&page_offset) {
            if self.pages.len() >= MAX_PAGES {
                self.pages.clear();
            }
            let len = PAGE.min(self.cluster_size()).min(self.input.len() - page_offset);
            let page = self.input.read_vec(page_offset, len as usize)?;
            self.pages.insert(page_offset, page);
        }
        let page = self.pages.get(&page_offset).map(Vec::as_slice).unwrap_or_default();
        // Below the entries of a page.
        Ok(Refcount::Known(refcount(page, self.order, (index % per_page) as usize)))
    }
}
