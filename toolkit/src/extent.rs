//! Extents: which parts of a device hold data.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

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
    data_len: u64,
}

/// Extents in one answer: bounds memory for badly fragmented images. Ours: 4096 × 24 B = 96 KiB.
pub const MAX_EXTENTS_PER_ANSWER: usize = 4096;

/// Bytes of data behind which an answer ends. Ours: nothing is read while the first answer is looked
/// for, and looking may cost some 100 µs for so much data.
pub const DATA_PER_ANSWER: u64 = 256 << 20;

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
        self.data_len += if kind == ExtentKind::Data { len } else { 0 };
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
        self.extents.len() >= MAX_EXTENTS_PER_ANSWER || self.data_len >= DATA_PER_ANSWER
    }

    /// The extents.
    pub fn into_vec(self) -> Vec<Extent> {
        self.extents
    }
}

/// A run as `map` shows it: not only what it reads as, but which image of a chain says so and where
/// it stands. The fields mean what qemu-img's mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapExtent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Which image decides: 0 is the one that was opened, 1 the one below it.
    pub depth: u32,
    /// That image has an entry for it.
    pub present: bool,
    /// It is known to read as zeros.
    pub zero: bool,
    /// It has bytes of its own (which may be a hole of the file: `zero` says so).
    pub data: bool,
    /// Its bytes are compressed.
    pub compressed: bool,
    /// Where its bytes are, as they are.
    pub place: Option<MapPlace>,
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapPlace {
    /// The file.
    pub file: Arc<Path>,
    /// Where the run starts in it, bytes.
    pub file_offset: u64,
}

impl MapExtent {
    /// What [`Extent`] alone knows.
    pub fn of(extent: Extent) -> Self {
        Self {
            start: extent.start,
            len: extent.len,
            depth: 0,
            present: extent.kind != ExtentKind::Hole,
            zero: !extent.is_data(),
            data: extent.is_data(),
            compressed: false,
            place: None,
        }
    }

    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Adds `next`, if it follows in the guest and in its file and is of the same kind.
    pub fn join(&mut self, next: &Self) -> bool {
        let follows = match (&self.place, &next.place) {
            (Some(a), Some(b)) => {
                a.file == b.file && a.file_offset.checked_add(self.len) == Some(b.file_offset)
            }
            (None, None) => true,
            _ => false,
        };
        let same = self.end() == next.start
            && (self.depth, self.present, self.zero, self.data, self.compressed)
                == (next.depth, next.present, next.zero, next.data, next.compressed);
        if follows && same {
            self.len += next.len;
        }
        follows && same
    }
}

/// Appends to a list of runs, joining where that can be.
pub fn push_map_extent(list: &mut Vec<MapExtent>, next: MapExtent) {
    if !list.last_mut().is_some_and(|last| last.join(&next)) {
        list.push(next);
    }
}
