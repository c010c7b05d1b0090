//! Forward reading of an archive, from a stream or from a file. In a file, skipping reads nothing.

use std::io::{self, Read};

use imgtool_core::{RandomInput, Result, Stream};

/// Number of bytes read and dropped at a time to skip in a stream. Our choice.
const SKIP_CHUNK: usize = 64 * 1024;

/// Forward reader over the bytes of an archive.
pub(crate) trait ArchiveBytes {
    /// Returns the archive offset of the next byte.
    fn position(&self) -> u64;

    /// Returns the number of bytes left, or `None` if the length of the input is unknown.
    fn remaining(&self) -> Option<u64>;

    /// Fills `buf` and returns the number of bytes read, fewer than `buf.len()` only at the end of the input.
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize>;

    /// Like [`ArchiveBytes::read_full`], for an extent header, whose checksum the caller verifies.
    fn read_header(&mut self, buf: &mut [u8]) -> Result<usize> {
        self.read_full(buf)
    }

    /// Skips `len` bytes and returns the number skipped, fewer than `len` only at the end of the input.
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

/// Forward reader over a file. Skipping reads nothing.
pub(crate) struct FileCursor {
    input: RandomInput,
    position: u64,
}

impl FileCursor {
    pub(crate) fn new(input: RandomInput) -> Self {
        Self::at(input, 0)
    }

    /// Creates a reader that starts at `position`.
    pub(crate) fn at(input: RandomInput, position: u64) -> Self {
        Self { input, position }
    }

    fn left(&self) -> u64 {
        self.input.len().saturating_sub(self.position)
    }

    /// Returns the number of bytes, of `wanted` bytes, that are left.
    fn count_left(&self, wanted: usize) -> usize {
        usize::try_from(self.left()).unwrap_or(usize::MAX).min(wanted)
    }

    /// Converts the cursor into a stream from the start of the file, whatever its position.
    pub(crate) fn into_stream(self) -> Result<Stream> {
        let location = self.input.location().clone();
        Stream::plain(location, Box::new(Self { position: 0, ..self }))
    }
}

impl ArchiveBytes for FileCursor {
    fn position(&self) -> u64 {
        self.position
    }

    fn remaining(&self) -> Option<u64> {
        Some(self.left())
    }

    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let count = self.count_left(buf.len());
        self.input.read_exact_at(&mut buf[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }

    fn read_header(&mut self, buf: &mut [u8]) -> Result<usize> {
        let count = self.count_left(buf.len());
        self.input.read_unverified_at(&mut buf[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let skipped = len.min(self.left());
        self.position += skipped;
        Ok(skipped)
    }
}

impl Read for FileCursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.read_full(buf)?)
    }
}
