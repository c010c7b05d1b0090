//! Tolerant walk over a damaged archive: finds the valid extents and reports the ranges between them as
//! faults.
//!
//! The [`Window`] holds the current extent and the header that should follow. A header inside an extent's
//! data shows that bytes are missing. The bytes after an extent show whether it is intact: the next header
//! (possibly with a few damaged bytes), a gap or the end of the input should follow. After a fault, the
//! scanner searches byte by byte for a header with the right magic number, UUID and MD5.

use std::ops::Range;

use crate::extent::ExtentHeader;
use crate::layout::{EXTENT_HEADER, EXTENT_MAGIC, MAX_BLOCK_COUNT, MAX_EXTENT};
use crate::reference;
use crate::window::{READ_CHUNK, Window};

/// Number of apparent headers with a wrong MD5 after which the search skips those that overlap the last one.
/// From then on, it hashes every byte at most once. Our limit: an archive has none by chance, since they all
/// begin with its UUID.
const MAX_OVERLAPPING: u32 = 4096;

/// Length in bytes of the start of a header, up to the MD5: magic number, a reserved field, `block_count` and
/// UUID.
const FIXED_LEN: usize = 24;

/// Result of one step of a scan.
pub(crate) enum ScanItem {
    /// An extent whose header is valid.
    Extent(Box<ScanExtent>),
    /// A range of the archive that is not an extent, its position in the compressed file, and the reason. The
    /// range is empty if the underlying stream reported the fault.
    Fault { file: Range<u64>, compressed: Option<u64>, message: String },
    /// The end of the input.
    End,
}

/// An extent with a valid header. The window holds its data.
pub(crate) struct ScanExtent {
    pub(crate) header: ExtentHeader,
    /// Archive offset of the header.
    pub(crate) file_offset: u64,
    /// Number of bytes, from the start of the data, that are treated as the extent's; uncertain if
    /// `ends_well` is false.
    pub(crate) usable: u64,
    /// Reason why a part of the data is unusable, or `None` if all of it is usable.
    pub(crate) fault: Option<String>,
    /// Position in the compressed file at which that shows, or of the header if there is no fault.
    pub(crate) compressed: Option<u64>,
    /// True if the extent is followed by a header (possibly damaged), a gap or the end of the input, or if
    /// `fault` is set. Otherwise, a fault that began in the extent's data may reach past its end.
    pub(crate) ends_well: bool,
}

/// Iterates over the extents of an archive, and continues after damage.
pub(crate) struct Scanner {
    window: Window,
    uuid: [u8; 16],
    /// Archive offset at which the next extent should begin.
    position: u64,
    /// Number of apparent headers that the search rejected because of their MD5.
    rejected: u32,
    /// Archive offset of the end of the last one.
    rejected_end: u64,
}

impl Scanner {
    /// Creates a scanner that starts at the archive offset `position`, the end of the archive header.
    pub(crate) fn new(window: Window, uuid: [u8; 16], position: u64) -> Self {
        Self { window, uuid, position, rejected: 0, rejected_end: 0 }
    }

    /// Returns the window, which holds the data of the last extent until the next call to [`Scanner::next`].
    pub(crate) fn window(&self) -> &Window {
        &self.window
    }

    pub(crate) fn window_mut(&mut self) -> &mut Window {
        &mut self.window
    }

    /// Returns the next extent or fault, or the end of the input.
    pub(crate) fn next(&mut self) -> ScanItem {
        let at = self.position;
        self.window.release(at);
        let got = self.window.ensure(at, EXTENT_HEADER);
        // A gap at `at` is before the first byte of the next extent, so it does not affect that extent.
        self.window.drop_gaps_through(at);
        if let Some(fault) = self.window.next_fault() {
            let (compressed, message) = (fault.compressed_offset(), fault.message().to_owned());
            return ScanItem::Fault { file: at..at, compressed, message };
        }
        if got == 0 {
            return ScanItem::End;
        }
        let fault = match self.header_at(at, got) {
            Ok(header) => return ScanItem::Extent(Box::new(self.judge(header, at))),
            Err(message) => message,
        };
        let compressed = self.window.compressed_offset(at);
        self.position = self.search(at + 1);
        ScanItem::Fault { file: at..self.position, compressed, message: fault }
    }

    /// Decodes the header at archive offset `at`. The window holds its first `got` bytes. Returns a message
    /// if it is short, unreadable or invalid.
    fn header_at(&self, at: u64, got: usize) -> Result<ExtentHeader, String> {
        let Some(raw) = self.window.slice(at, got).first_chunk::<EXTENT_HEADER>() else {
            return Err(reference::short_header(got));
        };
        if !self.window.is_readable(&(at..at + EXTENT_HEADER as u64)) {
            return Err("the file can't be read here".to_owned());
        }
        let header = ExtentHeader::parse(raw, &self.uuid).map_err(|e| e.message().to_owned())?;
        if u64::from(header.block_count) > MAX_BLOCK_COUNT {
            return Err(reference::short_extent(MAX_EXTENT, EXTENT_HEADER as u64 + header.data_len()));
        }
        Ok(header)
    }

    /// Determines how much of the extent's data is usable, and moves to the offset at which the next extent
    /// should begin.
    fn judge(&mut self, header: ExtentHeader, at: u64) -> ScanExtent {
        let data_len = header.data_len();
        let needed = EXTENT_HEADER + data_len as usize; // at most MAX_EXTENT
        let data = at + EXTENT_HEADER as u64;
        let available = self.window.ensure(at, needed + EXTENT_HEADER);
        let next = at + needed as u64;
        if let Some(gap) = self.window.gap_within(&(at..next)) {
            // The rest of the extent is lost: the bytes after the gap belong to a later part of the archive.
            self.position = gap;
            let usable = gap.saturating_sub(data);
            let fault = Some("the end of the extent is in a damaged part of the stream".to_owned());
            let compressed = self.window.compressed_offset(gap);
            return ScanExtent { header, file_offset: at, usable, fault, compressed, ends_well: true };
        }
        let is_followed = available == needed + EXTENT_HEADER && self.header_at(next, EXTENT_HEADER).is_ok();
        let inner = if is_followed { None } else { self.find(data..next.min(at + available as u64)) };
        let mut extent = ScanExtent {
            header,
            file_offset: at,
            usable: data_len,
            fault: None,
            compressed: self.window.compressed_offset(at),
            ends_well: true,
        };
        self.position = next;
        if let Some(inner) = inner {
            extent.fault =
                Some(format!("bytes are missing: the next extent begins {} bytes early", next - inner));
            extent.usable = 0;
            self.position = inner;
            extent.compressed = self.window.compressed_offset(inner);
        } else if available < needed {
            extent.fault = Some(reference::short_extent(available as u64, needed as u64));
            extent.usable = available.saturating_sub(EXTENT_HEADER) as u64;
            self.position = at + available as u64;
            extent.compressed = self.window.compressed_offset(self.position);
        } else if !is_followed {
            extent.ends_well =
                self.window.has_gap_at(next) || self.resembles_header(next, available - needed);
        }
        extent
    }

    /// True if the `len` bytes at `at` can't be read or may be a damaged header: at least three quarters of
    /// the bytes that all headers of the archive share must match. Also true if `len` is 0, at the end of the
    /// input.
    fn resembles_header(&self, at: u64, len: usize) -> bool {
        let mut expected = [0; FIXED_LEN];
        expected[..4].copy_from_slice(&EXTENT_MAGIC);
        expected[8..].copy_from_slice(&self.uuid);
        // Of these bytes, only block_count differs between the extents of an archive.
        let fixed = (0..len.min(FIXED_LEN)).filter(|index| !(6..8).contains(index));
        let bytes = self.window.slice(at, len.min(FIXED_LEN));
        let (mut same, mut all) = (0, 0);
        for index in fixed {
            all += 1;
            same += usize::from(bytes.get(index) == expected.get(index));
        }
        same * 4 >= all * 3 || !self.window.is_readable(&(at..at + len as u64))
    }

    /// Returns the archive offset of the first valid header whose magic number is within `range`, which the
    /// window must hold.
    fn find(&mut self, range: Range<u64>) -> Option<u64> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).ok()?;
        let mut from = 0;
        loop {
            let bytes = self.window.slice(range.start, len).get(from..)?;
            let at = bytes.windows(4).position(|four| four == EXTENT_MAGIC)?;
            let position = range.start + (from + at) as u64;
            if self.is_header(position) {
                return Some(position);
            }
            from += at + 1;
        }
    }

    /// True if a valid header is at archive offset `at`. Compares the UUID first and the MD5 last, since an MD5
    /// takes as long as the search of several KiB.
    fn is_header(&mut self, at: u64) -> bool {
        let fixed = self.window.slice(at, FIXED_LEN);
        let is_apparent = fixed.get(4..6) == Some(&[0; 2]) && fixed.get(8..) == Some(&self.uuid);
        let is_skipped = self.rejected >= MAX_OVERLAPPING && at < self.rejected_end;
        if !is_apparent || is_skipped {
            return false;
        }
        let available = usize::try_from(self.window.end() - at).unwrap_or(usize::MAX).min(EXTENT_HEADER);
        let is_valid = self.header_at(at, available).is_ok();
        if !is_valid {
            self.rejected = self.rejected.saturating_add(1);
            self.rejected_end = at + EXTENT_HEADER as u64;
        }
        is_valid
    }

    /// Returns the archive offset of the first valid header from `from` on, or of the end of the input if
    /// there is none. Releases the searched bytes.
    fn search(&mut self, from: u64) -> u64 {
        let mut position = from;
        loop {
            self.window.release(position);
            let available = self.window.ensure(position, READ_CHUNK + EXTENT_HEADER);
            if available < EXTENT_HEADER {
                return position + available as u64;
            }
            // Number of offsets at which a whole header would fit; the next round searches the rest.
            let starts = available - EXTENT_HEADER + 1;
            // Three more bytes, so that `find` sees all four bytes of the magic number at the last offset.
            if let Some(found) = self.find(position..position + (starts + 3) as u64) {
                return found;
            }
            position += starts as u64;
        }
    }
}
