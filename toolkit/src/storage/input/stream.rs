//! An input that is read once, in order.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::PROBE_LEN;
use super::read_at::ReadAt;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::CancelToken;
use crate::storage::outer::{self, Certain, Decode};

/// An input that is read once, in order.
pub struct Stream {
    path: PathBuf,
    /// Never locked: the mutex only makes the stream `Sync`, so that sources may hold one.
    reader: Mutex<Box<dyn Decode>>,
    /// The first bytes, read ahead for probing.
    pub(super) head: Vec<u8>,
    position: u64,
    pub(super) cancel: CancelToken,
}

impl Stream {
    pub(super) fn plain(path: PathBuf, reader: Box<dyn Read + Send>) -> Result<Self> {
        Self::new(path, Box::new(Certain(reader)))
    }

    pub(super) fn new(path: PathBuf, mut reader: Box<dyn Decode>) -> Result<Self> {
        let mut head = vec![0; PROBE_LEN];
        let filled = fill(&mut *reader, &mut head).map_err(|e| read_error(e, &path, 0))?;
        head.truncate(filled);
        Ok(Self { path, reader: Mutex::new(reader), head, position: 0, cancel: CancelToken::new() })
    }

    /// The name for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Fills as much of `buf` as there is; less than all only at the end.
    ///
    /// # Errors
    /// When reading or decompressing fails.
    pub fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let position = self.position;
        fill(self, buf).map_err(|e| read_error(e, &self.path, position))
    }

    /// Up to where the content is known to be right, because a checksum of the compression said so or
    /// there is none. What lies between this and [`Stream::position`] may be found wrong later.
    pub fn checked_until(&mut self) -> u64 {
        let given = self.position.max(self.head.len() as u64);
        given.saturating_sub(self.decoder().unchecked())
    }

    /// Whether the last read failed only because the compressed data ended early: then what was read
    /// before is right.
    pub fn was_cut(&mut self) -> bool {
        self.decoder().was_cut()
    }

    /// After a failed read: goes on where decompressing can begin anew, at the next frame or member;
    /// false when there is none. What is read then follows the fault, at a distance that nobody knows;
    /// what was not checked before it is given up.
    ///
    /// # Errors
    /// When reading fails.
    pub fn resume(&mut self) -> Result<bool> {
        let position = self.position;
        self.decoder().resume().map_err(|e| read_error(e, &self.path, position))
    }

    fn decoder(&mut self) -> &mut dyn Decode {
        &mut **self.reader.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        let from_head = usize::try_from(self.position).ok().and_then(|at| self.head.get(at..)).unwrap_or(&[]);
        let count = if from_head.is_empty() {
            self.reader.get_mut().unwrap_or_else(PoisonError::into_inner).read(buf)?
        } else {
            let count = from_head.len().min(buf.len());
            buf[..count].copy_from_slice(&from_head[..count]);
            count
        };
        self.position += count as u64;
        Ok(count)
    }
}

/// Reads a random input in order.
pub(super) struct Cursor {
    pub(super) source: Arc<dyn ReadAt>,
    pub(super) position: u64,
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

fn fill(reader: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match reader.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// A failed read: decoders report damage as `InvalidData` or `UnexpectedEof`.
pub(super) fn read_error(e: io::Error, path: &Path, position: u64) -> Error {
    if let Some(refusal) = outer::Refusal::within(&e) {
        return refusal.path(path);
    }
    let cancelled = |inner: &Error| inner.kind() == ErrorKind::Cancelled;
    if e.get_ref().and_then(|inner| inner.downcast_ref()).is_some_and(cancelled) {
        return Error::cancelled("interrupted");
    }
    let damaged = matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
    let error = if damaged {
        let text = e.to_string();
        Error::corrupt(if text.is_empty() { "the file ends early".to_owned() } else { text })
            .hint("copy it again, or use a backup; --salvage restores what is whole of an archive")
    } else {
        Error::io("read", e)
    };
    error.path(path).at(position)
}
