//! Seekable zstd: frames of their own and a table of where they stand.

use std::io;
use std::sync::Arc;

use crate::storage::input::ReadAt;

/// A seekable zstd file, read by position.
pub(super) struct SeekableZstd {
    source: Arc<dyn ReadAt>,
}

impl SeekableZstd {
    pub(super) fn open(_source: &Arc<dyn ReadAt>) -> Option<Self> {
        None
    }
}

impl ReadAt for SeekableZstd {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.source.read_exact_at(buf, position)
    }

    fn len(&self) -> u64 {
        self.source.len()
    }
}
