//! The BAT of a new file: written in pages, of which few are kept in memory.
//!
//! A dense table of 64 TiB in blocks of 1 MiB takes 512 MiB. Content comes mostly in ascending
//! order, so that a page is written once; one that is needed again is read back.

use std::collections::HashMap;

use imgtool_toolkit::{Output, Result};

use crate::layout::bat::{BatEntry, ENTRY_LEN};
use crate::layout::region::Region;

/// Bytes of a page.
const PAGE_LEN: u64 = 64 << 10;
/// Pages kept: 16 MiB, the whole BAT of 64 TiB in blocks of 32 MiB.
const MAX_PAGES: usize = 256;

/// The table of one file.
pub(crate) struct BatWriter {
    output: Output,
    region: Region,
    pages: HashMap<u64, Page>,
    /// Pages that were written; others are zero.
    written: Vec<bool>,
    clock: u64,
}

struct Page {
    bytes: Vec<u8>,
    used: u64,
}

impl BatWriter {
    /// An empty table.
    pub(crate) fn new(output: Output, region: Region) -> Self {
        let pages = u64::from(region.length).div_ceil(PAGE_LEN);
        Self { output, region, pages: HashMap::new(), written: vec![false; pages as usize], clock: 0 }
    }

    /// The entry with this index.
    pub(crate) fn get(&mut self, bat_index: u64) -> Result<BatEntry> {
        let (page, at) = self.page(bat_index)?;
        let entry = page.get(at..at + ENTRY_LEN as usize).and_then(|bytes| bytes.try_into().ok());
        Ok(BatEntry(entry.map_or(0, u64::from_le_bytes)))
    }

    /// Sets the entry with this index.
    pub(crate) fn set(&mut self, bat_index: u64, entry: BatEntry) -> Result<()> {
        let (page, at) = self.page(bat_index)?;
        page[at..at + ENTRY_LEN as usize].copy_from_slice(&entry.0.to_le_bytes());
        Ok(())
    }

    /// Writes what is in memory; zeros for what never was, where the output needs them.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let mut numbers: Vec<u64> = self.pages.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            self.write(number)?;
        }
        if !self.output.needs_zeros() {
            return Ok(());
        }
        for number in 0..self.written.len() {
            if !self.written[number] {
                self.output.write_zeros_at(self.region.file_offset + number as u64 * PAGE_LEN, PAGE_LEN)?;
            }
        }
        Ok(())
    }

    /// The page that holds an entry, and where in it.
    fn page(&mut self, bat_index: u64) -> Result<(&mut [u8], usize)> {
        let position = bat_index * ENTRY_LEN;
        let number = position / PAGE_LEN;
        if !self.pages.contains_key(&number) {
            self.make_room()?;
            let mut bytes = vec![0; PAGE_LEN as usize];
            if self.written.get(number as usize) == Some(&true) {
                self.output.read_exact_at(&mut bytes, self.region.file_offset + number * PAGE_LEN)?;
            }
            self.pages.insert(number, Page { bytes, used: 0 });
        }
        self.clock += 1;
        let page = self.pages.entry(number).or_insert_with(|| Page { bytes: Vec::new(), used: 0 });
        page.used = self.clock;
        Ok((&mut page.bytes, (position % PAGE_LEN) as usize))
    }

    fn make_room(&mut self) -> Result<()> {
        if self.pages.len() < MAX_PAGES {
            return Ok(());
        }
        let oldest = self.pages.iter().min_by_key(|(_, page)| page.used).map(|(&number, _)| number);
        if let Some(oldest) = oldest {
            self.write(oldest)?;
        }
        Ok(())
    }

    fn write(&mut self, number: u64) -> Result<()> {
        if let Some(page) = self.pages.remove(&number) {
            self.output.write_at(&page.bytes, self.region.file_offset + number * PAGE_LEN)?;
            if let Some(written) = self.written.get_mut(number as usize) {
                *written = true;
            }
        }
        Ok(())
    }
}
