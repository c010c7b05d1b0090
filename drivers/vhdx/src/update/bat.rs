//! Changed pages of the BAT, and their way through the log into the file.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use imgtool_core::zero::is_zero;
use imgtool_core::{Output, Result};
use uuid::Uuid;

use super::headers::HeaderPair;
use super::successor;
use crate::image::Image;
use crate::layout::bat::ENTRY_LEN;
use crate::layout::log::{LOG_SECTOR, LogPage, encode_entry};

/// Number of BAT entries in a page.
pub(super) const ENTRIES_PER_PAGE: u64 = LOG_SECTOR / ENTRY_LEN;

/// Maximum number of pages in memory: as many as an entry has space for in a log of 1 MiB, the shortest.
const MAX_PAGES: usize = 254;

/// A page of the BAT in memory.
struct Page {
    bytes: Box<LogPage>,
    changed: bool,
}

/// Pages of the BAT in memory.
pub(super) struct BatPages {
    output: Output,
    /// File offset of the BAT.
    start: u64,
    /// Length in bytes of the file, with all blocks to which the pages refer.
    pub(super) file_len: u64,
    pages: BTreeMap<u64, Page>,
}

impl BatPages {
    /// Memory in bytes for the pages, and for the log entry while it is written.
    pub(super) const MEMORY: u64 = 2 * (MAX_PAGES as u64 + 2) * (LOG_SECTOR + 64);

    pub(super) fn new(output: &Output, image: &Image, file_len: u64) -> Self {
        let start = image.regions.bat.file_offset;
        Self { output: output.clone(), start, file_len, pages: BTreeMap::new() }
    }

    /// Returns the position in bytes of the entry at `index` within its page.
    fn position(index: u64) -> usize {
        // Less than 4096.
        (index % ENTRIES_PER_PAGE * ENTRY_LEN) as usize
    }

    /// Returns the entry at `index`.
    pub(super) fn get(&mut self, index: u64, headers: &mut HeaderPair) -> Result<u64> {
        let at = Self::position(index);
        let page = self.page(index / ENTRIES_PER_PAGE, headers)?;
        let bytes = page.bytes[at..at + ENTRY_LEN as usize].try_into();
        Ok(bytes.map_or(0, u64::from_le_bytes))
    }

    /// Replaces the entry at `index`.
    pub(super) fn set(&mut self, index: u64, entry: u64, headers: &mut HeaderPair) -> Result<()> {
        let at = Self::position(index);
        let page = self.page(index / ENTRIES_PER_PAGE, headers)?;
        page.bytes[at..at + ENTRY_LEN as usize].copy_from_slice(&entry.to_le_bytes());
        page.changed = true;
        Ok(())
    }

    /// True if the page in memory that contains the entry at `index` has no present block.
    pub(super) fn is_empty_at(&self, index: u64) -> bool {
        self.pages.get(&(index / ENTRIES_PER_PAGE)).is_some_and(|page| is_zero(&page.bytes[..]))
    }

    fn page(&mut self, number: u64, headers: &mut HeaderPair) -> Result<&mut Page> {
        if !self.pages.contains_key(&number) && self.pages.len() >= MAX_PAGES {
            self.commit(headers)?;
        }
        match self.pages.entry(number) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(new) => {
                let mut bytes = Box::new([0; LOG_SECTOR as usize]);
                self.output.read_exact_at(&mut bytes[..], self.start + number * LOG_SECTOR)?;
                Ok(new.insert(Page { bytes, changed: false }))
            }
        }
    }

    /// Writes the changed pages: into the log, then to their places. Forgets all pages.
    pub(super) fn commit(&mut self, headers: &mut HeaderPair) -> Result<()> {
        let pages: Vec<(u64, Box<LogPage>)> = std::mem::take(&mut self.pages)
            .into_iter()
            .filter(|(_, page)| page.changed)
            .map(|(number, page)| (self.start + number * LOG_SECTOR, page.bytes))
            .collect();
        if pages.is_empty() {
            return Ok(());
        }
        let log_guid = successor(headers.current().file_write_guid, "log");
        let number = headers.current().sequence_number.max(1);
        let entry = encode_entry(log_guid, number, &pages, self.file_len);
        self.output.write_at(&entry, headers.current().log_offset)?;
        // Each change of the header flushes what precedes it.
        headers.change(|header| header.log_guid = log_guid)?;
        for (file_offset, page) in &pages {
            self.output.write_at(&page[..], *file_offset)?;
        }
        headers.change(|header| header.log_guid = Uuid::nil())
    }
}
