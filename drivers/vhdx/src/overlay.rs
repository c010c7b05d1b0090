//! The changes that log replay makes to the file, kept in memory and applied to the bytes read from it.

use std::collections::BTreeMap;
use std::ops::Range;

use imgtool_core::{Error, Output, Result};

use crate::layout::log::{LOG_SECTOR, LogPage};

/// Maximum number of pages in memory. Our limit: 64 MiB, sixty-four times the default log of Hyper-V and
/// QEMU (1 MiB).
const MAX_PAGES: usize = (64 << 20) / LOG_SECTOR as usize;
/// Minimum of the limits on pages and on zeroed ranges, for images deep in a chain. Our limit: 128 KiB of
/// pages, which bounds the memory of a chain of 256 images.
const MIN_PAGES: usize = (128 << 10) / LOG_SECTOR as usize;
/// Maximum number of separate zeroed ranges. Our limit: far more than a log of 64 MiB needs in practice.
const MAX_ZERO_RANGES: usize = 1 << 20;

const REPLAY_HINT: &str = "let Hyper-V or 'qemu-img check -r all' replay the log of a copy first";

/// Changes to a file: zeroed ranges and overwritten pages.
#[derive(Debug)]
pub(crate) struct Overlay {
    max_pages: usize,
    max_zero_ranges: usize,
    /// Zeroed ranges of the file, disjoint: maps the file offset of each start to the file offset of the end.
    zeros: BTreeMap<u64, u64>,
    /// Overwritten pages by file offset. They take precedence over zeroed ranges.
    pages: BTreeMap<u64, Box<LogPage>>,
}

impl Overlay {
    /// Creates an overlay without changes. `depth` is the number of images above this one in a chain. Parent
    /// images rarely have a log to replay, since nothing writes to them. Their limits are therefore divided
    /// by (`depth` + 1)², for example to 1 MiB of pages below seven images.
    pub(crate) fn new(depth: usize) -> Self {
        let share = depth.saturating_add(1).saturating_pow(2);
        Self {
            max_pages: (MAX_PAGES / share).max(MIN_PAGES),
            max_zero_ranges: (MAX_ZERO_RANGES / share).max(MIN_PAGES),
            zeros: BTreeMap::new(),
            pages: BTreeMap::new(),
        }
    }

    /// Returns the memory in bytes that the changes take. A page takes its length and an entry of 16 bytes in
    /// a tree; the tree has space for twice as many.
    pub(crate) fn memory(&self) -> u64 {
        self.pages.len() as u64 * (LOG_SECTOR + 32) + self.zeros.len() as u64 * 32
    }

    /// Zeroes a range of the file and drops earlier pages inside it. Both ends are multiples of
    /// [`LOG_SECTOR`].
    ///
    /// # Errors
    /// `LimitExceeded` if the log zeroes too many separate ranges.
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
        if self.zeros.len() > self.max_zero_ranges {
            let max = self.max_zero_ranges;
            return Err(
                Error::limit(format!("the log zeroes more than {max} separate ranges")).hint(REPLAY_HINT)
            );
        }
        Ok(())
    }

    /// Overwrites the page at `file_offset`, a multiple of [`LOG_SECTOR`].
    ///
    /// # Errors
    /// `LimitExceeded` if the log changes too many pages.
    pub(crate) fn overwrite(&mut self, file_offset: u64, page: Box<LogPage>) -> Result<()> {
        self.pages.insert(file_offset, page);
        if self.pages.len() > self.max_pages {
            let max = self.max_pages;
            return Err(
                Error::limit(format!("the log changes more than {max} pages of 4 KiB")).hint(REPLAY_HINT)
            );
        }
        Ok(())
    }

    /// Returns the file offset one past the last changed byte; 0 without changes.
    pub(crate) fn end(&self) -> u64 {
        let zeros = self.zeros.last_key_value().map_or(0, |(_, &end)| end);
        let pages = self.pages.last_key_value().map_or(0, |(&start, _)| start.saturating_add(LOG_SECTOR));
        zeros.max(pages)
    }

    /// Returns the number of overwritten pages.
    pub(crate) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Applies the changes to `buf`, which contains the file's bytes from `file_offset` on.
    pub(crate) fn apply(&self, buf: &mut [u8], file_offset: u64) {
        let end = file_offset.saturating_add(buf.len() as u64);
        let index = |at: u64| usize::try_from(at - file_offset).unwrap_or(usize::MAX);
        for (&zero_start, &zero_end) in self.zeros.range(..end).rev() {
            if zero_end <= file_offset {
                break;
            }
            buf[index(zero_start.max(file_offset))..index(zero_end.min(end))].fill(0);
        }
        for (&page_start, page) in self.pages.range(file_offset.saturating_sub(LOG_SECTOR - 1)..end) {
            let (from, to) = (page_start.max(file_offset), (page_start + LOG_SECTOR).min(end));
            if from < to {
                let in_page = (from - page_start) as usize..(to - page_start) as usize;
                buf[index(from)..index(to)].copy_from_slice(&page[in_page]);
            }
        }
    }

    /// Makes the changes in the file itself.
    pub(crate) fn write(&self, output: &Output) -> Result<()> {
        for (&start, &end) in &self.zeros {
            output.write_zeros_at(start, end - start)?;
        }
        self.pages.iter().try_for_each(|(&file_offset, page)| output.write_at(&page[..], file_offset))
    }

    /// True if any byte of the range is changed.
    pub(crate) fn touches(&self, range: &Range<u64>) -> bool {
        let zeroed = self.zeros.range(..range.end).next_back().is_some_and(|(_, &end)| end > range.start);
        zeroed || self.next_page(range.start).is_some_and(|page| page.start < range.end)
    }

    /// Returns the file range of the first overwritten page that ends after `file_offset`; `None` if no page
    /// does.
    pub(crate) fn next_page(&self, file_offset: u64) -> Option<Range<u64>> {
        let (&start, _) = self.pages.range(file_offset.saturating_sub(LOG_SECTOR - 1)..).next()?;
        Some(start..start + LOG_SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Box<LogPage> {
        Box::new([byte; LOG_SECTOR as usize])
    }

    #[test]
    fn limits_shrink_with_depth() {
        for (depth, max) in [(0, 16_384), (1, 4096), (7, 256), (22, 32), (255, 32)] {
            let mut overlay = Overlay::new(depth);
            for index in 0..max {
                overlay.overwrite(index * LOG_SECTOR, page(1)).expect("page");
            }
            let error = overlay.overwrite(max * LOG_SECTOR, page(1)).expect_err("one too many");
            assert!(error.to_string().contains(&format!("more than {max} pages")), "{error}");
        }
    }

    #[test]
    fn later_changes_hide_earlier_ones() {
        let mut overlay = Overlay::new(0);
        overlay.overwrite(4096, page(1)).expect("page");
        overlay.overwrite(8192, page(2)).expect("page");
        overlay.zero(0..8192).expect("zero");
        overlay.overwrite(0, page(3)).expect("page");
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
