//! Files and block devices as inputs and outputs, read and written by position.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::Arc;

use imgtool_core::input::retry;
use imgtool_core::{Error, FileRun, Location, Memory, Output, ReadAt, Result, WriteAt};

use crate::os;
use crate::runs::Runs;

/// A regular file or block device opened for reading.
pub(crate) struct RandomFile {
    file: Arc<File>,
    len: u64,
    runs: Runs,
    lives_in_memory: bool,
    /// True if reads drop their pages from the page cache: a file this large would displace everything else.
    drops_pages: bool,
}

impl RandomFile {
    pub(crate) fn new(file: Arc<File>, len: u64, memory: &Memory) -> Self {
        let lives_in_memory = os::lives_in_memory(&file);
        let drops_pages = !lives_in_memory && os::memory_len().is_some_and(|memory| len > memory / 2);
        Self { file, len, runs: Runs::new(memory), lives_in_memory, drops_pages }
    }
}

impl ReadAt for RandomFile {
    fn read_exact_at(&self, mut buf: &mut [u8], mut position: u64) -> io::Result<()> {
        let (start, len) = (position, buf.len() as u64);
        while !buf.is_empty() {
            match retry(|| os::read_at(&self.file, buf, position))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => {
                    buf = &mut buf[count..];
                    position += count as u64;
                }
            }
        }
        if self.drops_pages {
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

/// A file or block device opened for writing.
struct FileTarget {
    file: File,
    /// Fixed length in bytes of an existing target; `None` for a new file, which grows.
    capacity: Option<u64>,
    reads_as_zero: bool,
    is_block_device: bool,
}

/// Creates an output over a new, empty file. The file grows with each write, and bytes that were never
/// written read as zeros.
pub fn new_file(location: impl Into<Location>, file: File) -> Output {
    let target = FileTarget { file, capacity: None, reads_as_zero: true, is_block_device: false };
    Output::from_write_at(location, Box::new(target))
}

/// Creates an output over an existing file or block device, which keeps its length. `reads_as_zero` is true
/// if it is known to contain only zeros.
///
/// # Errors
/// If its length can't be determined.
pub fn existing(location: impl Into<Location>, file: File, reads_as_zero: bool) -> Result<Output> {
    let location = location.into();
    let describe = |e| Error::io("find the length", e).path(&location);
    let capacity = Some(os::file_len(&file).map_err(describe)?);
    let meta = file.metadata().map_err(describe)?;
    let is_block_device = os::classify(&meta) == os::FileClass::BlockDevice;
    let target = FileTarget { file, capacity, reads_as_zero, is_block_device };
    Ok(Output::from_write_at(location, Box::new(target)))
}

/// Creates an output over a file or block device that contains an image, to change it in place. A file grows
/// as it is written.
///
/// # Errors
/// If its length can't be determined.
pub fn existing_image(location: impl Into<Location>, file: File) -> Result<Output> {
    let location = location.into();
    let describe = |e| Error::io("find the length", e).path(&location);
    let meta = file.metadata().map_err(describe)?;
    let is_block_device = os::classify(&meta) == os::FileClass::BlockDevice;
    let capacity = is_block_device.then(|| os::file_len(&file)).transpose().map_err(describe)?;
    let target = FileTarget { file, capacity, reads_as_zero: false, is_block_device };
    Ok(Output::from_write_at(location, Box::new(target)))
}

impl WriteAt for FileTarget {
    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        os::write_vectored_at(&self.file, slices, position)
    }

    fn zero_range(&self, position: u64, len: u64) -> io::Result<bool> {
        os::zero_range(&self.file, position, len, self.is_block_device)
    }

    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        os::read_at(&self.file, buf, position)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // A file is shorter than 2^63 bytes (off_t).
        if i64::try_from(len).is_err() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.file.set_len(len)
    }

    fn allocate(&self, position: u64, len: u64) -> io::Result<()> {
        os::allocate_range(&self.file, position, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn forget(&self) {
        os::forget_range(&self.file, 0, 0);
    }

    fn capacity(&self) -> Option<u64> {
        self.capacity
    }

    fn reads_as_zero(&self) -> bool {
        self.reads_as_zero
    }

    fn prefers_concurrent_writes(&self) -> bool {
        self.is_block_device
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn reopen(&self, memory: &Memory) -> io::Result<Arc<dyn ReadAt>> {
        let file = self.file.try_clone()?;
        let len = os::file_len(&file)?;
        Ok(Arc::new(RandomFile::new(Arc::new(file), len, memory)))
    }
}

/// Writes all of `bytes` to `file`, starting at `position`.
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut position: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry(|| os::write_vectored_at(file, &[IoSlice::new(bytes)], position))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                bytes = &bytes[count..];
                position += count as u64;
            }
        }
    }
    Ok(())
}
