//! Outputs: a file or device written by position, or a stream written in order.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::input::Input;
use super::os;
use crate::error::{Error, Result};

/// Where an image is written to. Cloning shares it; all methods take `&self`.
#[derive(Clone)]
pub struct Output(Arc<Inner>);

struct Inner {
    /// The final name, for messages.
    path: PathBuf,
    target: Target,
    written: AtomicU64,
    /// The furthest end of what was written.
    reached: AtomicU64,
}

enum Target {
    File(FileTarget),
    Stream(Mutex<StreamTarget>),
}

struct FileTarget {
    file: File,
    /// `None`: grows as it is written. Otherwise the length of an existing target, kept as it is.
    capacity: Option<u64>,
    /// What is not written reads as zeros.
    reads_as_zero: bool,
    is_block_device: bool,
}

struct StreamTarget {
    writer: Box<dyn Write + Send>,
    position: u64,
}

/// Zeros for targets that have to be told.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Slices in one vectored write: Linux takes 1024 (UIO_MAXIOV).
const MAX_SLICES: usize = 1024;

impl Output {
    /// A new file, empty: it grows as it is written, and what is not written reads as zeros.
    pub fn from_new_file(path: impl Into<PathBuf>, file: File) -> Self {
        Self::from_target(
            path,
            Target::File(FileTarget { file, capacity: None, reads_as_zero: true, is_block_device: false }),
        )
    }

    /// A file or block device that exists and keeps its length. `reads_as_zero`: the caller knows
    /// that it holds zeros.
    ///
    /// # Errors
    /// When its length can't be found.
    pub fn from_existing(path: impl Into<PathBuf>, file: File, reads_as_zero: bool) -> Result<Self> {
        let path = path.into();
        let describe = |e| Error::io("find the length", e).path(&path);
        let capacity = Some(os::file_len(&file).map_err(describe)?);
        let meta = file.metadata().map_err(describe)?;
        let is_block_device = os::classify(&meta) == os::FileClass::BlockDevice;
        Ok(Self::from_target(
            path,
            Target::File(FileTarget { file, capacity, reads_as_zero, is_block_device }),
        ))
    }

    /// A stream: standard output, a pipe, a socket.
    pub fn from_writer(path: impl Into<PathBuf>, writer: Box<dyn Write + Send>) -> Self {
        Self::from_target(path, Target::Stream(Mutex::new(StreamTarget { writer, position: 0 })))
    }

    fn from_target(path: impl Into<PathBuf>, target: Target) -> Self {
        Self(Arc::new(Inner {
            path: path.into(),
            target,
            written: AtomicU64::new(0),
            reached: AtomicU64::new(0),
        }))
    }

    /// The final name, for messages.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether bytes can only be appended.
    pub fn is_stream(&self) -> bool {
        matches!(self.0.target, Target::Stream(_))
    }

    /// Whether `other` is a handle to the same output.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether several writes at once get further than one after the other: into a block device. A
    /// file is locked for the time of a write, and a stream is in order.
    pub fn takes_writes_at_once(&self) -> bool {
        matches!(&self.0.target, Target::File(target) if target.is_block_device)
    }

    /// Whether zeros have to be written (they read as zeros without that in a new file).
    pub fn needs_zeros(&self) -> bool {
        match &self.0.target {
            Target::File(target) => !target.reads_as_zero,
            Target::Stream(_) => true,
        }
    }

    /// The fixed length of an existing target, bytes.
    pub fn capacity(&self) -> Option<u64> {
        match &self.0.target {
            Target::File(target) => target.capacity,
            Target::Stream(_) => None,
        }
    }

    /// Bytes written so far, without zeros that needed no writing.
    pub fn written(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// The furthest end of what was written, bytes from the start.
    pub fn reached(&self) -> u64 {
        self.0.reached.load(Ordering::Relaxed)
    }

    /// The file, for copies inside the kernel.
    pub fn file(&self) -> Option<&File> {
        match &self.0.target {
            Target::File(target) => Some(&target.file),
            Target::Stream(_) => None,
        }
    }

    /// Counts bytes that were written through [`Output::file`].
    pub fn count_written(&self, len: u64) {
        self.0.written.fetch_add(len, Ordering::Relaxed);
    }

    /// Writes `bytes` at `position`.
    ///
    /// # Errors
    /// When it fails; or for a stream, when `position` is not where it stands.
    pub fn write_at(&self, bytes: &[u8], position: u64) -> Result<()> {
        self.write_slices_at(&mut [IoSlice::new(bytes)], position)
    }

    /// Writes `slices` one after the other from `position`, in as few calls as possible.
    ///
    /// # Errors
    /// Those of [`Output::write_at`].
    pub fn write_slices_at(&self, mut slices: &mut [IoSlice<'_>], position: u64) -> Result<()> {
        let total: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        let mut at = position;
        match &self.0.target {
            Target::File(target) => {
                self.check_capacity(target, position, total)?;
                IoSlice::advance_slices(&mut slices, 0);
                while !slices.is_empty() {
                    let batch = &slices[..slices.len().min(MAX_SLICES)];
                    match os::write_vectored_at(&target.file, batch, at) {
                        Ok(0) => return Err(self.write_error(io::ErrorKind::WriteZero.into(), at)),
                        Ok(count) => {
                            at += count as u64;
                            IoSlice::advance_slices(&mut slices, count);
                        }
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(self.write_error(e, at)),
                    }
                }
            }
            Target::Stream(stream) => {
                let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
                self.check_order(stream.position, position)?;
                for slice in slices {
                    stream.writer.write_all(slice).map_err(|e| self.write_error(e, position))?;
                }
                stream.position += total;
            }
        }
        self.0.written.fetch_add(total, Ordering::Relaxed);
        self.0.reached.fetch_max(position + total, Ordering::Relaxed);
        Ok(())
    }

    /// Makes `len` bytes from `position` read as zeros, the cheapest way that the target has: nothing
    /// on a new file, a hole or the device's own zeroing, plain zeros elsewhere.
    ///
    /// # Errors
    /// Those of [`Output::write_at`].
    pub fn write_zeros_at(&self, position: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if let Target::File(target) = &self.0.target {
            self.check_capacity(target, position, len)?;
            if target.reads_as_zero {
                return Ok(());
            }
            let done = os::zero_range(&target.file, position, len, target.is_block_device)
                .map_err(|e| self.write_error(e, position))?;
            if done {
                return Ok(());
            }
        }
        self.write_plain_zeros_at(position, len)
    }

    /// Writes zeros as bytes, also where a hole would do (`-S 0`).
    ///
    /// # Errors
    /// Those of [`Output::write_at`].
    pub fn write_plain_zeros_at(&self, position: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZEROS.len() as u64);
            let slice = &ZEROS[..usize::try_from(count).unwrap_or(ZEROS.len())];
            self.write_at(slice, position + done)?;
            done += count;
        }
        Ok(())
    }

    /// Reads back what was written; what was not reads as zeros in a new file, also past its end.
    ///
    /// # Errors
    /// When it fails, or for a stream.
    pub fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let Target::File(target) = &self.0.target else {
            return Err(Error::unsupported("a stream can't be read back").path(self.path()));
        };
        let mut filled = 0;
        while filled < buf.len() {
            match os::read_at(&target.file, &mut buf[filled..], position + filled as u64) {
                Ok(0) => {
                    buf[filled..].fill(0);
                    break;
                }
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read back", e).path(self.path()).at(position)),
            }
        }
        Ok(())
    }

    /// The output as an input, to be read back before it has its final name.
    ///
    /// # Errors
    /// When it can't be opened again, or is a stream.
    pub fn reopen(&self) -> Result<Input> {
        match &self.0.target {
            Target::File(target) => {
                let file =
                    target.file.try_clone().map_err(|e| Error::io("open again", e).path(self.path()))?;
                Input::from_file(self.path().to_owned(), file)
            }
            Target::Stream(_) => Err(Error::unsupported("a stream can't be read back").path(self.path())),
        }
    }

    /// Flushes, and lets the system forget what it holds of it in memory: what is read after this
    /// comes from the disk, where the system can do that.
    ///
    /// # Errors
    /// Those of [`Output::sync`].
    pub fn sync_and_forget(&self) -> Result<()> {
        self.sync()?;
        if let Some(file) = self.file() {
            os::forget_range(file, 0, 0);
        }
        Ok(())
    }

    /// Sets the length of a new file, so that zeros at its end need no writing. An existing target
    /// keeps its length; a stream is not changed.
    ///
    /// # Errors
    /// When the file system refuses the length.
    pub fn set_len(&self, len: u64) -> Result<()> {
        match &self.0.target {
            Target::File(target) if target.capacity.is_none() => {
                target.file.set_len(len).map_err(|e| self.write_error(e, len))
            }
            _ => Ok(()),
        }
    }

    /// Allocates space without writing, for preallocated images.
    ///
    /// # Errors
    /// When there is not enough.
    pub fn allocate(&self, position: u64, len: u64) -> Result<()> {
        match &self.0.target {
            Target::File(target) if target.capacity.is_none() && len > 0 => {
                os::allocate_range(&target.file, position, len).map_err(|e| self.write_error(e, position))
            }
            _ => Ok(()),
        }
    }

    /// Flushes to stable storage (a stream: to its reader).
    ///
    /// # Errors
    /// When the system reports that earlier writes failed.
    pub fn sync(&self) -> Result<()> {
        let flushed = match &self.0.target {
            Target::File(target) => target.file.sync_all(),
            Target::Stream(stream) => stream.lock().unwrap_or_else(PoisonError::into_inner).writer.flush(),
        };
        flushed.map_err(|e| Error::io("flush", e).path(self.path()))
    }

    fn check_capacity(&self, target: &FileTarget, position: u64, len: u64) -> Result<()> {
        let end = position.checked_add(len);
        match target.capacity {
            Some(capacity) if end.is_none_or(|end| end > capacity) => Err(Error::out_of_bounds(format!(
                "the target holds {capacity} bytes; {len} bytes at {position} do not fit"
            ))
            .path(self.path())),
            _ => Ok(()),
        }
    }

    fn check_order(&self, stands_at: u64, wanted: u64) -> Result<()> {
        if stands_at == wanted {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "the content does not come in order, and the output can't be written out of order (at {stands_at}, next piece at {wanted})"
        ))
        .path(self.path())
        .hint("write to a file instead of a pipe"))
    }

    fn write_error(&self, e: io::Error, position: u64) -> Error {
        let hint = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if self.capacity().is_none() => {
                Some("free some space, or choose another directory")
            }
            io::ErrorKind::FileTooLarge => {
                Some("the file system or a limit (ulimit -f) does not allow files of this size")
            }
            _ => None,
        };
        let error = Error::io("write", e).path(self.path()).at(position);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
