//! The file as it is after log replay: the input under an [`Overlay`], and a cache of its tables.
//!
//! The input is opened read-only and never written. Every read of tables and content goes through
//! [`ReplayedFile`], so that no code sees the file as it was before the replay.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use imgtool_toolkit::storage::os::FileRun;
use imgtool_toolkit::{FileRange, RandomInput, Result};

use crate::overlay::Overlay;

/// The file after replay.
pub(crate) struct ReplayedFile {
    input: RandomInput,
    overlay: Overlay,
    /// Bytes.
    len: u64,
    cache: PageCache,
}

impl ReplayedFile {
    /// Lays `overlay` over the input. The file is at least `min_len` bytes long. `depth` counts the images
    /// above this one in a chain.
    pub(crate) fn new(input: RandomInput, overlay: Overlay, min_len: u64, depth: usize) -> Self {
        let len = input.len().max(min_len).max(overlay.end());
        Self { input, overlay, len, cache: PageCache::new(depth) }
    }

    /// Length after replay, bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The input's name, for messages.
    pub(crate) fn path(&self) -> &Path {
        self.input.path()
    }

    /// Size in bytes whose multiples are cheapest to read.
    pub(crate) fn granule(&self) -> u64 {
        self.input.granule()
    }

    /// Fills `buf` from `file_offset` on.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], file_offset: u64) -> Result<()> {
        let end = file_offset.checked_add(buf.len() as u64);
        let stored = self.input.len();
        if end.is_none_or(|end| end > self.len) || self.len == stored {
            // For a range beyond the end, the input makes the error.
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

    /// Reads `len` bytes from `file_offset` on; the caller has bounded `len`.
    pub(crate) fn read_vec(&self, file_offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, file_offset)?;
        Ok(bytes)
    }

    /// The run of data or hole around `file_offset`, which is below the length.
    pub(crate) fn run(&self, file_offset: u64) -> Result<FileRun> {
        self.overlaid_run(file_offset, || self.input.run(file_offset))
    }

    /// Like [`Self::run`], but only as precise as a reader of everything up to `until` needs.
    pub(crate) fn rough_run(&self, file_offset: u64, until: u64) -> Result<FileRun> {
        self.overlaid_run(file_offset, || self.input.rough_run(file_offset, until))
    }

    /// The run around `file_offset`: the input's, cut or replaced by the overlay's pages.
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

    /// The part of the real file that holds a range unchanged, or `None` if the log changes any of it.
    pub(crate) fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        let file: &File = self.input.file()?;
        if range.end > self.input.len() || self.overlay.touches(&range) {
            return None;
        }
        Some(FileRange { file, file_offset: range.start, len: range.end - range.start })
    }

    /// The table page around `file_offset`, from the cache or the file.
    pub(crate) fn table_page(&self, file_offset: u64) -> Result<TablePage> {
        let start = file_offset / TABLE_PAGE_LEN * TABLE_PAGE_LEN;
        if let Some(page) = self.cache.get(start) {
            return Ok(page);
        }
        let len = self.len.saturating_sub(start).min(TABLE_PAGE_LEN);
        let run = self.run(start)?;
        let bytes = if !run.is_data && run.end >= start + len {
            None
        } else {
            let mut bytes = self.read_vec(start, len as usize)?;
            bytes.resize(TABLE_PAGE_LEN as usize, 0);
            (!imgtool_toolkit::zero::is_zero(&bytes)).then(|| Arc::from(bytes))
        };
        let page = TablePage { start, bytes };
        self.cache.put(&page);
        Ok(page)
    }
}

/// Bytes of a table page.
const TABLE_PAGE_LEN: u64 = 64 << 10;
/// Most pages cached for an image without images above it. Our limit: 4 MiB, the BAT of 16 TiB in blocks
/// of 32 MiB, or the active part of any image that is read in order. Images below share it by depth.
const MAX_CACHED_PAGES: usize = 64;
/// Lower bound of the limit for images deep in a chain: one page of the BAT, one of a sector bitmap.
const MIN_CACHED_PAGES: usize = 2;

/// A piece of a table (the BAT or a sector bitmap): [`TABLE_PAGE_LEN`] bytes, aligned to that in the file.
#[derive(Clone)]
pub(crate) struct TablePage {
    /// File offset.
    start: u64,
    /// The bytes; `None` if all are zero.
    bytes: Option<Arc<[u8]>>,
}

impl TablePage {
    /// True if every byte is zero.
    pub(crate) fn is_zero(&self) -> bool {
        self.bytes.is_none()
    }

    /// File offset one past its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + TABLE_PAGE_LEN
    }

    /// True if it holds the byte at `file_offset`.
    pub(crate) fn contains(&self, file_offset: u64) -> bool {
        (self.start..self.end()).contains(&file_offset)
    }

    /// The little-endian number at `file_offset`, a multiple of 8 within the page.
    pub(crate) fn u64_at(&self, file_offset: u64) -> u64 {
        let at = (file_offset - self.start) as usize;
        let bytes = self.bytes.as_deref().and_then(|bytes| bytes.get(at..at + 8));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// The byte at `file_offset`, within the page.
    pub(crate) fn byte_at(&self, file_offset: u64) -> u8 {
        let at = (file_offset - self.start) as usize;
        self.bytes.as_deref().and_then(|bytes| bytes.get(at)).copied().unwrap_or(0)
    }
}

/// The most recently used table pages.
struct PageCache {
    max_pages: usize,
    state: Mutex<CacheState>,
}

#[derive(Default)]
struct CacheState {
    /// Pages by file offset, each with the clock of its last use.
    pages: HashMap<u64, (TablePage, u64)>,
    /// Look-ups so far.
    clock: u64,
}

impl PageCache {
    fn new(depth: usize) -> Self {
        let max_pages = (MAX_CACHED_PAGES / depth.saturating_add(1)).max(MIN_CACHED_PAGES);
        Self { max_pages, state: Mutex::default() }
    }

    fn get(&self, start: u64) -> Option<TablePage> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let (page, last_use) = state.pages.get_mut(&start)?;
        *last_use = clock;
        Some(page.clone())
    }

    fn put(&self, page: &TablePage) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.pages.len() >= self.max_pages {
            let oldest = state.pages.iter().min_by_key(|(_, (_, last_use))| *last_use);
            if let Some(start) = oldest.map(|(&start, _)| start) {
                state.pages.remove(&start);
            }
        }
        let clock = state.clock;
        state.pages.insert(page.start, (page.clone(), clock));
    }
}
