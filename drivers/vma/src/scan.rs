//! Looks for extents in an archive of which nothing is certain.
//!
//! The bytes pass through a window that holds the current extent and the header that must follow
//! it. A header that begins inside an extent shows that bytes are missing, and what stands behind an
//! extent shows whether it is whole: the next header, what a small fault left of it, or the end of
//! the input. After a fault the search goes on byte by byte until a header has magic number, UUID and
//! MD5 right.

use std::ops::Range;

use imgtool_toolkit::{Error, Input, RandomInput, Result, Stream};

use crate::bytes::ArchiveBytes;
use crate::extent::ExtentHeader;
use crate::layout::{EXTENT_HEADER, EXTENT_MAGIC, MAX_BLOCK_COUNT, MAX_EXTENT};

/// Bytes read at a time. Ours.
const CHUNK: usize = 256 * 1024;
/// Bytes that may lie unused at the window's start before it is moved up. Ours.
const SLACK: usize = 4 << 20;
/// What is read at once where a file can't be read: a page.
const PAGE: usize = 4096;
/// The same under a decoder, whose frames have no such alignment: what extents are aligned to.
const DECODED_STEP: usize = EXTENT_HEADER;
/// Faults of a stream that are told one by one. Ours.
const MAX_FAULTS: usize = 64;
/// Faults of a stream after which it is given up: noise that is full of beginnings. Ours.
const MAX_RESUMES: u32 = 1 << 16;
/// Bytes before the early end of a compressed stream that are taken as possibly wrong: what is damaged
/// may decode to something up to there. Ours: several zstd blocks, a quarter of an extent.
const CUT_TAIL: u64 = 1 << 20;
/// Unreadable places that are kept apart within a window; neighbours are joined, so few are needed.
const MAX_BAD: usize = 4096;

/// Where the bytes come from.
enum Feed {
    Stream(Stream),
    File(RandomInput),
}

/// The part of the input that is held.
pub(crate) struct Window {
    feed: Feed,
    bytes: Vec<u8>,
    /// Bytes of `bytes` that are given up.
    unused: usize,
    /// Position in the input of the first byte that is not given up.
    base: u64,
    /// Nothing comes after what is held.
    ended: bool,
    /// What went wrong in the stream and has not been told yet.
    faults: Vec<Error>,
    /// Where something is missing in front of what comes next: decompression began anew.
    gaps: Vec<u64>,
    resumes: u32,
    /// Bytes that have been given up came from a part of the stream whose checksum never came right.
    misled: bool,
    /// Such bytes that are held, or come before what is held next.
    doubtful: Vec<Range<u64>>,
    /// The compressed stream ended before the checksum of what came last.
    pub(crate) unproven: bool,
    /// Ranges of the input that can't be read; they are zero in the window.
    bad: Vec<Range<u64>>,
}

impl Window {
    /// Over `input`, from its start.
    pub(crate) fn new(input: Input) -> Result<Self> {
        let feed = if input.is_stream() {
            Feed::Stream(input.into_stream()?)
        } else {
            Feed::File(input.into_random()?)
        };
        Ok(Self {
            feed,
            bytes: Vec::new(),
            unused: 0,
            base: 0,
            ended: false,
            faults: Vec::new(),
            gaps: Vec::new(),
            resumes: 0,
            misled: false,
            doubtful: Vec::new(),
            unproven: false,
            bad: Vec::new(),
        })
    }

    fn held(&self) -> usize {
        self.bytes.len() - self.unused
    }

    fn end(&self) -> u64 {
        self.base + self.held() as u64
    }

    /// Gives up what stands before `position`, which is held or directly behind.
    fn release(&mut self, position: u64) {
        let count =
            usize::try_from(position.saturating_sub(self.base)).unwrap_or(usize::MAX).min(self.held());
        self.unused += count;
        self.base += count as u64;
        if self.unused > SLACK {
            self.bytes.drain(..self.unused);
            self.unused = 0;
        }
        let base = self.base;
        self.bad.retain(|range| range.end > base);
        self.gaps.retain(|gap| *gap >= base);
        self.doubtful.retain(|range| range.end >= base);
    }

    /// Reads on until `len` bytes from `position` are held; how many there are.
    fn ensure(&mut self, position: u64, len: usize) -> usize {
        while !self.ended && self.end() < position.saturating_add(len as u64) {
            self.read_chunk();
        }
        usize::try_from(self.end().saturating_sub(position)).unwrap_or(usize::MAX).min(len)
    }

    /// `len` bytes from `position`, which are held.
    pub(crate) fn slice(&self, position: u64, len: usize) -> &[u8] {
        let start = self.unused + usize::try_from(position - self.base).unwrap_or(usize::MAX);
        self.bytes.get(start..start + len).unwrap_or(&[])
    }

    /// Whether the input could be read there.
    pub(crate) fn is_readable(&self, range: &Range<u64>) -> bool {
        !self.bad.iter().any(|bad| bad.start < range.end && range.start < bad.end)
    }

    /// The UUID of the extent that begins at the window's start, if one does.
    pub(crate) fn first_uuid(&mut self) -> Option<[u8; 16]> {
        let got = self.ensure(self.base, EXTENT_HEADER);
        let raw = self.slice(self.base, got).first_chunk::<EXTENT_HEADER>()?;
        let uuid = raw.get(8..24)?.try_into().ok()?;
        ExtentHeader::parse(raw, &uuid).ok().map(|_| uuid)
    }

    /// The first place within `range` where something is missing.
    fn gap_within(&self, range: &Range<u64>) -> Option<u64> {
        self.gaps.iter().copied().find(|gap| range.contains(gap))
    }

    /// What the compression's checksums say of `range`, which is held.
    pub(crate) fn certainty(&mut self, range: &Range<u64>) -> Certainty {
        if self.is_doubtful(range) {
            return Certainty::Doubtful;
        }
        match &mut self.feed {
            Feed::Stream(stream) => {
                let unchecked = Stream::position(stream).saturating_sub(stream.checked_until());
                let is_right = range.end <= self.end().saturating_sub(unchecked);
                if is_right { Certainty::Right } else { Certainty::Unknown }
            }
            Feed::File(_) => Certainty::Right,
        }
    }

    /// Whether checksums of the compression of `range` were wrong, or never came.
    pub(crate) fn is_doubtful(&self, range: &Range<u64>) -> bool {
        self.doubtful.iter().any(|doubtful| doubtful.start < range.end && range.start < doubtful.end)
    }

    /// Whether what was given up since this was asked last may be wrong.
    pub(crate) fn take_misled(&mut self) -> bool {
        std::mem::take(&mut self.misled)
    }

    fn read_chunk(&mut self) {
        let (old, position) = (self.bytes.len(), self.end());
        self.bytes.resize(old + CHUNK, 0);
        let (got, error) = match &mut self.feed {
            Feed::Stream(stream) => read_until_error(stream, &mut self.bytes[old..]),
            Feed::File(input) => {
                let left = usize::try_from(input.len().saturating_sub(position)).unwrap_or(usize::MAX);
                let got = left.min(CHUNK);
                read_around_errors(input, &mut self.bytes[old..old + got], position, &mut self.bad);
                (got, None)
            }
        };
        self.bytes.truncate(old + got);
        match error {
            Some(error) => self.pass_fault(error),
            None => self.ended |= got < CHUNK,
        }
    }

    /// Goes on behind a fault in a compressed stream. What came before it and was never found right may
    /// be wrong. Where the stream just ends, as that of a copy that was cut, nearly all of it will be
    /// right, and only the last part is doubted.
    fn pass_fault(&mut self, error: Error) {
        let end = self.end();
        let Feed::Stream(stream) = &mut self.feed else { return };
        let unchecked = Stream::position(stream).saturating_sub(stream.checked_until());
        let mut from = end.saturating_sub(unchecked);
        if stream.was_cut() {
            self.unproven |= from < end;
            from = from.max(end.saturating_sub(CUT_TAIL));
        } else {
            self.misled |= from < self.base;
        }
        if from < end {
            self.doubtful.push(from..end);
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

/// What checksums say of a part of the input.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// They are right, or there are none.
    Right,
    /// They come later.
    Unknown,
    /// They are wrong or never came.
    Doubtful,
}

/// Reads from a stream; what came before an error counts.
fn read_until_error(stream: &mut Stream, buf: &mut [u8]) -> (usize, Option<Error>) {
    let mut filled = 0;
    while filled < buf.len() {
        // Small reads, so that little is lost in front of a fault.
        let end = buf.len().min(filled + PAGE);
        let before = stream.position();
        match ArchiveBytes::read_full(stream, &mut buf[filled..end]) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) => {
                // The stream counts what it has handed over.
                let got = usize::try_from(Stream::position(stream) - before).unwrap_or(0);
                return (filled + got.min(end - filled), Some(error));
            }
        }
    }
    (filled, None)
}

/// Reads a part of a file; what can't be read becomes zero and is noted in `bad`.
fn read_around_errors(input: &RandomInput, buf: &mut [u8], position: u64, bad: &mut Vec<Range<u64>>) {
    if input.read_exact_at(buf, position).is_ok() {
        return;
    }
    if input.granule() > 1 {
        return read_decoded(input, buf, position, bad);
    }
    let mut done = 0;
    while done < buf.len() {
        let at = position + done as u64;
        let to_boundary = PAGE - usize::try_from(at % PAGE as u64).unwrap_or(0);
        let end = buf.len().min(done + to_boundary);
        if input.read_exact_at(&mut buf[done..end], at).is_err() {
            give_up(&mut buf[done..end], at, bad);
        }
        done = end;
    }
}

/// The same under a decoder, where every attempt costs the decoding of a whole frame: a part is given
/// up when neither its first nor its last bytes can be read, else it is halved.
fn read_decoded(input: &RandomInput, buf: &mut [u8], position: u64, bad: &mut Vec<Range<u64>>) {
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
        return give_up(buf, position, bad);
    }
    let half = (len / 2).next_multiple_of(DECODED_STEP).min(last);
    let (front, back) = buf.split_at_mut(half);
    read_decoded(input, front, position, bad);
    read_decoded(input, back, position + half as u64, bad);
}

/// Notes a part that can't be read.
fn give_up(buf: &mut [u8], position: u64, bad: &mut Vec<Range<u64>>) {
    buf.fill(0);
    let range = position..position + buf.len() as u64;
    let full = bad.len() >= MAX_BAD;
    match bad.last_mut() {
        Some(last) if full || last.end == range.start => last.end = range.end,
        _ => bad.push(range),
    }
}

/// What the scanner came across.
pub(crate) enum Found {
    /// An extent whose header is right.
    Extent(Box<FoundExtent>),
    /// Bytes that are no extent, and why not.
    Fault { file: Range<u64>, message: String },
    /// The end of the input.
    End,
}

/// An extent in the window.
pub(crate) struct FoundExtent {
    pub(crate) header: ExtentHeader,
    pub(crate) file_offset: u64,
    /// Bytes of data that belong to it for sure.
    pub(crate) usable: u64,
    /// Why not all of its data is usable.
    pub(crate) fault: Option<String>,
    /// Behind it stands what should. Otherwise a fault that begins somewhere in its data may reach
    /// over its end.
    pub(crate) ends_well: bool,
}

/// Goes through an archive and skips what is damaged.
pub(crate) struct Scanner {
    window: Window,
    uuid: [u8; 16],
    position: u64,
}

impl Scanner {
    /// From `position`, the end of the archive's header.
    pub(crate) fn new(window: Window, uuid: [u8; 16], position: u64) -> Self {
        Self { window, uuid, position }
    }

    /// The bytes of the extent that was found last.
    pub(crate) fn window(&self) -> &Window {
        &self.window
    }

    pub(crate) fn window_mut(&mut self) -> &mut Window {
        &mut self.window
    }

    /// The next extent or fault.
    pub(crate) fn next(&mut self) -> Found {
        let at = self.position;
        self.window.release(at);
        let got = self.window.ensure(at, EXTENT_HEADER);
        // What begins here begins behind the gap.
        self.window.gaps.retain(|gap| *gap > at);
        if !self.window.faults.is_empty() {
            let message = self.window.faults.remove(0).message().to_owned();
            return Found::Fault { file: at..at, message };
        }
        if got == 0 {
            return Found::End;
        }
        let fault = match self.header_at(at, got) {
            Ok(header) => return Found::Extent(Box::new(self.judge(header, at))),
            Err(message) => message,
        };
        self.position = self.search(at + 1);
        Found::Fault { file: at..self.position, message: fault }
    }

    /// The header at `at`, of which `got` bytes are there.
    fn header_at(&self, at: u64, got: usize) -> Result<ExtentHeader, String> {
        let Some(raw) = self.window.slice(at, got).first_chunk::<EXTENT_HEADER>() else {
            return Err(format!("read short extent ({got} bytes)"));
        };
        if !self.window.is_readable(&(at..at + EXTENT_HEADER as u64)) {
            return Err("the file can't be read here".to_owned());
        }
        let header = ExtentHeader::parse(raw, &self.uuid).map_err(|e| e.message().to_owned())?;
        if u64::from(header.block_count) > MAX_BLOCK_COUNT {
            return Err(format!(
                "short vma extent ({MAX_EXTENT} < {})",
                EXTENT_HEADER as u64 + header.data_len()
            ));
        }
        Ok(header)
    }

    /// How much of an extent's data can be relied on; goes to where the next one should be.
    fn judge(&mut self, header: ExtentHeader, at: u64) -> FoundExtent {
        let data_len = header.data_len();
        let needed = EXTENT_HEADER + data_len as usize; // at most MAX_EXTENT
        let data = at + EXTENT_HEADER as u64;
        let there = self.window.ensure(at, needed + EXTENT_HEADER);
        let next = at + needed as u64;
        if let Some(gap) = self.window.gap_within(&(at..next)) {
            // Part of it went with a damaged part of the stream; what follows the gap is not its own.
            self.position = gap;
            let usable = gap.saturating_sub(data);
            let fault = Some("the end of the extent is in a damaged part of the stream".to_owned());
            return FoundExtent { header, file_offset: at, usable, fault, ends_well: true };
        }
        let is_followed = there == needed + EXTENT_HEADER && self.header_at(next, EXTENT_HEADER).is_ok();
        let inner = if is_followed { None } else { self.find(data..next.min(at + there as u64)) };
        let mut found =
            FoundExtent { header, file_offset: at, usable: data_len, fault: None, ends_well: true };
        self.position = next;
        if let Some(inner) = inner {
            found.fault =
                Some(format!("bytes are missing: the next extent begins {} bytes early", next - inner));
            found.usable = 0;
            self.position = inner;
        } else if there < needed {
            found.fault = Some(format!("short vma extent ({there} < {needed})"));
            found.usable = there.saturating_sub(EXTENT_HEADER) as u64;
            self.position = at + there as u64;
        } else if !is_followed {
            found.ends_well = self.window.gaps.contains(&next) || self.is_like_header(next, there - needed);
        }
        found
    }

    /// Whether the `len` bytes at `at` may be what is left of a header, or can't be read.
    fn is_like_header(&self, at: u64, len: usize) -> bool {
        let mut usual = [0; 24];
        usual[..4].copy_from_slice(&EXTENT_MAGIC);
        usual[8..].copy_from_slice(&self.uuid);
        // All but the number of sub-blocks is the same in every extent of an archive.
        let fixed = (0..len.min(24)).filter(|index| !(6..8).contains(index));
        let bytes = self.window.slice(at, len.min(24));
        let (mut same, mut all) = (0, 0);
        for index in fixed {
            all += 1;
            same += usize::from(bytes.get(index) == usual.get(index));
        }
        same * 4 >= all * 3 || !self.window.is_readable(&(at..at + len as u64))
    }

    /// The first valid header that begins in `range`, which is held.
    fn find(&self, range: Range<u64>) -> Option<u64> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).ok()?;
        let bytes = self.window.slice(range.start, len);
        let mut from = 0;
        while let Some(at) = bytes[from..].windows(4).position(|four| four == EXTENT_MAGIC) {
            let position = range.start + (from + at) as u64;
            let there =
                usize::try_from(self.window.end() - position).unwrap_or(usize::MAX).min(EXTENT_HEADER);
            if self.header_at(position, there).is_ok() {
                return Some(position);
            }
            from += at + 1;
        }
        None
    }

    /// The first valid header from `from` on, or the end of the input; gives up what is before.
    fn search(&mut self, from: u64) -> u64 {
        let mut position = from;
        loop {
            self.window.release(position);
            let there = self.window.ensure(position, CHUNK + EXTENT_HEADER);
            if there < EXTENT_HEADER {
                return position + there as u64;
            }
            // A header that begins in the last bytes is found in the next round.
            let whole = there - EXTENT_HEADER + 1;
            // `find` looks at beginnings: three more bytes complete a magic number.
            if let Some(found) = self.find(position..position + (whole + 3) as u64) {
                return found;
            }
            position += whole as u64;
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

    /// For the archive's header, in which nothing can be missing.
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
            let want = usize::try_from(len - skipped).unwrap_or(CHUNK).min(CHUNK);
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
