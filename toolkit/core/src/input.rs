//! [`Input`]: the bytes of an image, read by position ([`RandomInput`]) or once, in order ([`Stream`]).

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::location::Location;
use crate::progress::CancelToken;

mod random;
mod stream;

pub use random::{FileRun, RandomInput, ReadAt};
pub use stream::{Consumed, Decode, Stream};

/// Maximum number of bytes at the start of an image that a driver's probe receives. Our limit: the first 4
/// KiB contain the magic number of every supported format.
pub const PROBE_LEN: usize = 4096;

/// Maximum number of bytes from the end of a file that [`crate::Driver::probe_end`] receives: a footer of one
/// sector.
pub const PROBE_END_LEN: usize = 512;

/// The bytes of an image.
#[derive(Debug)]
pub struct Input {
    location: Location,
    cancel: CancelToken,
    body: InputBody,
}

/// The two kinds of input.
#[derive(Debug)]
pub enum InputBody {
    /// Bytes read by position.
    Random(Arc<dyn ReadAt>),
    /// Bytes read once, in order.
    Stream(Stream),
}

impl Input {
    /// Creates an input whose bytes are read by position: such as a file, an object in an object store, or
    /// memory.
    pub fn from_read_at(location: impl Into<Location>, source: Arc<dyn ReadAt>) -> Self {
        Self { location: location.into(), cancel: CancelToken::new(), body: InputBody::Random(source) }
    }

    /// Creates an input whose bytes are read once, in order.
    ///
    /// # Errors
    /// If the first bytes can't be read.
    pub fn from_reader(location: impl Into<Location>, reader: Box<dyn Read + Send>) -> Result<Self> {
        let location = location.into();
        let stream = Stream::plain(location.clone(), reader)?;
        Ok(Self::from_stream(location, stream))
    }

    /// Creates an input from an open stream.
    pub fn from_stream(location: impl Into<Location>, stream: Stream) -> Self {
        Self { location: location.into(), cancel: CancelToken::new(), body: InputBody::Stream(stream) }
    }

    /// Makes reads fail with [`crate::ErrorKind::Cancelled`] once the token is cancelled. This also stops
    /// opening, checking and measuring, without any code in the driver.
    #[must_use]
    pub fn cancelled_by(mut self, cancel: CancelToken) -> Self {
        if let InputBody::Stream(stream) = &mut self.body {
            stream.cancelled_by(cancel.clone());
        }
        self.cancel = cancel;
        self
    }

    /// Returns the token of [`Input::cancelled_by`]. A driver that continues after a failed read needs it to
    /// tell cancellation from damage.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Returns the location, for messages and for resolving names in the image.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Returns the length in bytes; `None` for a stream.
    pub fn len(&self) -> Option<u64> {
        match &self.body {
            InputBody::Random(source) => Some(source.len()),
            InputBody::Stream(_) => None,
        }
    }

    /// True if the input is known to be empty.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// True if the input can only be read once, in order.
    pub fn is_stream(&self) -> bool {
        matches!(self.body, InputBody::Stream(_))
    }

    /// Returns the number of bytes that a stream has read from its file or pipe; `None` if the input is read by
    /// position.
    pub fn consumed(&self) -> Option<Consumed> {
        match &self.body {
            InputBody::Stream(stream) => Some(stream.consumed()),
            InputBody::Random(_) => None,
        }
    }

    /// Returns the first bytes, up to [`PROBE_LEN`], without consuming them.
    pub fn head(&self) -> Result<Vec<u8>> {
        match &self.body {
            InputBody::Stream(stream) => Ok(stream.head().to_vec()),
            InputBody::Random(source) => {
                let len = usize::try_from(source.len()).unwrap_or(PROBE_LEN).min(PROBE_LEN);
                let mut head = vec![0; len];
                source
                    .read_exact_at(&mut head, 0)
                    .map_err(|e| read_error(e, &self.location, 0, source.compressed_offset(0)))?;
                Ok(head)
            }
        }
    }

    /// Returns the last bytes, up to [`PROBE_END_LEN`]; `None` for a stream.
    pub fn end(&self) -> Result<Option<Vec<u8>>> {
        let InputBody::Random(source) = &self.body else { return Ok(None) };
        let len = usize::try_from(source.len()).unwrap_or(PROBE_END_LEN).min(PROBE_END_LEN);
        let mut end = vec![0; len];
        let position = source.len() - len as u64;
        let compressed = source.compressed_offset(position);
        source
            .read_exact_at(&mut end, position)
            .map_err(|e| read_error(e, &self.location, position, compressed))?;
        Ok(Some(end))
    }

    /// Converts the input into one that is read by position.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream.
    pub fn into_random(self) -> Result<RandomInput> {
        match self.body {
            InputBody::Random(source) => Ok(RandomInput::new(self.location, source, self.cancel)),
            InputBody::Stream(_) => {
                Err(Error::unsupported("this format can't be read from a stream").path(self.location))
            }
        }
    }

    /// Converts the input into a stream from its start.
    ///
    /// # Errors
    /// If the first bytes can't be read.
    pub fn into_stream(self) -> Result<Stream> {
        match self.body {
            InputBody::Stream(stream) => Ok(stream),
            InputBody::Random(source) => {
                let reader = source.reader().unwrap_or_else(|| Box::new(Cursor::new(source)));
                let mut stream = Stream::plain(self.location, reader)?;
                stream.cancelled_by(self.cancel);
                Ok(stream)
            }
        }
    }

    /// Consumes the input and returns its body, for callers that wrap it, for example in a decoder.
    pub fn into_body(self) -> InputBody {
        self.body
    }

    /// Creates an input from a body.
    pub fn from_body(location: impl Into<Location>, body: InputBody) -> Self {
        Self { location: location.into(), cancel: CancelToken::new(), body }
    }

    /// Converts a range of the input, such as a member of a container, into a separate input.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream; [`crate::ErrorKind::OutOfBounds`] if the range
    /// exceeds the input.
    pub fn section(self, range: Range<u64>) -> Result<Self> {
        self.into_random()?.section(range)
    }

    /// Converts a part of a file into a separate input.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream; [`crate::ErrorKind::OutOfBounds`] if the part exceeds
    /// the file.
    pub fn part(self, part: FilePart) -> Result<Self> {
        if self.is_stream() {
            return Err(Error::unsupported("a part of a stream can't be read")
                .path(self.location)
                .hint("save the stream to a file first"));
        }
        let file = self.into_random()?;
        let end = part.len.map_or(file.len(), |len| part.start.saturating_add(len));
        file.section(part.start..end)
    }
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePart {
    /// Position of the first byte.
    pub start: u64,
    /// Length in bytes; `None` for the rest of the file.
    pub len: Option<u64>,
}

/// A range of an input that is read by position.
struct Section {
    source: Arc<dyn ReadAt>,
    /// Byte range within the source.
    range: Range<u64>,
}

impl Section {
    /// Returns the position within the source at which a read of `len` bytes begins.
    fn position_in_source(&self, len: usize, position: u64) -> io::Result<u64> {
        let end = position.checked_add(len as u64).filter(|end| *end <= self.len());
        end.map(|_| self.range.start + position).ok_or(io::ErrorKind::UnexpectedEof.into())
    }
}

impl ReadAt for Section {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.source.read_exact_at(buf, self.position_in_source(buf.len(), position)?)
    }

    fn read_unverified_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.source.read_unverified_at(buf, self.position_in_source(buf.len(), position)?)
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        let run = self.source.run(self.range.start + position)?;
        Ok(FileRun { end: run.end.min(self.range.end) - self.range.start, ..run })
    }

    fn rough_run(&self, position: u64, until: u64) -> io::Result<FileRun> {
        let until = self.range.start.saturating_add(until).min(self.range.end);
        let run = self.source.rough_run(self.range.start + position, until)?;
        Ok(FileRun { end: run.end.min(self.range.end) - self.range.start, ..run })
    }

    fn granule(&self) -> u64 {
        self.source.granule()
    }

    fn compressed_offset(&self, position: u64) -> Option<u64> {
        self.source.compressed_offset(self.range.start.checked_add(position)?)
    }

    fn concurrency(&self) -> usize {
        self.source.concurrency()
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A [`Read`] that reads a [`ReadAt`] in order, from its start to its end.
#[derive(Debug)]
pub struct Cursor {
    source: Arc<dyn ReadAt>,
    position: u64,
}

impl Cursor {
    /// Creates a reader positioned at the start of `source`.
    pub fn new(source: Arc<dyn ReadAt>) -> Self {
        Self { source, position: 0 }
    }
}

impl Read for Cursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.source.len().saturating_sub(self.position);
        let count = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.source.read_exact_at(&mut buf[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Converts the error of a read that failed at `position`, which is `compressed` in a compressed file.
/// Decoders report damage as `InvalidData` or
/// `UnexpectedEof`, so these become [`crate::ErrorKind::Corrupt`].
fn read_error(e: io::Error, location: &Location, position: u64, compressed: Option<u64>) -> Error {
    let carried = e.get_ref().is_some_and(|inner| inner.is::<Error>());
    let damaged = matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
    let error = if damaged && !carried {
        let text = e.to_string();
        let early = text.is_empty() || e.get_ref().is_none();
        Error::corrupt(if early { "the file ends early".to_owned() } else { text })
            .remedied_by(crate::Remedy::Salvage("copy it again, or use a backup".into()))
    } else {
        Error::io("read", e)
    };
    match error.kind() {
        crate::ErrorKind::Cancelled => error,
        crate::ErrorKind::Unsupported => error.path(location),
        _ => error.path(location).at(position).compressed_at(compressed),
    }
}

/// Fills `buf` as far as the input reaches. Returns the number of bytes read, which is less than `buf.len()`
/// only at the end of the input. Retries interrupted reads.
pub fn read_full(reader: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match retry(|| reader.read(&mut buf[filled..]))? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Repeats a call for as long as a signal interrupts it (EINTR).
pub fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An input in memory.
    struct Memory(Vec<u8>);

    impl ReadAt for Memory {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let start = usize::try_from(position).map_err(io::Error::other)?;
            let bytes = self.0.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(bytes);
            Ok(())
        }

        fn len(&self) -> u64 {
            self.0.len() as u64
        }
    }

    #[test]
    fn section_exposes_only_its_own_range() {
        let whole = || Input::from_read_at("a.tar", Arc::new(Memory((0..100).collect())));
        let section = whole().section(10..20).expect("within");
        assert_eq!(section.len(), Some(10));
        assert_eq!(section.head().expect("read"), (10..20).collect::<Vec<u8>>());
        let random = section.into_random().expect("random");
        assert!(random.read_exact_at(&mut [0; 2], 9).is_err(), "a section does not leak its neighbours");
        assert!(whole().section(90..101).is_err());
    }
}
