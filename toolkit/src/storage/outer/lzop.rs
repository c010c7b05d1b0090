//! The lzop container: a header, then blocks of LZO1X data with checksums.

use std::io::{self, Read};

/// The first nine bytes of an lzop file.
pub(super) const MAGIC: [u8; 9] = [0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a, 0x0a];

/// Reads what an lzop file holds.
pub(super) struct LzopReader<R> {
    inner: R,
}

impl<R: Read> LzopReader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner }
    }
}

impl<R: Read> Read for LzopReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }
}
