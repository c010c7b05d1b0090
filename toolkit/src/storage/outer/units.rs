//! Compressed streams made of units that can be decoded by themselves: zstd frames and gzip members.
//!
//! The decoders here know where a unit ends, because its checksum stands there: before that nobody
//! can tell whether what it gave is right. And they can go on behind a unit that is damaged, which is
//! what salvage needs.

use std::io::{self, BufRead, Chain, Cursor, Read};

use flate2::bufread::GzDecoder;
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

/// A reader that knows how far what it has handed out is known to be right.
pub trait Decode: Read + Send {
    /// Bytes, of those handed out last, whose checksum has not been looked at yet.
    fn unchecked(&self) -> u64;

    /// Whether the last read failed because the input ended too early: what came before is as good
    /// as it ever was.
    fn was_cut(&self) -> bool {
        false
    }

    /// After a failed read: gives the unit up and goes to the start of the next; false when there is
    /// none.
    ///
    /// # Errors
    /// When reading fails.
    fn resume(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

/// Bytes that nothing checks, or that are checked before they are handed out.
pub(crate) struct Certain(pub(crate) Box<dyn Read + Send>);

impl Read for Certain {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Decode for Certain {
    fn unchecked(&self) -> u64 {
        0
    }
}

/// A decoder that does not tell where its checksums stand: only its end shows that all was right.
pub(super) struct Opaque {
    decoder: Box<dyn Read + Send>,
    handed_out: u64,
}

impl Opaque {
    pub(super) fn new(decoder: Box<dyn Read + Send>) -> Self {
        Self { decoder, handed_out: 0 }
    }
}

impl Read for Opaque {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buf)?;
        self.handed_out += count as u64;
        if count == 0 && !buf.is_empty() {
            self.handed_out = 0;
        }
        Ok(count)
    }
}

impl Decode for Opaque {
    fn unchecked(&self) -> u64 {
        self.handed_out
    }
}

/// The frames of a zstd stream, one after the other.
pub(super) struct ZstdFrames<R> {
    reader: R,
    context: DCtx<'static>,
    /// Anything has been read: nothing at all is no zstd stream.
    begun: bool,
    /// The start of a frame has been read, its end has not.
    in_frame: bool,
    /// Plain bytes of that frame so far.
    handed_out: u64,
}

impl<R: BufRead> ZstdFrames<R> {
    /// What a frame begins with.
    const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

    /// # Errors
    /// When there is no memory for the decoder.
    pub(super) fn new(reader: R, window_log_max: u32) -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context.set_parameter(DParameter::WindowLogMax(window_log_max)).map_err(zstd_error)?;
        Ok(Self { reader, context, begun: false, in_frame: false, handed_out: 0 })
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let stored = self.reader.fill_buf()?;
            if stored.is_empty() && !self.in_frame {
                return if self.begun { Ok(0) } else { Err(nothing_at_all()) };
            }
            self.begun = true;
            let (mut input, mut output) = (InBuffer::around(stored), OutBuffer::around(&mut *buf));
            let left = self.context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
            let (taken, given) = (input.pos(), output.pos());
            self.reader.consume(taken);
            self.in_frame = left != 0;
            self.handed_out = if self.in_frame { self.handed_out + given as u64 } else { 0 };
            if given > 0 {
                return Ok(given);
            }
            if taken == 0 && self.in_frame && self.reader.fill_buf()?.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "incomplete frame"));
            }
        }
    }
}

impl<R: BufRead + Send> Decode for ZstdFrames<R> {
    fn unchecked(&self) -> u64 {
        self.handed_out
    }

    fn resume(&mut self) -> io::Result<bool> {
        // What failed at its very start must not be found again.
        if !self.in_frame {
            let skipped = self.reader.fill_buf()?.len().min(1);
            self.reader.consume(skipped);
        }
        self.in_frame = false;
        self.handed_out = 0;
        self.context.reset(ResetDirective::SessionOnly).map_err(zstd_error)?;
        if !read_past(&mut self.reader, &Self::MAGIC)? {
            return Ok(false);
        }
        let mut nothing: [u8; 0] = [];
        let (mut input, mut output) =
            (InBuffer::around(&Self::MAGIC), OutBuffer::around(nothing.as_mut_slice()));
        self.context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
        self.in_frame = true;
        Ok(true)
    }
}

fn nothing_at_all() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")
}

fn zstd_error(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}

/// A reader behind what has been read of it already.
type Replayed<R> = Chain<Cursor<&'static [u8]>, R>;

/// The members of a gzip stream, one after the other.
pub(super) struct GzipMembers<R> {
    /// The member that is being decoded. What a search has read of it stands before the reader.
    member: Option<GzDecoder<Replayed<R>>>,
    /// Between members.
    reader: Option<R>,
    /// Anything has been read: nothing at all is no gzip stream.
    begun: bool,
    /// Plain bytes of the member so far.
    handed_out: u64,
}

impl<R: BufRead> GzipMembers<R> {
    /// What a member begins with: two bytes of magic, and the only method there is.
    const MAGIC: &'static [u8] = &[0x1f, 0x8b, 0x08];

    pub(super) fn new(reader: R) -> Self {
        Self { member: None, reader: Some(reader), begun: false, handed_out: 0 }
    }

    fn begin(&mut self, read_already: &'static [u8], reader: R) {
        self.member = Some(GzDecoder::new(Cursor::new(read_already).chain(reader)));
    }

    /// Ends the member, if there is one.
    fn end(&mut self) {
        if let Some(member) = self.member.take() {
            let (_, reader) = member.into_inner().into_inner();
            self.reader = Some(reader);
        }
        self.handed_out = 0;
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(member) = &mut self.member {
                let given = member.read(buf)?;
                self.handed_out += given as u64;
                if given > 0 {
                    return Ok(given);
                }
                self.end();
            }
            let Some(reader) = &mut self.reader else { return Ok(0) };
            if reader.fill_buf()?.is_empty() {
                return if self.begun { Ok(0) } else { Err(nothing_at_all()) };
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
        self.handed_out
    }

    fn resume(&mut self) -> io::Result<bool> {
        // The member's first bytes have been read, so it is not found again.
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

/// Reads up to the end of the next `magic`, whose bytes all differ; false when there is none.
fn read_past(reader: &mut impl BufRead, magic: &[u8]) -> io::Result<bool> {
    let mut matched = 0;
    loop {
        let bytes = match reader.fill_buf() {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if bytes.is_empty() {
            return Ok(false);
        }
        let mut taken = 0;
        for byte in bytes {
            taken += 1;
            matched = match magic.get(matched) {
                Some(next) if next == byte => matched + 1,
                _ => usize::from(magic.first() == Some(byte)),
            };
            if matched == magic.len() {
                break;
            }
        }
        reader.consume(taken);
        if matched == magic.len() {
            return Ok(true);
        }
    }
}
