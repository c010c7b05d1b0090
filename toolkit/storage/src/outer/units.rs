//! Decoders for streams of independent units: zstd frames and gzip members.
//!
//! A unit ends with its checksum; until then, its decoded bytes are unverified. The decoders report the
//! number of unverified bytes, and can continue after a damaged unit, as salvage requires.

use std::io::{self, BufRead, Chain, Cursor, Read};

use super::zstd_header::{FrameMemory, MAGIC, frame_memory};
use flate2::bufread::GzDecoder;
use imgtool_core::input::{Decode, retry};
use imgtool_core::{Lease, Memory};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

/// A decoder together with the memory that it borrows.
pub(super) struct Leased<D> {
    decoder: D,
    _lease: Lease,
}

impl<D> Leased<D> {
    pub(super) fn new(decoder: D, lease: Lease) -> Self {
        Self { decoder, _lease: lease }
    }
}

impl<D: Decode> Read for Leased<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf)
    }
}

impl<D: Decode> Decode for Leased<D> {
    fn unchecked(&self) -> u64 {
        self.decoder.unchecked()
    }

    fn was_truncated(&self) -> bool {
        self.decoder.was_truncated()
    }

    fn resume(&mut self) -> io::Result<bool> {
        self.decoder.resume()
    }
}

/// A decoder that does not report the positions of checksums, so no byte counts as verified before the end.
pub(super) struct Opaque {
    decoder: Box<dyn Read + Send>,
    /// Number of plain bytes returned so far; 0 after the end.
    unverified: u64,
}

impl Opaque {
    pub(super) fn new(decoder: Box<dyn Read + Send>) -> Self {
        Self { decoder, unverified: 0 }
    }
}

impl Read for Opaque {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buf)?;
        self.unverified += count as u64;
        if count == 0 && !buf.is_empty() {
            self.unverified = 0;
        }
        Ok(count)
    }
}

impl Decode for Opaque {
    fn unchecked(&self) -> u64 {
        self.unverified
    }
}

/// Decoder of all frames of a zstd stream.
pub(super) struct ZstdFrames<R> {
    reader: R,
    context: DCtx<'static>,
    /// Memory for the longest window so far, which the decoder keeps.
    lease: Lease,
    /// Header of the current frame as far as it was passed to the decoder; `None` once it is complete.
    header: Option<Vec<u8>>,
    /// True once a byte has been read. An empty input is no zstd stream.
    begun: bool,
    /// True between the start of a frame and its end.
    in_frame: bool,
    /// Number of plain bytes of the current frame returned so far.
    unverified: u64,
}

impl<R: BufRead> ZstdFrames<R> {
    /// Creates a decoder. `window_log_max` is the binary logarithm of the maximum window in bytes.
    pub(super) fn new(reader: R, window_log_max: u32, memory: &Memory) -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context.set_parameter(DParameter::WindowLogMax(window_log_max)).map_err(zstd_error)?;
        let lease = memory.lease(0, "a zstd decoder")?;
        let header = Some(Vec::new());
        Ok(Self { reader, context, lease, header, begun: false, in_frame: false, unverified: 0 })
    }

    /// Borrows the memory for the window that the frame announces, once its header is complete. Returns the
    /// number of buffered bytes that the decoder may have: all of them, or a part of an incomplete header.
    fn admit(&mut self) -> io::Result<usize> {
        let stored = self.reader.fill_buf()?;
        let Some(known) = &mut self.header else { return Ok(stored.len()) };
        // A header has at most 18 bytes (RFC 8878, 3.1.1.1), so usually all of it is buffered.
        let mut head = known.clone();
        head.extend_from_slice(&stored[..stored.len().min(MAX_HEADER)]);
        let FrameMemory::Bytes(bytes) = frame_memory(&head) else {
            *known = head;
            return Ok(stored.len());
        };
        let len = stored.len();
        // zstd refuses a window above its limit itself.
        if bytes <= MAX_WINDOW_MEMORY {
            self.lease.raise(bytes, format_args!("a zstd window of {} MiB", bytes >> 20))?;
        }
        self.header = None;
        Ok(len)
    }
}

/// Maximum length of a frame header in bytes, RFC 8878, 3.1.1.1, with the magic number.
const MAX_HEADER: usize = 18;

/// Maximum memory in bytes of a window that zstd accepts with our limit, 128 MiB, and of the decoder.
const MAX_WINDOW_MEMORY: u64 = 129 << 20;

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let admitted = self.admit()?;
            let stored = &self.reader.fill_buf()?[..admitted];
            if stored.is_empty() && !self.in_frame {
                return if self.begun { Ok(0) } else { Err(empty_input()) };
            }
            self.begun = true;
            let (mut input, mut output) = (InBuffer::around(stored), OutBuffer::around(&mut *buf));
            let left = self.context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
            let (consumed, produced) = (input.pos(), output.pos());
            self.reader.consume(consumed);
            self.in_frame = left != 0;
            if !self.in_frame {
                self.header = Some(Vec::new());
            }
            self.unverified = if self.in_frame { self.unverified + produced as u64 } else { 0 };
            if produced > 0 {
                return Ok(produced);
            }
            if consumed == 0 && self.in_frame && self.reader.fill_buf()?.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "incomplete frame"));
            }
        }
    }
}

impl<R: BufRead + Send> Decode for ZstdFrames<R> {
    fn unchecked(&self) -> u64 {
        self.unverified
    }

    fn resume(&mut self) -> io::Result<bool> {
        // Skip a byte if the frame failed at its magic, so that the search does not find the frame again.
        if !self.in_frame {
            let skipped = self.reader.fill_buf()?.len().min(1);
            self.reader.consume(skipped);
        }
        self.in_frame = false;
        self.unverified = 0;
        self.context.reset(ResetDirective::SessionOnly).map_err(zstd_error)?;
        self.header = Some(Vec::new());
        if !read_past(&mut self.reader, &MAGIC)? {
            return Ok(false);
        }
        self.header = Some(MAGIC.to_vec());
        let mut nothing: [u8; 0] = [];
        let (mut input, mut output) = (InBuffer::around(&MAGIC), OutBuffer::around(nothing.as_mut_slice()));
        self.context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
        self.in_frame = true;
        Ok(true)
    }
}

fn empty_input() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")
}

fn zstd_error(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}

/// A reader, preceded by bytes that a search has already read from it.
type Replayed<R> = Chain<Cursor<&'static [u8]>, R>;

/// Decoder of all members of a gzip stream.
pub(super) struct GzipMembers<R> {
    /// The member being decoded.
    member: Option<GzDecoder<Replayed<R>>>,
    /// The input, between members.
    reader: Option<R>,
    /// True once a byte has been read. An empty input is no gzip stream.
    begun: bool,
    /// Number of plain bytes of the current member returned so far.
    unverified: u64,
}

impl<R: BufRead> GzipMembers<R> {
    /// Start of a member, RFC 1952, 2.3.1: ID1, ID2, and the only compression method (deflate).
    const MAGIC: &'static [u8] = &[0x1f, 0x8b, 0x08];

    pub(super) fn new(reader: R) -> Self {
        Self { member: None, reader: Some(reader), begun: false, unverified: 0 }
    }

    /// Begins a member whose first bytes `read_already` have been read from `reader`.
    fn begin(&mut self, read_already: &'static [u8], reader: R) {
        self.member = Some(GzDecoder::new(Cursor::new(read_already).chain(reader)));
    }

    /// Ends the current member, if there is one.
    fn end(&mut self) {
        if let Some(member) = self.member.take() {
            let (_, reader) = member.into_inner().into_inner();
            self.reader = Some(reader);
        }
        self.unverified = 0;
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(member) = &mut self.member {
                let count = member.read(buf)?;
                self.unverified += count as u64;
                if count > 0 {
                    return Ok(count);
                }
                self.end();
            }
            let Some(reader) = &mut self.reader else { return Ok(0) };
            if reader.fill_buf()?.is_empty() {
                return if self.begun { Ok(0) } else { Err(empty_input()) };
            }
            self.begun = true;
            if let Some(reader) = self.reader.take() {
                self.begin(&[], reader);
            }
        }
    }
}

impl<R: BufRead + Send> Decode for GzipMembers<R> {
    fn unchecked(&self) -> u64 {
        self.unverified
    }

    fn resume(&mut self) -> io::Result<bool> {
        // The failed member's magic has been read, so the search does not find it again.
        self.end();
        let Some(reader) = &mut self.reader else { return Ok(false) };
        if !read_past(reader, Self::MAGIC)? {
            return Ok(false);
        }
        if let Some(reader) = self.reader.take() {
            self.begin(Self::MAGIC, reader);
        }
        Ok(true)
    }
}

/// Reads past the next `magic`, whose bytes must all differ. Returns false if the input ends first.
fn read_past(reader: &mut impl BufRead, magic: &[u8]) -> io::Result<bool> {
    let mut matched = 0;
    loop {
        if retry(|| reader.fill_buf().map(<[u8]>::is_empty))? {
            return Ok(false);
        }
        let mut consumed = 0;
        for byte in reader.fill_buf()? {
            consumed += 1;
            matched = match magic.get(matched) {
                Some(next) if next == byte => matched + 1,
                _ => usize::from(magic.first() == Some(byte)),
            };
            if matched == magic.len() {
                break;
            }
        }
        reader.consume(consumed);
        if matched == magic.len() {
            return Ok(true);
        }
    }
}
