//! Tables of fixed-width entries in a file: [`PagedTable`] reads one, [`TableWriter`] writes one. Both keep a
//! bounded number of pages in memory, however long the table is.

use std::sync::{Arc, Mutex};

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::input::RandomInput;
use crate::memory::{Lease, Memory, TableMemory};
use crate::output::Output;
use crate::sync::lock;

/// Length in bytes of a page: a multiple of every width of entries.
const PAGE_LEN: u64 = 64 << 10;

/// Maximum number of pages that are cached for the top image of a chain. Our limit: 4 MiB, the block map of a
/// 1 TiB disk with blocks of 1 MiB. An image deeper in the chain gets less.
const MAX_CACHED_PAGES: u64 = 64;

/// Maximum number of pages of a new table in memory. Our limit: 16 MiB, about the whole table of a 64 TiB disk
/// with blocks of 32 MiB and entries of 8 bytes. With blocks of 1 MiB, the table of that disk takes 512 MiB.
const MAX_WRITTEN_PAGES: u64 = 256;

/// A table that is read from a file.
#[derive(Debug)]
pub struct PagedTable {
    input: RandomInput,
    /// File offset of the first entry.
    file_offset: u64,
    /// Length in bytes.
    len: u64,
    /// Pages in memory by page index. A page at the end of the table may be short.
    pages: Mutex<Cache<u64, Arc<[u8]>>>,
    /// Memory for the pages.
    _lease: Lease,
}

impl PagedTable {
    /// Creates a table of `len` bytes at `file_offset`, whose pages borrow from `memory`. `depth` is the number
    /// of images above this one in a chain; the greater it is, the fewer pages are cached.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] if the table exceeds the file; [`crate::ErrorKind::LimitExceeded`] if
    /// `memory` can't lend what the pages need.
    pub fn new(
        input: RandomInput,
        file_offset: u64,
        len: u64,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        if file_offset.checked_add(len).is_none_or(|end| end > input.len()) {
            return Err(Error::corrupt(format!(
                "the table needs {len} bytes at {file_offset}, but the file ends at {}",
                input.len()
            ))
            .path(input.location())
            .at(file_offset)
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        let share = memory.cache_share(MAX_CACHED_PAGES) / (depth as u64).saturating_add(1);
        let max_pages = share.min(len.div_ceil(PAGE_LEN)).max(1);
        let lease = memory.lease(max_pages * PAGE_LEN, "the tables of an image")?;
        // At most MAX_CACHED_PAGES, so it fits.
        let pages = Mutex::new(Cache::new(max_pages as usize));
        Ok(Self { input, file_offset, len, pages, _lease: lease })
    }

    /// Returns the number of entries of `N` bytes.
    pub fn entries<const N: usize>(&self) -> u64 {
        self.len / N as u64
    }

    /// Returns the file offset of the entry at `index`.
    pub fn entry_offset<const N: usize>(&self, index: u64) -> u64 {
        self.file_offset.saturating_add(index.saturating_mul(N as u64))
    }

    /// Returns the bytes of the entry at `index`, and the number of entries from there on, at least 1 and at
    /// most `max`, that have the same bytes. The run may end early, at the end of a page.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] for an index past the end; any error of reading the file.
    pub fn run<const N: usize>(&self, index: u64, max: u64) -> Result<([u8; N], u64)> {
        let past_end = || Error::out_of_bounds(format!("the table has no entry {index}"));
        let at = index.checked_mul(N as u64).ok_or_else(past_end)?;
        let page = match self.cached(at / PAGE_LEN) {
            Some(page) => page,
            None => {
                let zeros = self.hole(at)? / N as u64;
                if zeros > PAGE_LEN / N as u64 {
                    return Ok(([0; N], zeros.min(max.max(1))));
                }
                self.page(at / PAGE_LEN)?
            }
        };
        let rest = page.get((at % PAGE_LEN) as usize..).unwrap_or_default();
        let (entries, _) = rest.as_chunks::<N>();
        let first = *entries.first().ok_or_else(past_end)?;
        let max = usize::try_from(max).unwrap_or(usize::MAX).max(1);
        let equal = entries.iter().take(max).take_while(|entry| **entry == first).count();
        Ok((first, equal as u64))
    }

    fn cached(&self, index: u64) -> Option<Arc<[u8]>> {
        lock(&self.pages).get(&index).map(|page| Arc::clone(page))
    }

    /// Returns the number of bytes from byte `at` of the table to the end of the hole of the file, and at most to
    /// the end of the table; 0 if there is data. A sparse file may have a table of gigabytes that is not stored.
    fn hole(&self, at: u64) -> Result<u64> {
        if at >= self.len {
            return Ok(0);
        }
        let run = self.input.run(self.file_offset + at)?;
        let end = if run.is_data { at } else { run.end.saturating_sub(self.file_offset).min(self.len) };
        Ok(end.saturating_sub(at))
    }

    fn page(&self, index: u64) -> Result<Arc<[u8]>> {
        let start = index.saturating_mul(PAGE_LEN).min(self.len);
        // At most `PAGE_LEN`.
        let len = (self.len - start).min(PAGE_LEN) as usize;
        let page: Arc<[u8]> = Arc::from(self.input.read_vec(self.file_offset + start, len)?);
        lock(&self.pages).insert(index, Arc::clone(&page));
        Ok(page)
    }
}

/// A table that is written to an output. Entries that are not set have a common fill byte.
#[derive(Debug)]
pub struct TableWriter {
    output: Output,
    file_offset: u64,
    /// Length in bytes.
    len: u64,
    /// Value of every byte that is not set.
    fill: u8,
    /// Pages in memory by page index.
    pages: Cache<u64, Vec<u8>>,
    /// By page index: true if the output contains the page. Any other page not in memory has only fill bytes.
    written: Vec<bool>,
}

impl TableWriter {
    /// Creates a table of `len` bytes at `file_offset` of `output`. The writer keeps at most `memory` bytes of
    /// it in memory; `None` for as much as it can use. Writes nothing yet.
    pub fn new(output: Output, file_offset: u64, len: u64, fill: u8, memory: Option<u64>) -> Self {
        let pages = usize::try_from(len.div_ceil(PAGE_LEN)).unwrap_or(usize::MAX);
        let max_pages = memory.map_or(MAX_WRITTEN_PAGES, |memory| memory / PAGE_LEN).min(MAX_WRITTEN_PAGES);
        Self {
            output,
            file_offset,
            len,
            fill,
            // At most MAX_WRITTEN_PAGES, so it fits.
            pages: Cache::new((max_pages as usize).clamp(1, pages.max(1))),
            written: vec![false; pages],
        }
    }

    /// Returns the memory for a table of `len` bytes.
    pub fn memory(len: u64) -> TableMemory {
        let pages = len.div_ceil(PAGE_LEN);
        // `written` has a byte for each page.
        let memory = |in_memory: u64| in_memory.min(pages) * PAGE_LEN + pages;
        TableMemory { least: memory(1), most: memory(MAX_WRITTEN_PAGES) }
    }

    /// Returns the entry of `N` bytes at `index`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] for an index past the end; any error of reading the output.
    pub fn get<const N: usize>(&mut self, index: u64) -> Result<[u8; N]> {
        self.with_entry(index, |entry| *entry)
    }

    /// Sets the entry of `N` bytes at `index`.
    ///
    /// # Errors
    /// Same as [`TableWriter::get`], and any error of writing another page.
    pub fn set<const N: usize>(&mut self, index: u64, bytes: [u8; N]) -> Result<()> {
        self.with_entry(index, |entry| *entry = bytes)
    }

    /// Writes all pages that the output does not contain, except for pages of zeros where the output reads
    /// as zeros anyway.
    ///
    /// # Errors
    /// Any error of writing.
    pub fn finish(&mut self) -> Result<()> {
        let mut pages: Vec<(u64, Vec<u8>)> = self.pages.drain().collect();
        pages.sort_unstable_by_key(|(index, _)| *index);
        for (index, page) in pages {
            self.write_page(index, &page)?;
        }
        if self.fill == 0 && !self.output.needs_zeros() {
            return Ok(());
        }
        for index in 0..self.written.len() as u64 {
            if !self.written[index as usize] {
                self.write_page(index, &self.empty_page(index))?;
            }
        }
        Ok(())
    }

    /// Calls `act` with the bytes of the entry at `index`, and returns its result.
    fn with_entry<const N: usize, T>(
        &mut self,
        index: u64,
        act: impl FnOnce(&mut [u8; N]) -> T,
    ) -> Result<T> {
        let past_end = || Error::out_of_bounds(format!("the table has no entry {index}"));
        let at = index.checked_mul(N as u64).filter(|at| *at < self.len).ok_or_else(past_end)?;
        let page_index = at / PAGE_LEN;
        if self.pages.get(&page_index).is_none() {
            let mut page = self.empty_page(page_index);
            if self.written.get(page_index as usize) == Some(&true) {
                self.output.read_exact_at(&mut page, self.file_offset + page_index * PAGE_LEN)?;
            }
            if let Some((evicted, bytes)) = self.pages.insert(page_index, page) {
                self.write_page(evicted, &bytes)?;
            }
        }
        let page = self.pages.get(&page_index).ok_or_else(past_end)?;
        let entry = page.get_mut((at % PAGE_LEN) as usize..).and_then(|rest| rest.first_chunk_mut::<N>());
        entry.map(act).ok_or_else(past_end)
    }

    fn empty_page(&self, index: u64) -> Vec<u8> {
        // At most `PAGE_LEN`.
        vec![self.fill; (self.len - index * PAGE_LEN).min(PAGE_LEN) as usize]
    }

    fn write_page(&mut self, index: u64, page: &[u8]) -> Result<()> {
        self.output.write_at(page, self.file_offset + index * PAGE_LEN)?;
        if let Some(written) = self.written.get_mut(index as usize) {
            *written = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io;

    use super::*;
    use crate::input::{FileRun, Input, ReadAt};

    /// A file of 1 TiB: a hole, and a last page of ones. Its hole can't be read, to show that nobody does.
    struct Sparse;

    const LEN: u64 = 1 << 40;
    const DATA: u64 = LEN - PAGE_LEN;

    impl ReadAt for Sparse {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            assert!(position >= DATA - PAGE_LEN, "reads at {position}");
            for (at, byte) in buf.iter_mut().enumerate() {
                *byte = u8::from(position + at as u64 >= DATA);
            }
            Ok(())
        }

        fn len(&self) -> u64 {
            LEN
        }

        fn run(&self, position: u64) -> io::Result<FileRun> {
            let is_data = position >= DATA;
            Ok(FileRun { end: if is_data { LEN } else { DATA }, is_data })
        }
    }

    #[test]
    fn a_hole_is_one_run_that_is_not_read() {
        let input = Input::from_read_at("sparse", Arc::new(Sparse)).into_random().unwrap();
        let table = PagedTable::new(input, 8, LEN - 8, 0, &Memory::default()).unwrap();
        assert_eq!(table.run::<8>(0, u64::MAX).unwrap(), ([0; 8], (DATA - 8) / 8));
        assert_eq!(table.run::<8>(5, 7).unwrap(), ([0; 8], 7));
        assert_eq!(table.run::<8>(DATA / 8, 9).unwrap(), ([1; 8], 9));
        // Less than a page of the hole is read with its page.
        assert_eq!(table.run::<8>((DATA - 16) / 8, 9).unwrap(), ([0; 8], 1));
        assert!(table.run::<8>(LEN / 8, 1).is_err());
    }
}
