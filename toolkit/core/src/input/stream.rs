//! Inputs that are read once, in order: the trait [`Decode`] and its wrapper [`Stream`].

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{PROBE_LEN, read_error, read_full};
use crate::error::{Error, Result};
use crate::location::Location;
use crate::progress::CancelToken;
use crate::sync;

/// A decoder: a reader that reports how much of its output is verified, and that can resume after damage.
pub trait Decode: Read + Send {
    /// Returns how many of the last bytes read are not verified, because their checksum comes later in the
    /// stream.
    fn unchecked(&self) -> u64 {
        0
    }

    /// True if the last read failed only because the compressed data ended early.
    fn was_truncated(&self) -> bool {
        false
    }

    /// Skips to the next position where decoding can start, after a failed read. Returns false if none
    /// follows.
    fn resume(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

/// Number of bytes that a stream has read from its file or pipe: if the stream is decoded, the compressed
/// bytes that the outermost decoder has taken. Clones share the number.
#[derive(Debug, Clone, Default)]
pub struct Consumed(Arc<AtomicU64>);

impl Consumed {
    /// Returns the number of bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts more bytes.
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A reader of bytes that need no decoding.
struct Plain {
    reader: Box<dyn Read + Send>,
    consumed: Consumed,
}

impl Read for Plain {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.consumed.add(count);
        Ok(count)
    }
}

impl Decode for Plain {}

/// An input that is read once, in order.
#[derive(Debug)]
pub struct Stream {
    location: Location,
    /// Accessed only through `get_mut`. The mutex makes the stream `Sync`, which sources must be.
    reader: Mutex<Box<dyn Decode>>,
    /// The first bytes, read ahead for probing.
    head: Vec<u8>,
    position: u64,
    consumed: Consumed,
    /// True if the stream is decoded.
    is_decoded: bool,
    cancel: CancelToken,
}

impl Stream {
    /// Creates a stream of bytes that need no decoding.
    ///
    /// # Errors
    /// If the first bytes can't be read.
    pub fn plain(location: impl Into<Location>, reader: Box<dyn Read + Send>) -> Result<Self> {
        let consumed = Consumed::default();
        let plain = Plain { reader, consumed: consumed.clone() };
        Self::begin(location.into(), Box::new(plain), consumed, false)
    }

    /// Creates a stream over a decoder, which reads from the stream that `consumed` belongs to.
    ///
    /// # Errors
    /// If the first bytes can't be read.
    pub fn new(location: impl Into<Location>, reader: Box<dyn Decode>, consumed: Consumed) -> Result<Self> {
        Self::begin(location.into(), reader, consumed, true)
    }

    /// Creates a stream and reads its first bytes.
    fn begin(
        location: Location,
        mut reader: Box<dyn Decode>,
        consumed: Consumed,
        is_decoded: bool,
    ) -> Result<Self> {
        let mut head = vec![0; PROBE_LEN];
        let filled = read_full(&mut *reader, &mut head).map_err(|e| {
            let compressed = is_decoded.then(|| consumed.bytes());
            read_error(e, &location, 0, compressed)
        })?;
        head.truncate(filled);
        let (reader, cancel) = (Mutex::new(reader), CancelToken::new());
        Ok(Self { location, reader, head, position: 0, consumed, is_decoded, cancel })
    }

    /// See [`crate::Input::cancelled_by`].
    pub fn cancelled_by(&mut self, cancel: CancelToken) {
        self.cancel = cancel;
    }

    /// Returns the location, for messages.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Returns the first bytes, up to [`PROBE_LEN`], without consuming them.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Returns the number of bytes that the caller has read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Returns the number of bytes that the stream has read from its file or pipe, decoders included.
    pub fn consumed(&self) -> Consumed {
        self.consumed.clone()
    }

    /// Fills `buf` as far as the stream reaches. Returns the number of bytes read, which is less than
    /// `buf.len()` only at the end of the stream.
    pub fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let position = self.position;
        read_full(self, buf).map_err(|e| self.read_error(e, position))
    }

    /// Returns the position up to which the content is final: verified by a checksum of the outer
    /// compression, or not covered by one. Bytes between it and [`Stream::position`] may still turn out to be
    /// damaged.
    pub fn checked_until(&mut self) -> u64 {
        let decoded = self.position.max(self.head.len() as u64);
        decoded.saturating_sub(self.decoder().unchecked())
    }

    /// True if the last read failed only because the compressed data ended early. In this case, unlike after
    /// damage, the bytes already read are most likely intact even if unverified.
    pub fn was_truncated(&mut self) -> bool {
        self.decoder().was_truncated()
    }

    /// Skips to the next frame or member, after a failed read; returns false if none follows. An unknown
    /// number of bytes is missing in between. Call [`Stream::checked_until`] first: afterwards, it counts
    /// unverified bytes before the fault as final.
    pub fn resume(&mut self) -> Result<bool> {
        let position = self.position;
        self.decoder().resume().map_err(|e| self.read_error(e, position))
    }

    /// True if a decoder makes the bytes of the stream.
    pub fn is_decoded(&self) -> bool {
        self.is_decoded
    }

    /// Returns the position in the compressed file that the decoder has reached; `None` if the stream is not
    /// decoded.
    pub fn compressed_position(&self) -> Option<u64> {
        self.is_decoded.then(|| self.consumed.bytes())
    }

    fn read_error(&self, e: io::Error, position: u64) -> Error {
        read_error(e, &self.location, position, self.compressed_position())
    }

    fn decoder(&mut self) -> &mut dyn Decode {
        &mut **sync::get_mut(&mut self.reader)
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        let from_head = usize::try_from(self.position).ok().and_then(|at| self.head.get(at..)).unwrap_or(&[]);
        let count = if from_head.is_empty() {
            sync::get_mut(&mut self.reader).read(buf)?
        } else {
            let count = from_head.len().min(buf.len());
            buf[..count].copy_from_slice(&from_head[..count]);
            count
        };
        self.position += count as u64;
        Ok(count)
    }
}
