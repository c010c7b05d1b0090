//! The file as it is after its log was replayed: the input under an overlay in memory.
//!
//! The input is opened read-only and never written. Every read of tables and content goes through
//! here, so that nothing can see the file as it was before the replay.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use imgtool_toolkit::storage::os::FileRun;
use imgtool_toolkit::{Error, FileRange, RandomInput, Result};

use crate::layout::log::LOG_SECTOR;

/// Bytes of a page of a log sector.
pub(crate) type Page = [u8; LOG_SECTOR as usize];

/// Most memory for replayed pages. Ours: sixty-four times the log of Hyper-V and QEMU (1 MiB).
const MAX_OVERLAY_PAGES: usize = (64 << 20) / LOG_SECTOR as usize;
/// Fewest that an image far below in a chain may have: 128 KiB, so that 256 images stay within bounds.
const MIN_OVERLAY_PAGES: usize = (128 << 10) / LOG_SECTOR as usize;
/// Most separate zeroed ranges. Ours: far above what a log of 64 MiB would ask for in practice.
const MAX_ZERO_RANGES: usize = 1 << 20;

const REPLAY: &str = "let Hyper-V or 'qemu-img check -r all' replay the log of a copy first";

/// What the log changes.
#[derive(Debug)]
pub(crate) struct Overlay {
    max_pages: usize,
    max_zeros: usize,
    /// Zeroed ranges, start → end, disjoint.
    zeros: BTreeMap<u64, u64>,
    /// Pages by file offset; they hide zeroed ranges.
    pages: BTreeMap<u64, Box<Page>>,
}

impl Overlay {
    /// No change yet. `depth`: images above this one in a chain. Below another image a log is rare, since
    /// nothing writes there: its share falls with the square of the depth, and is 1 MiB in the eighth.
    pub(crate) fn new(depth: usize) -> Self {
        let share = depth.saturating_add(1).saturating_pow(2);
        Self {
            max_pages: (MAX_OVERLAY_PAGES / share).max(MIN_OVERLAY_PAGES),
            max_zeros: (MAX_ZERO_RANGES / share).max(MIN_OVERLAY_PAGES),
            zeros: BTreeMap::new(),
            pages: BTreeMap::new(),
        }
    }

    /// Zeroes a range; earlier pages in it are gone.
    pub(crate) fn zero(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        while let Some((&page, _)) = self.pages.range(range.clone()).next() {
            self.pages.remove(&page);
        }
        let Range { mut start, mut end } = range;
        while let Some((&other_start, &other_end)) = self.zeros.range(..=end).next_back()
            && other_end >= start
        {
            self.zeros.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.zeros.insert(start, end);
        if self.zeros.len() > self.max_zeros {
            let most = self.max_zeros;
            return Err(Error::limit(format!("the log zeroes more than {most} separate ranges")).hint(REPLAY));
        }
        Ok(())
    }

    /// Overwrites a page.
    pub(crate) fn page(&mut self, file_offset: u64, page: Box<Page>) -> Result<()> {
        self.pages.insert(file_offset, page);
        if self.pages.len() > self.max_pages {
            let most = self.max_pages;
            return Err(Error::limit(format!("the log changes more than {most} pages of 4 KiB")).hint(REPLAY));
        }
        Ok(())
    }

    /// One past the last byte that is changed.
    pub(crate) fn end(&self) -> u64 {
        let zeros = self.zeros.last_key_value().map_or(0, |(_, &end)| end);
        let pages = self.pages.last_key_value().map_or(0, |(&start, _)| start.saturating_add(LOG_SECTOR));
        zeros.max(pages)
    }

    /// Changed pages.
    pub(crate) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Changes `buf`, which was read at `position`.
    fn apply(&self, buf: &mut [u8], position: u64) {
        let end = position.saturating_add(buf.len() as u64);
        let index = |at: u64| usize::try_from(at - position).unwrap_or(usize::MAX);
        for (&zero_start, &zero_end) in self.zeros.range(..end).rev() {
            if zero_end <= position {
                break;
            }
            buf[index(zero_start.max(position))..index(zero_end.min(end))].fill(0);
        }
        for (&page_start, page) in self.pages.range(position.saturating_sub(LOG_SECTOR - 1)..end) {
            let (from, to) = (page_start.max(position), (page_start + LOG_SECTOR).min(end));
            if from < to {
                let in_page = (from - page_start) as usize..(to - page_start) as usize;
                buf[index(from)..index(to)].copy_from_slice(&page[in_page]);
            }
        }
    }

    /// Whether anything in the range is changed.
    fn touches(&self, range: &Range<u64>) -> bool {
        let zeroed = self.zeros.range(..range.end).next_back().is_some_and(|(_, &end)| end > range.start);
        zeroed || self.next_page(range.start).is_some_and(|page| page.start < range.end)
    }

    /// The first page that ends behind `position`.
    fn next_page(&self, position: u64) -> Option<Range<u64>> {
        let (&start, _) = self.pages.range(position.saturating_sub(LOG_SECTOR - 1)..).next()?;
        Some(start..start + LOG_SECTOR)
    }
}

/// The file after replay.
pub(crate) struct ReplayedFile {
    input: RandomInput,
    overlay: Overlay,
    len: u64,
    cache: PageCache,
}

impl ReplayedFile {
    /// The input changed by `overlay` and at least `least_len` bytes long. `depth`: images above this one
    /// in a chain.
    pub(crate) fn new(input: RandomInput, overlay: Overlay, least_len: u64, depth: usize) -> Self {
        let len = input.len().max(least_len).max(overlay.end());
        Self { input, overlay, len, cache: PageCache::new(depth) }
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The name for messages.
    pub(crate) fn path(&self) -> &Path {
        self.input.path()
    }

    /// Reading costs least in multiples of this many bytes.
    pub(crate) fn granule(&self) -> u64 {
        self.input.granule()
    }

    /// Fills `buf` from `position`.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let end = position.checked_add(buf.len() as u64);
        let stored = self.input.len();
        if end.is_none_or(|end| end > self.len) || self.len == stored {
            // Also the error of a range that leaves the file.
            self.input.read_exact_at(buf, position)?;
        } else {
            let from_input = usize::try_from(stored.saturating_sub(position)).unwrap_or(usize::MAX);
            let (in_input, behind) = buf.split_at_mut(from_input.min(buf.len()));
            if !in_input.is_empty() {
                self.input.read_exact_at(in_input, position)?;
            }
            behind.fill(0);
        }
        self.overlay.apply(buf, position);
        Ok(())
    }

    /// `len` bytes from `position`; the caller has bounded `len`.
    pub(crate) fn read_vec(&self, position: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, position)?;
        Ok(bytes)
    }

    /// The run of data or hole around `position`, which is below the length.
    pub(crate) fn run(&self, position: u64) -> Result<FileRun> {
        self.run_in_view(position, || self.input.run(position))
    }

    /// The same, exact only as far as it matters to who reads up to `until` at once.
    pub(crate) fn rough_run(&self, position: u64, until: u64) -> Result<FileRun> {
        self.run_in_view(position, || self.input.rough_run(position, until))
    }

    /// The run around `position`, with what stands in the log over what `in_file` says.
    fn run_in_view(&self, position: u64, in_file: impl Fn() -> Result<FileRun>) -> Result<FileRun> {
        let mut run =
            if position < self.input.len() { in_file()? } else { FileRun { end: self.len, is_data: false } };
        if run.end == self.input.len() && !run.is_data {
            run.end = self.len;
        }
        match self.overlay.next_page(position) {
            Some(page) if page.start <= position => Ok(FileRun { end: page.end, is_data: true }),
            Some(page) => Ok(FileRun { end: run.end.min(page.start), ..run }),
            None => Ok(run),
        }
    }

    /// The part of the real file that holds the range as it is.
    pub(crate) fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        let file: &File = self.input.file()?;
        if range.end > self.input.len() || self.overlay.touches(&range) {
            return None;
        }
        Some(FileRange { file, file_offset: range.start, len: range.end - range.start })
    }

    /// The table page around `position`, from memory if it was read lately.
    pub(crate) fn table_page(&self, position: u64) -> Result<TablePage> {
        let start = position / TABLE_PAGE_LEN * TABLE_PAGE_LEN;
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

/// Bytes of a piece of a table (BAT, sector bitmap) that is kept in memory.
pub(crate) const TABLE_PAGE_LEN: u64 = 64 << 10;
/// Pages kept: 4 MiB, divided by the depth for images below others. Ours: the BAT of 16 TiB in blocks of
/// 32 MiB, and the part in use of any image that is read in order.
const CACHED_PAGES: usize = 64;
/// Fewest that are kept: the BAT's and the sector bitmap's.
const MIN_CACHED_PAGES: usize = 2;

/// A piece of a table.
#[derive(Clone)]
pub(crate) struct TablePage {
    start: u64,
    /// `None`: all zero.
    bytes: Option<Arc<[u8]>>,
}

impl TablePage {
    /// Whether every byte is zero.
    pub(crate) fn is_zero(&self) -> bool {
        self.bytes.is_none()
    }

    /// One past its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + TABLE_PAGE_LEN
    }

    /// Whether the byte at `position` is in it.
    pub(crate) fn contains(&self, position: u64) -> bool {
        (self.start..self.end()).contains(&position)
    }

    /// The eight bytes at `position`, a multiple of 8 within the page.
    pub(crate) fn u64_at(&self, position: u64) -> u64 {
        let at = (position - self.start) as usize;
        let bytes = self.bytes.as_deref().and_then(|bytes| bytes.get(at..at + 8));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// The byte at `position`, within the page.
    pub(crate) fn byte_at(&self, position: u64) -> u8 {
        let at = (position - self.start) as usize;
        self.bytes.as_deref().and_then(|bytes| bytes.get(at)).copied().unwrap_or(0)
    }
}

/// The pages used last.
struct PageCache {
    max_pages: usize,
    state: Mutex<CacheState>,
}

#[derive(Default)]
struct CacheState {
    pages: HashMap<u64, (TablePage, u64)>,
    clock: u64,
}

impl PageCache {
    fn new(depth: usize) -> Self {
        let max_pages = (CACHED_PAGES / depth.saturating_add(1)).max(MIN_CACHED_PAGES);
        Self { max_pages, state: Mutex::default() }
    }

    fn get(&self, start: u64) -> Option<TablePage> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let (page, used) = state.pages.get_mut(&start)?;
        *used = clock;
        Some(page.clone())
    }

    fn put(&self, page: &TablePage) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.pages.len() >= self.max_pages {
            let oldest = state.pages.iter().min_by_key(|(_, (_, used))| *used).map(|(&start, _)| start);
            if let Some(oldest) = oldest {
                state.pages.remove(&oldest);
            }
        }
        let clock = state.clock;
        state.pages.insert(page.start, (page.clone(), clock));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Box<Page> {
        Box::new([byte; LOG_SECTOR as usize])
    }

    #[test]
    fn an_image_below_others_may_have_less_log() {
        for (depth, most) in [(0, 16_384), (1, 4096), (7, 256), (22, 32), (255, 32)] {
            let mut overlay = Overlay::new(depth);
            for number in 0..most {
                overlay.page(number * LOG_SECTOR, page(1)).expect("page");
            }
            let error = overlay.page(most * LOG_SECTOR, page(1)).expect_err("one too many");
            assert!(error.to_string().contains(&format!("more than {most} pages")), "{error}");
        }
    }

    #[test]
    fn later_changes_hide_earlier_ones() {
        let mut overlay = Overlay::new(0);
        overlay.page(4096, page(1)).expect("page");
        overlay.page(8192, page(2)).expect("page");
        overlay.zero(0..8192).expect("zero");
        overlay.page(0, page(3)).expect("page");
        overlay.zero(16_384..20_480).expect("zero");
        overlay.zero(8192 + 4096..16_384).expect("zero");
        assert_eq!(overlay.zeros.len(), 2);
        let mut buf = vec![9; 24_576];
        overlay.apply(&mut buf, 0);
        for (index, expected) in
            [(0, 3), (4095, 3), (4096, 0), (8191, 0), (8192, 2), (12_288, 0), (20_480, 9)]
        {
            assert_eq!(buf[index], expected, "byte {index}");
        }
        let mut part = vec![9; 3];
        overlay.apply(&mut part, 4095);
        assert_eq!(part, [3, 0, 0]);
        assert_eq!(overlay.end(), 20_480);
        assert!(overlay.touches(&(20_479..20_480)));
        assert!(!overlay.touches(&(20_480..30_000)));
    }
}
