//! Sliding window over the bytes of a damaged archive. It reads on after read errors and after damage
//! to the outer compression.

use std::collections::VecDeque;
use std::ops::Range;

use imgtool_core::{Error, Input, RandomInput, Result, Stream};

use crate::bytes::ArchiveBytes;
use crate::extent::ExtentHeader;
use crate::layout::EXTENT_HEADER;

/// Number of bytes read at a time. Our choice.
pub(crate) const READ_CHUNK: usize = 256 * 1024;
/// Maximum number of released bytes kept at the front of the buffer. When there are more, the window removes
/// them. Our choice.
const MAX_RELEASED: usize = 4 << 20;
/// Number of bytes read from a stream at a time: small, so that a fault costs few of the bytes before it.
/// Our choice.
const STREAM_STEP: usize = 4096;
/// Length in bytes of the smallest part of a decoded file that the window gives up around an unreadable
/// place. It is the alignment of extents, because compressed frames have no alignment.
const DECODED_STEP: usize = EXTENT_HEADER;
/// Maximum number of faults of a stream that wait to be reported; the window drops further ones. Our limit.
const MAX_FAULTS: usize = 64;
/// Maximum number of faults of a stream. At the next one, the window gives up. Our limit: random bytes may
/// contain many apparent starts of frames.
const MAX_RESUMES: u32 = 1 << 16;
/// Maximum number of bytes before the early end of a compressed stream that count as unverified, since a
/// decoder may have produced them from damaged input. Our choice: several zstd blocks, a quarter of an
/// extent.
const CUT_TAIL: u64 = 1 << 20;
/// Maximum number of unreadable ranges in a window; the window joins further ones to the last. Our limit.
const MAX_UNREADABLE: usize = 4096;

enum WindowInput {
    Stream(Stream),
    File(RandomInput),
}

/// The part of an archive held in memory.
///
/// Positions are offsets in the decompressed archive. Where decompression resumed after damage, the bytes
/// before and after the damage are adjacent, and the window records a gap between them.
pub(crate) struct Window {
    input: WindowInput,
    bytes: Vec<u8>,
    /// Number of released bytes at the front of `bytes`.
    released: usize,
    /// Archive offset of the first byte that is not released.
    base: u64,
    /// True if the window can read no more bytes.
    ended: bool,
    /// Faults of the stream that are still to be reported.
    faults: Vec<Error>,
    /// Archive offsets at which bytes are missing, because decompression resumed there.
    gaps: Vec<u64>,
    /// Number of faults after which the window tried to resume.
    resumes: u32,
    /// True if bytes turned out to be unverified after they were released.
    released_unverified: bool,
    /// Archive ranges, from `base` on, whose checksum was wrong or missing.
    unverified: Vec<Range<u64>>,
    /// True if the compressed stream ended before its last checksum.
    cut_before_checksum: bool,
    /// Archive ranges that can't be read; the window contains zeros in their place.
    unreadable: Vec<Range<u64>>,
    /// Archive offsets with the position that the decoder of a compressed stream had reached there, for the
    /// bytes that are not released.
    marks: VecDeque<(u64, u64)>,
}

impl Window {
    /// Creates a window at the start of `input`.
    pub(crate) fn new(input: Input) -> Result<Self> {
        let input = if input.is_stream() {
            WindowInput::Stream(input.into_stream()?)
        } else {
            WindowInput::File(input.into_random()?)
        };
        Ok(Self {
            input,
            bytes: Vec::new(),
            released: 0,
            base: 0,
            ended: false,
            faults: Vec::new(),
            gaps: Vec::new(),
            resumes: 0,
            released_unverified: false,
            unverified: Vec::new(),
            cut_before_checksum: false,
            unreadable: Vec::new(),
            marks: VecDeque::new(),
        })
    }

    fn held(&self) -> usize {
        self.bytes.len() - self.released
    }

    /// Returns the archive offset one past the last byte held.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.held() as u64
    }

    /// Releases the bytes before archive offset `position`, at most all bytes held.
    pub(crate) fn release(&mut self, position: u64) {
        let count =
            usize::try_from(position.saturating_sub(self.base)).unwrap_or(usize::MAX).min(self.held());
        self.released += count;
        self.base += count as u64;
        if self.released > MAX_RELEASED {
            self.bytes.drain(..self.released);
            self.released = 0;
        }
        let base = self.base;
        self.unreadable.retain(|range| range.end > base);
        self.gaps.retain(|gap| *gap >= base);
        self.unverified.retain(|range| range.end >= base);
        while self.marks.get(1).is_some_and(|(offset, _)| *offset <= base) {
            self.marks.pop_front();
        }
    }

    /// Reads on until the window holds `len` bytes from `position`. Returns the number of these bytes that it
    /// holds, fewer than `len` only at the end of the input.
    pub(crate) fn ensure(&mut self, position: u64, len: usize) -> usize {
        while !self.ended && self.end() < position.saturating_add(len as u64) {
            self.read_chunk();
        }
        usize::try_from(self.end().saturating_sub(position)).unwrap_or(usize::MAX).min(len)
    }

    /// Returns the `len` bytes at `position`, or an empty slice if the window does not hold all of them.
    pub(crate) fn slice(&self, position: u64, len: usize) -> &[u8] {
        let start = self.released + usize::try_from(position - self.base).unwrap_or(usize::MAX);
        self.bytes.get(start..start + len).unwrap_or(&[])
    }

    /// True if no byte of `range` is unreadable.
    pub(crate) fn is_readable(&self, range: &Range<u64>) -> bool {
        !self.unreadable.iter().any(|other| other.start < range.end && range.start < other.end)
    }

    /// Returns the position in the compressed file at or shortly before which the archive offset `position`
    /// is stored, or at which the decoder found the damage there; `None` if the archive is not compressed.
    pub(crate) fn compressed_offset(&self, position: u64) -> Option<u64> {
        match &self.input {
            // At the end of the file, the last byte counts.
            WindowInput::File(input) => input.compressed_offset(position.min(input.len().saturating_sub(1))),
            WindowInput::Stream(_) => {
                let here = self.marks.iter().find(|(offset, _)| *offset == position);
                let before = || self.marks.iter().rev().find(|(offset, _)| *offset < position);
                here.or_else(before).or(self.marks.front()).map(|(_, compressed)| *compressed)
            }
        }
    }

    /// Returns the UUID of the extent at the start of the window, if a valid header is there.
    pub(crate) fn first_uuid(&mut self) -> Option<[u8; 16]> {
        let got = self.ensure(self.base, EXTENT_HEADER);
        let raw = self.slice(self.base, got).first_chunk::<EXTENT_HEADER>()?;
        let uuid = raw.get(8..24)?.try_into().ok()?;
        ExtentHeader::parse(raw, &uuid).ok().map(|_| uuid)
    }

    /// Returns the archive offset of the first gap within `range`, if there is one.
    pub(crate) fn gap_within(&self, range: &Range<u64>) -> Option<u64> {
        self.gaps.iter().copied().find(|gap| range.contains(gap))
    }

    /// True if bytes are missing at `position`.
    pub(crate) fn has_gap_at(&self, position: u64) -> bool {
        self.gaps.contains(&position)
    }

    /// Forgets the gaps up to and including `position`.
    pub(crate) fn drop_gaps_through(&mut self, position: u64) {
        self.gaps.retain(|gap| *gap > position);
    }

    /// Removes and returns the oldest fault of the stream that is still to be reported.
    pub(crate) fn next_fault(&mut self) -> Option<Error> {
        if self.faults.is_empty() { None } else { Some(self.faults.remove(0)) }
    }

    /// Returns the state of the compression's checksums for `range`, which the window must hold.
    pub(crate) fn checksum_state(&mut self, range: &Range<u64>) -> ChecksumState {
        if self.is_unverified(range) {
            return ChecksumState::Failed;
        }
        match &mut self.input {
            WindowInput::Stream(stream) => {
                let pending = Stream::position(stream).saturating_sub(stream.checked_until());
                let is_verified = range.end <= self.end().saturating_sub(pending);
                if is_verified { ChecksumState::Verified } else { ChecksumState::Pending }
            }
            WindowInput::File(_) => ChecksumState::Verified,
        }
    }

    /// True if a checksum over a part of `range` was wrong or missing.
    pub(crate) fn is_unverified(&self, range: &Range<u64>) -> bool {
        self.unverified.iter().any(|other| other.start < range.end && range.start < other.end)
    }

    /// True if released bytes turned out to be unverified since the last call.
    pub(crate) fn take_released_unverified(&mut self) -> bool {
        std::mem::take(&mut self.released_unverified)
    }

    /// True if the compressed stream ended before its last checksum.
    pub(crate) fn was_cut_before_checksum(&self) -> bool {
        self.cut_before_checksum
    }

    fn read_chunk(&mut self) {
        let (old, position) = (self.bytes.len(), self.end());
        self.bytes.resize(old + READ_CHUNK, 0);
        let (got, error) = match &mut self.input {
            WindowInput::Stream(stream) => {
                self.marks.extend(stream.compressed_position().map(|compressed| (position, compressed)));
                let read = read_until_error(stream, &mut self.bytes[old..]);
                let end = position + read.0 as u64;
                if end < position + READ_CHUNK as u64 {
                    self.marks.extend(stream.compressed_position().map(|compressed| (end, compressed)));
                }
                read
            }
            WindowInput::File(input) => {
                let left = usize::try_from(input.len().saturating_sub(position)).unwrap_or(usize::MAX);
                let got = left.min(READ_CHUNK);
                let buf = &mut self.bytes[old..old + got];
                read_around_errors(input, buf, position, &mut self.unreadable);
                (got, None)
            }
        };
        self.bytes.truncate(old + got);
        match error {
            Some(error) => self.pass_fault(error),
            None => self.ended |= got < READ_CHUNK,
        }
    }

    /// Records a fault of a compressed stream and resumes after it. Bytes whose checksum is still pending
    /// become unverified: all of them after damage, but only the last part if the stream ends early, because
    /// nearly all of a truncated copy is intact.
    fn pass_fault(&mut self, error: Error) {
        let end = self.end();
        let WindowInput::Stream(stream) = &mut self.input else { return };
        let pending = Stream::position(stream).saturating_sub(stream.checked_until());
        let mut from = end.saturating_sub(pending);
        if stream.was_truncated() {
            self.cut_before_checksum |= from < end;
            from = from.max(end.saturating_sub(CUT_TAIL));
        } else {
            self.released_unverified |= from < self.base;
        }
        if from < end {
            self.unverified.push(from..end);
        }
        self.resumes += 1;
        self.ended = self.resumes > MAX_RESUMES || !stream.resume().unwrap_or(false);
        let gap = self.end();
        if self.gaps.last() != Some(&gap) {
            self.gaps.push(gap);
        }
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(error);
        }
    }
}

impl ArchiveBytes for Window {
    fn position(&self) -> u64 {
        self.base
    }

    fn remaining(&self) -> Option<u64> {
        None
    }

    /// Reads bytes of the archive header. Fails if they include a gap or an unreadable range.
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let position = self.base;
        let got = self.ensure(position, buf.len());
        let range = position..position + got as u64;
        if !self.is_readable(&range) || self.gap_within(&range).is_some() {
            return Err(Error::corrupt("the archive's header can't be read").at(position));
        }
        buf[..got].copy_from_slice(self.slice(position, got));
        self.release(position + got as u64);
        Ok(got)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let mut skipped = 0;
        while skipped < len {
            let want = usize::try_from(len - skipped).unwrap_or(READ_CHUNK).min(READ_CHUNK);
            let got = self.ensure(self.base, want);
            self.release(self.base + got as u64);
            skipped += got as u64;
            if got < want {
                break;
            }
        }
        Ok(skipped)
    }
}

/// State of the compression's checksums for a part of the archive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChecksumState {
    /// The checksums are right, or the input has none.
    Verified,
    /// A checksum has not been read yet.
    Pending,
    /// A checksum is wrong or missing.
    Failed,
}

/// Reads from a stream up to the first error. Returns the number of bytes read, and the error, if any.
fn read_until_error(stream: &mut Stream, buf: &mut [u8]) -> (usize, Option<Error>) {
    let mut filled = 0;
    while filled < buf.len() {
        let end = buf.len().min(filled + STREAM_STEP);
        let before = stream.position();
        match ArchiveBytes::read_full(stream, &mut buf[filled..end]) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) => {
                // The position includes the bytes that the failed read delivered.
                let got = usize::try_from(Stream::position(stream) - before).unwrap_or(0);
                return (filled + got.min(end - filled), Some(error));
            }
        }
    }
    (filled, None)
}

/// Reads a part of a file. Zeroes unreadable sectors and adds them to `unreadable`.
fn read_around_errors(input: &RandomInput, buf: &mut [u8], position: u64, unreadable: &mut Vec<Range<u64>>) {
    if input.read_exact_at(buf, position).is_ok() {
        return;
    }
    if input.granule() > 1 {
        return read_decoded(input, buf, position, unreadable);
    }
    input.read_salvage(buf, position, |lost, _| {
        mark_unreadable(position + lost.start as u64..position + lost.end as u64, unreadable);
    });
}

/// Like [`read_around_errors`], but reads through a decoder, which must decode a whole frame at every
/// attempt. To make few attempts, gives up a part if neither its first nor its last bytes can be read, and
/// halves it otherwise.
fn read_decoded(input: &RandomInput, buf: &mut [u8], position: u64, unreadable: &mut Vec<Range<u64>>) {
    let is_readable = |buf: &mut [u8], at| input.read_exact_at(buf, at).is_ok();
    if buf.is_empty() || is_readable(buf, position) {
        return;
    }
    let len = buf.len();
    let ends = len.min(DECODED_STEP);
    let last = len - ends;
    let is_lost = len <= DECODED_STEP
        || !is_readable(&mut buf[..ends], position) && !is_readable(&mut buf[last..], position + last as u64);
    if is_lost {
        buf.fill(0);
        return mark_unreadable(position..position + len as u64, unreadable);
    }
    let half = (len / 2).next_multiple_of(DECODED_STEP).min(last);
    let (front, back) = buf.split_at_mut(half);
    read_decoded(input, front, position, unreadable);
    read_decoded(input, back, position + half as u64, unreadable);
}

/// Adds `range` to `unreadable`; extends the last range if the two are adjacent or the list is full.
fn mark_unreadable(range: Range<u64>, unreadable: &mut Vec<Range<u64>>) {
    let full = unreadable.len() >= MAX_UNREADABLE;
    match unreadable.last_mut() {
        Some(last) if full || last.end == range.start => last.end = range.end,
        _ => unreadable.push(range),
    }
}
