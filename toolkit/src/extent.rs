//! Extents: which parts of a device hold data.

use std::ops::Range;

/// What a run of a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Must be read (and may still turn out to be zero).
    Data,
    /// Known to read as zeros, and allocated in the image.
    Zero,
    /// Reads as zeros because nothing is allocated.
    Hole,
}

/// A run of one status. `Zero` and `Hole` read as zeros and need no reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// The status of all of it.
    pub kind: ExtentKind,
}

impl Extent {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The guest range.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end()
    }

    /// Whether it must be read.
    pub fn is_data(&self) -> bool {
        self.kind == ExtentKind::Data
    }
}

/// Collects extents in ascending order and joins neighbours of the same kind.
///
/// Drivers that answer [`crate::RandomAccess::extents`] push piece after piece and stop when
/// [`ExtentList::is_full`] says so: an answer may cover a part of what was asked.
#[derive(Debug, Default)]
pub struct ExtentList {
    extents: Vec<Extent>,
}

/// Extents in one answer: bounds memory for badly fragmented images. Ours: 4096 × 24 B = 96 KiB.
pub const MAX_EXTENTS_PER_ANSWER: usize = 4096;

impl ExtentList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `len` bytes of `kind` at `start`, which must be where the last one ended.
    pub fn push(&mut self, start: u64, len: u64, kind: ExtentKind) {
        if len == 0 {
            return;
        }
        if let Some(last) = self.extents.last_mut() {
            debug_assert_eq!(last.end(), start, "extents must be contiguous");
            if last.kind == kind {
                last.len += len;
                return;
            }
        }
        self.extents.push(Extent { start, len, kind });
    }

    /// Whether the answer should end here.
    pub fn is_full(&self) -> bool {
        self.extents.len() >= MAX_EXTENTS_PER_ANSWER
    }

    /// The extents.
    pub fn into_vec(self) -> Vec<Extent> {
        self.extents
    }
}
