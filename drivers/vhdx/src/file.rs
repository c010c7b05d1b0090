//! [`ReplayedFile`]: the file as log replay would leave it, with a cache for its tables.
//!
//! The driver never writes to the input. It reads tables and content only through [`ReplayedFile`], which
//! applies the [`Overlay`] of replayed changes, so no reader sees the file as it was before the replay.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::layered::StoredBytes;
use imgtool_core::sync::lock;
use imgtool_core::zero::is_zero;
use imgtool_core::{Cache, Error, FileRange, FileRun, Lease, Location, Memory, Output, RandomInput, Result};

use crate::layout::log::LOG_SECTOR;
use crate::overlay::Overlay;

/// The file after log replay.
pub(crate) struct ReplayedFile {
    input: RandomInput,
    overlay: Overlay,
    /// Length in bytes after replay.
    len: u64,
    /// Table pages by file offset.
    pages: Mutex<Cache<u64, TablePage>>,
    /// Memory for the pages and the overlay.
    _lease: Lease,
}

impl ReplayedFile {
    /// Combines the input with `overlay`; the file is at least `min_len` bytes long. `depth` is the number of
    /// images above this one in a chain; the greater it is, the fewer pages are cached.
    ///
    /// # Errors
    /// `LimitExceeded` if `memory` can't lend what the pages and the overlay need.
    pub(crate) fn new(
        input: RandomInput,
        overlay: Overlay,
        min_len: u64,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let len = input.len().max(min_len).max(overlay.end());
        let share = memory.cache_share(MAX_CACHED_PAGES) / (depth as u64).saturating_add(1);
        let max_pages = share.max(MIN_CACHED_PAGES);
        let bytes = max_pages * TABLE_PAGE_LEN + overlay.memory();
        let lease = memory.lease(bytes, "the tables and the log of a VHDX image")?;
        // At most MAX_CACHED_PAGES, so it fits.
        let pages = Mutex::new(Cache::new(max_pages as usize));
        Ok(Self { input, overlay, len, pages, _lease: lease })
    }

    /// Makes the changes of the log in the file itself, which `output` writes.
    pub(crate) fn apply_log(&self, output: &Output) -> Result<()> {
        if output.capacity().is_none() && self.len > self.input.len() {
            output.set_len(self.len)?;
        }
        self.overlay.write(output)
    }

    /// Returns the length in bytes after replay.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Reads `len` bytes from `file_offset` on. The caller must bound `len`.
    pub(crate) fn read_vec(&self, file_offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, file_offset)?;
        Ok(bytes)
    }

    /// Returns the run that contains `file_offset`: the input's run, cut before the next overwritten page of
    /// the overlay or replaced by it. Zeroed ranges of the overlay are reported as the input has them.
    fn overlaid_run(&self, file_offset: u64, input_run: impl Fn() -> Result<FileRun>) -> Result<FileRun> {
        let mut run = if file_offset < self.input.len() {
            input_run()?
        } else {
            FileRun { end: self.len, is_data: false }
        };
        if run.end == self.input.len() && !run.is_data {
            run.end = self.len;
        }
        match self.overlay.next_page(file_offset) {
            Some(page) if page.start <= file_offset => Ok(FileRun { end: page.end, is_data: true }),
            Some(page) => Ok(FileRun { end: run.end.min(page.start), ..run }),
            None => Ok(run),
        }
    }

    /// Returns the table page that contains `file_offset`, from the cache or the file.
    pub(crate) fn table_page(&self, file_offset: u64) -> Result<TablePage> {
        let start = file_offset / TABLE_PAGE_LEN * TABLE_PAGE_LEN;
        if let Some(page) = lock(&self.pages).get(&start) {
            return Ok(page.clone());
        }
        let len = self.len.saturating_sub(start).min(TABLE_PAGE_LEN);
        let run = self.run(start)?;
        let bytes = if !run.is_data && run.end >= start + len {
            None
        } else {
            let mut bytes = self.read_vec(start, len as usize)?;
            bytes.resize(TABLE_PAGE_LEN as usize, 0);
            (!is_zero(&bytes)).then(|| Arc::from(bytes))
        };
        let page = TablePage { start, bytes };
        lock(&self.pages).insert(start, page.clone());
        Ok(page)
    }
}

impl StoredBytes for ReplayedFile {
    fn location(&self) -> &Location {
        self.input.location()
    }

    /// Fills `buf` with the file's bytes from `file_offset` on. The file may be longer after replay than the
    /// input; the added bytes are zeros, except where the overlay changes them.
    fn read_exact_at(&self, buf: &mut [u8], file_offset: u64) -> Result<()> {
        let end = file_offset.checked_add(buf.len() as u64);
        let stored = self.input.len();
        if end.is_none_or(|end| end > self.len) || self.len == stored {
            // The input contains all of these bytes, or returns the error for a range past the end.
            self.input.read_exact_at(buf, file_offset)?;
        } else {
            let from_input = usize::try_from(stored.saturating_sub(file_offset)).unwrap_or(usize::MAX);
            let (in_input, behind) = buf.split_at_mut(from_input.min(buf.len()));
            if !in_input.is_empty() {
                self.input.read_exact_at(in_input, file_offset)?;
            }
            behind.fill(0);
        }
        self.overlay.apply(buf, file_offset);
        Ok(())
    }

    /// Does not count what the overlay replaces as lost: both a sector of the log and one of a salvage have 4 KiB.
    fn read_salvage(&self, buf: &mut [u8], file_offset: u64, lost: &mut dyn FnMut(Range<usize>, Error)) {
        let end = file_offset.checked_add(buf.len() as u64);
        let in_file = if end.is_none_or(|end| end > self.len) {
            buf.len()
        } else {
            let stored = self.input.len().saturating_sub(file_offset);
            usize::try_from(stored).unwrap_or(usize::MAX).min(buf.len())
        };
        let (in_input, behind) = buf.split_at_mut(in_file);
        self.input.read_salvage(in_input, file_offset, |range, error| {
            // The range exists only if the offset plus its bounds fits.
            let [start, end] = [range.start, range.end].map(|at| file_offset.saturating_add(at as u64));
            if end - start > LOG_SECTOR || !self.overlay.touches(&(start..end)) {
                lost(range, error);
            }
        });
        behind.fill(0);
        self.overlay.apply(buf, file_offset);
    }

    fn run(&self, file_offset: u64) -> Result<FileRun> {
        self.overlaid_run(file_offset, || self.input.run(file_offset))
    }

    fn rough_run(&self, file_offset: u64, until: u64) -> Result<FileRun> {
        self.overlaid_run(file_offset, || self.input.rough_run(file_offset, until))
    }

    /// Returns `range` as a range of the input file. Returns `None` if the overlay changes any of it, if it
    /// ends past the input, or if the input is not a plain file.
    fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        let file: &File = self.input.file()?;
        if range.end > self.input.len() || self.overlay.touches(&range) {
            return None;
        }
        Some(FileRange { file, file_offset: range.start, len: range.end - range.start })
    }

    fn granule(&self) -> u64 {
        self.input.granule()
    }
}

/// Length in bytes of a table page.
const TABLE_PAGE_LEN: u64 = 64 << 10;
/// Maximum number of pages cached for the top image of a chain. Our limit: 4 MiB, about the whole BAT of a
/// 16 TiB disk with blocks of 32 MiB; sequential reads need less. An image deeper in the chain gets less.
const MAX_CACHED_PAGES: u64 = 64;
/// Minimum of that limit, for images deep in a chain: one page of the BAT and one of a sector bitmap.
const MIN_CACHED_PAGES: u64 = 2;

/// A page of a table (the BAT or a sector bitmap): [`TABLE_PAGE_LEN`] bytes at a file offset that is a
/// multiple of this length. Bytes past the end of the file are zeros.
#[derive(Clone)]
pub(crate) struct TablePage {
    /// File offset of the first byte.
    start: u64,
    /// The bytes; `None` if all are zero.
    bytes: Option<Arc<[u8]>>,
}

impl TablePage {
    /// True if every byte is zero.
    pub(crate) fn is_zero(&self) -> bool {
        self.bytes.is_none()
    }

    /// Returns the file offset one past the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + TABLE_PAGE_LEN
    }

    /// True if the page contains the byte at `file_offset`.
    pub(crate) fn contains(&self, file_offset: u64) -> bool {
        (self.start..self.end()).contains(&file_offset)
    }

    /// Returns the little-endian number at `file_offset`, which must be a multiple of 8 within the page.
    pub(crate) fn u64_at(&self, file_offset: u64) -> u64 {
        let at = (file_offset - self.start) as usize;
        let bytes = self.bytes.as_deref().and_then(|bytes| bytes.get(at..at + 8));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// Returns the byte at `file_offset`, which must be within the page.
    pub(crate) fn byte_at(&self, file_offset: u64) -> u8 {
        let at = (file_offset - self.start) as usize;
        self.bytes.as_deref().and_then(|bytes| bytes.get(at)).copied().unwrap_or(0)
    }
}
