//! [`Extent`], a run of guest bytes that is data or reads as zeros, and [`MapExtent`], which adds its place
//! in a file.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::location::Location;

/// Status of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Must be read; may still turn out to be zeros.
    Data,
    /// Allocated in the image and known to read as zeros.
    Zero,
    /// Not allocated, so it reads as zeros.
    Hole,
}

/// A run of guest bytes with one status. Only [`ExtentKind::Data`] needs to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Status of all bytes.
    pub kind: ExtentKind,
}

impl Extent {
    /// Returns the guest offset one past the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Returns the guest range.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end()
    }

    /// True if the bytes must be read.
    pub fn is_data(&self) -> bool {
        self.kind == ExtentKind::Data
    }
}

/// A list of extents in ascending order that joins neighbours of the same kind.
///
/// An implementation of [`crate::RandomAccess::extents`] pushes extents until it reaches the end of the range
/// or the list [is full](ExtentList::is_full); an answer need not cover the whole range.
#[derive(Debug, Default)]
pub struct ExtentList {
    extents: Vec<Extent>,
    data_len: u64,
}

/// Maximum number of extents in one answer. Our limit: an answer takes at most 96 KiB (4096 × 24 bytes), even
/// for a badly fragmented image.
pub const MAX_EXTENTS_PER_ANSWER: usize = 4096;

/// Number of data bytes after which an answer ends. Our limit: reading starts only after the first answer,
/// and looking up 256 MiB delays it by at most 100 µs.
pub const DATA_PER_ANSWER: u64 = 256 << 20;

impl ExtentList {
    /// Creates an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `len` bytes of `kind` at guest offset `start`, which must be the end of the last extent. Does
    /// nothing if `len` is 0.
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

    /// True if the answer should end here: the extents or their data have reached the limit.
    pub fn is_full(&self) -> bool {
        self.extents.len() >= MAX_EXTENTS_PER_ANSWER || self.data_len >= DATA_PER_ANSWER
    }

    /// Returns the extents.
    pub fn into_vec(self) -> Vec<Extent> {
        self.extents
    }
}

/// Checks a driver's answer about `range` and returns it. The answer must not be empty, must start at
/// `range.start`, must be contiguous, must stay within the range, and must have no empty extents.
///
/// # Errors
/// [`crate::ErrorKind::Malformed`] if the driver broke one of these rules.
pub fn check_answer(answer: Vec<Extent>, range: Range<u64>) -> Result<Vec<Extent>> {
    let mut at = range.start;
    for extent in &answer {
        if extent.start != at || extent.len == 0 || extent.len > range.end - at {
            return Err(Error::malformed(format!("the driver returned an invalid extent at {at}")));
        }
        at = extent.end();
    }
    if answer.is_empty() {
        return Err(Error::malformed(format!("the driver returned no extent at {at}")));
    }
    Ok(answer)
}

/// An extent, plus which image of the backing chain determines its content and where in that image's file it
/// is stored. The fields have the same meanings as in the output of `qemu-img map`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapExtent {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Depth of the image that determines the content: 0 is the open image, 1 its backing image, and so on.
    pub depth: u32,
    /// True if that image has an entry for the extent; the entry hides the content of the backing image.
    pub present: bool,
    /// True if the bytes are known to read as zeros.
    pub zero: bool,
    /// True if a file stores the bytes. If they are a hole in that file, `zero` is true as well.
    pub data: bool,
    /// True if the bytes are compressed.
    pub compressed: bool,
    /// Place of the bytes, if a file stores them uncompressed.
    pub place: Option<MapPlace>,
}

/// Place of an extent in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapPlace {
    /// Location of the file.
    pub file: Arc<Location>,
    /// File offset of the extent's first byte.
    pub file_offset: u64,
}

impl MapExtent {
    /// Converts an extent of an image without a chain. The place of the extent in the file is unknown.
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

    /// Returns the guest offset one past the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Appends `next` if it has the same status, follows this extent in the guest, and either both have
    /// places that are contiguous in one file or neither has a place. Returns true if it did.
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

/// Appends an extent to a list, joining it to the last one if possible.
pub fn push_map_extent(list: &mut Vec<MapExtent>, next: MapExtent) {
    if !list.last_mut().is_some_and(|last| last.join(&next)) {
        list.push(next);
    }
}
