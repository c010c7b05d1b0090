//! The BAT of a new dynamic file, of which only a few pages are in memory at a time.
//!
//! The BAT of 64 TiB in blocks of 1 MiB takes 512 MiB. Content arrives mostly in ascending order, so most
//! pages are written once; a page that is needed again is read back from the output.

use std::collections::HashMap;

use imgtool_toolkit::{Output, Result};

use crate::layout::bat::{BatEntry, ENTRY_LEN};
use crate::layout::region::Region;

/// Bytes of a page.
const PAGE_LEN: u64 = 64 << 10;
/// Most pages in memory. Our limit: 16 MiB, the whole BAT of 64 TiB in blocks of 32 MiB.
const MAX_PAGES: usize = 256;

/// The BAT of one file.
pub(crate) struct BatWriter {
    output: Output,
    region: Region,
    /// Pages in memory by index.
    pages: HashMap<u64, CachedPage>,
    /// For each page, true if the output holds it; the others are zero.
    written: Vec<bool>,
    /// Look-ups so far.
    clock: u64,
}

/// A page in memory.
struct CachedPage {
    bytes: Vec<u8>,
    /// Clock of the last use.
    last_use: u64,
}

impl BatWriter {
    /// Creates a table of zeros for the BAT region of `output`.
    pub(crate) fn new(output: Output, region: Region) -> Self {
        let pages = u64::from(region.length).div_ceil(PAGE_LEN);
        Self { output, region, pages: HashMap::new(), written: vec![false; pages as usize], clock: 0 }
    }

    /// Returns the entry at `bat_index`.
    pub(crate) fn get(&mut self, bat_index: u64) -> Result<BatEntry> {
        let (page, at) = self.page(bat_index)?;
        let entry = page.get(at..at + ENTRY_LEN as usize).and_then(|bytes| bytes.try_into().ok());
        Ok(BatEntry(entry.map_or(0, u64::from_le_bytes)))
    }

    /// Sets the entry at `bat_index`.
    pub(crate) fn set(&mut self, bat_index: u64, entry: BatEntry) -> Result<()> {
        let (page, at) = self.page(bat_index)?;
        page[at..at + ENTRY_LEN as usize].copy_from_slice(&entry.0.to_le_bytes());
        Ok(())
    }

    /// Writes the pages in memory, and zeros for pages without entries if the output needs them.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let mut indexes: Vec<u64> = self.pages.keys().copied().collect();
        indexes.sort_unstable();
        for index in indexes {
            self.write_page(index)?;
        }
        if !self.output.needs_zeros() {
            return Ok(());
        }
        for (index, written) in (0..).zip(&self.written) {
            if !written {
                self.output.write_zeros_at(self.region.file_offset + index * PAGE_LEN, PAGE_LEN)?;
            }
        }
        Ok(())
    }

    /// Returns the page that holds an entry, and the entry's byte in it.
    fn page(&mut self, bat_index: u64) -> Result<(&mut [u8], usize)> {
        let entry_at = bat_index * ENTRY_LEN;
        let index = entry_at / PAGE_LEN;
        if !self.pages.contains_key(&index) {
            self.evict_if_full()?;
            let mut bytes = vec![0; PAGE_LEN as usize];
            if self.written.get(index as usize) == Some(&true) {
                self.output.read_exact_at(&mut bytes, self.region.file_offset + index * PAGE_LEN)?;
            }
            self.pages.insert(index, CachedPage { bytes, last_use: 0 });
        }
        self.clock += 1;
        let page = self.pages.entry(index).or_insert_with(|| CachedPage { bytes: Vec::new(), last_use: 0 });
        page.last_use = self.clock;
        Ok((&mut page.bytes, (entry_at % PAGE_LEN) as usize))
    }

    /// Writes out the least recently used page if memory is full.
    fn evict_if_full(&mut self) -> Result<()> {
        if self.pages.len() < MAX_PAGES {
            return Ok(());
        }
        let oldest = self.pages.iter().min_by_key(|(_, page)| page.last_use).map(|(&index, _)| index);
        if let Some(index) = oldest {
            self.write_page(index)?;
        }
        Ok(())
    }

    /// Moves a page from memory to the output.
    fn write_page(&mut self, index: u64) -> Result<()> {
        if let Some(page) = self.pages.remove(&index) {
            self.output.write_at(&page.bytes, self.region.file_offset + index * PAGE_LEN)?;
            if let Some(written) = self.written.get_mut(index as usize) {
                *written = true;
            }
        }
        Ok(())
    }
}
