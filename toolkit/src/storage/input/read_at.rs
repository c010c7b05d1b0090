//! What bytes that are read by position must offer, and files that do.

use std::fs::File;
use std::io;

use crate::storage::os::{self, FileRun};
use crate::storage::runs::Runs;

/// Bytes that can be read by position.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` from `position`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the range leaves the input.
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The run of data or hole around `position`, which is below the length.
    ///
    /// # Errors
    /// When the system can't tell.
    fn run(&self, _position: u64) -> io::Result<FileRun> {
        Ok(FileRun { end: self.len(), is_data: true })
    }

    /// The run around `position`, or the part of it up to `until`; what is a hole may be called data
    /// if there is data too before `until`. For who can do without the exact answer where it is costly.
    ///
    /// # Errors
    /// Those of [`ReadAt::run`].
    fn rough_run(&self, position: u64, _until: u64) -> io::Result<FileRun> {
        self.run(position)
    }

    /// Reading costs least in multiples of this many bytes.
    fn granule(&self) -> u64 {
        1
    }

    /// The file, when the bytes stand in one as they are.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// A regular file or block device.
pub(super) struct RandomFile {
    file: File,
    len: u64,
    runs: Runs,
    lives_in_memory: bool,
    /// What was read leaves the page cache at once: so large a file would push out all else.
    is_passing: bool,
}

impl RandomFile {
    pub(super) fn new(file: File, len: u64) -> Self {
        let lives_in_memory = os::lives_in_memory(&file);
        let is_passing = !lives_in_memory && os::memory_len().is_some_and(|memory| len > memory / 2);
        Self { file, len, runs: Runs::default(), lives_in_memory, is_passing }
    }
}

impl ReadAt for RandomFile {
    fn read_exact_at(&self, mut buf: &mut [u8], mut position: u64) -> io::Result<()> {
        let (start, len) = (position, buf.len() as u64);
        while !buf.is_empty() {
            match os::read_at(&self.file, buf, position) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buf = &mut buf[count..];
                    position += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.is_passing {
            os::forget_range(&self.file, start, len);
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        self.runs.find(&self.file, self.len, position)
    }

    fn rough_run(&self, position: u64, until: u64) -> io::Result<FileRun> {
        if !self.lives_in_memory {
            return self.run(position);
        }
        let data = os::next_data(&self.file, position, self.len)?;
        let is_data = data < until;
        Ok(FileRun { end: if is_data { until.min(self.len) } else { data }, is_data })
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
