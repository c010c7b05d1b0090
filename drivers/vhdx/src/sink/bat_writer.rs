//! Writer of the BAT of a new dynamic file, with a limited number of pages in memory.
//!
//! The BAT of a 64 TiB disk with blocks of 1 MiB takes 512 MiB. Content arrives mostly in ascending order, so
//! most pages are written only once; the writer reads a page back from the output if it needs the page again.

use imgtool_core::{Cache, Output, Result, TableMemory};

use crate::layout::bat::{BatEntry, ENTRY_LEN};
use crate::layout::region::Region;

/// Length in bytes of a page.
const PAGE_LEN: u64 = 64 << 10;
/// Maximum number of pages in memory. Our limit: 16 MiB, about the whole BAT of a 64 TiB disk with
/// blocks of 32 MiB.
const MAX_PAGES: u64 = 256;

/// The BAT of one file.
pub(crate) struct BatWriter {
    output: Output,
    region: Region,
    /// Pages in memory by page index.
    pages: Cache<u64, Page>,
    /// By page index: true if the output contains the page. Any other page not in memory is all zeros.
    written: Vec<bool>,
}

/// A page in memory.
struct Page {
    index: u64,
    bytes: Vec<u8>,
}

impl BatWriter {
    /// Creates a BAT of zeros for `region` of `output`, of which at most `memory` bytes are in memory; `None`
    /// for as much as it can use. Writes nothing yet.
    pub(crate) fn new(output: Output, region: Region, memory: Option<u64>) -> Self {
        let pages = u64::from(region.length).div_ceil(PAGE_LEN);
        // At most MAX_PAGES, so it fits.
        let max_pages = memory.map_or(MAX_PAGES, |memory| memory / PAGE_LEN).min(MAX_PAGES) as usize;
        Self { output, region, pages: Cache::new(max_pages), written: vec![false; pages as usize] }
    }

    /// Returns the memory for the pages of a BAT in `region`.
    pub(crate) fn memory(region: Region) -> TableMemory {
        let pages = u64::from(region.length).div_ceil(PAGE_LEN);
        // `written` has a byte for each page.
        let memory = |in_memory: u64| in_memory.min(pages) * PAGE_LEN + pages;
        TableMemory { least: memory(1), most: memory(MAX_PAGES) }
    }

    /// Returns the entry at `bat_index`.
    pub(crate) fn get(&mut self, bat_index: u64) -> Result<BatEntry> {
        self.with_entry(bat_index, |bytes| BatEntry(bytes.try_into().map_or(0, u64::from_le_bytes)))
    }

    /// Sets the entry at `bat_index`.
    pub(crate) fn set(&mut self, bat_index: u64, entry: BatEntry) -> Result<()> {
        self.with_entry(bat_index, |bytes| bytes.copy_from_slice(&entry.0.to_le_bytes()))
    }

    /// Writes the pages in memory, and zeros for pages without entries if the output needs them.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let mut pages: Vec<Page> = std::iter::from_fn(|| self.pages.evict()).map(|(_, page)| page).collect();
        pages.sort_unstable_by_key(|page| page.index);
        for page in &pages {
            self.write_page(page)?;
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

    /// Calls `act` with the bytes of the entry at `bat_index`, and returns its result.
    fn with_entry<T>(&mut self, bat_index: u64, act: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let entry_at = bat_index * ENTRY_LEN;
        let index = entry_at / PAGE_LEN;
        let in_page = (entry_at % PAGE_LEN) as usize..(entry_at % PAGE_LEN + ENTRY_LEN) as usize;
        if let Some(page) = self.pages.get(&index) {
            return Ok(act(&mut page.bytes[in_page]));
        }
        let mut bytes = vec![0; PAGE_LEN as usize];
        if self.written.get(index as usize) == Some(&true) {
            self.output.read_exact_at(&mut bytes, self.region.file_offset + index * PAGE_LEN)?;
        }
        let answer = act(&mut bytes[in_page]);
        if let Some((_, evicted)) = self.pages.insert(index, Page { index, bytes }) {
            self.write_page(&evicted)?;
        }
        Ok(answer)
    }

    /// Writes a page to the output and marks it as written.
    fn write_page(&mut self, page: &Page) -> Result<()> {
        self.output.write_at(&page.bytes, self.region.file_offset + page.index * PAGE_LEN)?;
        if let Some(written) = self.written.get_mut(page.index as usize) {
            *written = true;
        }
        Ok(())
    }
}
