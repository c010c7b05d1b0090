//! The bytes of an archive in order: from a stream, or from a file without reading what is skipped.

use std::io::{self, Read};

use imgtool_toolkit::{Input, RandomInput, Result, Stream};

/// Bytes skipped at a time in a stream. Ours.
const SKIP_CHUNK: usize = 64 * 1024;

/// Reading forward.
pub(crate) trait ArchiveBytes {
    /// Where reading goes on.
    fn position(&self) -> u64;

    /// Bytes that are left, if that is known.
    fn remaining(&self) -> Option<u64>;

    /// Fills as much of `buf` as there is; less than all only at the end.
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize>;

    /// Skips `len` bytes, or fewer at the end; returns how many.
    fn skip(&mut self, len: u64) -> Result<u64>;
}

impl ArchiveBytes for Stream {
    fn position(&self) -> u64 {
        Stream::position(self)
    }

    fn remaining(&self) -> Option<u64> {
        None
    }

    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        Stream::read_full(self, buf)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let mut chunk = [0; SKIP_CHUNK];
        let mut skipped = 0;
        while skipped < len {
            let want = usize::try_from(len - skipped).unwrap_or(SKIP_CHUNK).min(SKIP_CHUNK);
            let got = Stream::read_full(self, &mut chunk[..want])?;
            skipped += got as u64;
            if got < want {
                break;
            }
        }
        Ok(skipped)
    }
}

/// A file read forward; skipping costs nothing.
pub(crate) struct Cursor {
    input: RandomInput,
    position: u64,
}

impl Cursor {
    pub(crate) fn new(input: RandomInput) -> Self {
        Self { input, position: 0 }
    }

    fn left(&self) -> u64 {
        self.input.len().saturating_sub(self.position)
    }

    /// The same file as a stream from its start.
    pub(crate) fn into_stream(self) -> Result<Stream> {
        let path = self.input.path().to_owned();
        let restarted = Self { position: 0, ..self };
        Input::from_stream(path, Box::new(restarted))?.into_stream()
    }
}

impl ArchiveBytes for Cursor {
    fn position(&self) -> u64 {
        self.position
    }

    fn remaining(&self) -> Option<u64> {
        Some(self.left())
    }

    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let count = usize::try_from(self.left()).unwrap_or(usize::MAX).min(buf.len());
        self.input.read_exact_at(&mut buf[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let skipped = len.min(self.left());
        self.position += skipped;
        Ok(skipped)
    }
}

impl Read for Cursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_full(buf).map_err(io::Error::other)
    }
}
