//! [`Output`]: the bytes of a new image, written by position ([`WriteAt`]) or as a stream.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::input::{Input, ReadAt, retry};
use crate::location::Location;
use crate::memory::Memory;
use crate::sync::lock;
use crate::zero::zero_slices;

/// A target that is written by position: a file, a block device.
pub trait WriteAt: Send + Sync {
    /// Writes `slices` one after the other, starting at `position`. Returns the number of bytes written,
    /// which may be less than their total length.
    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize>;

    /// Makes a range read as zeros without writing zeros. Returns false if the target can't do that.
    fn zero_range(&self, _position: u64, _len: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Fills `buf` with the bytes starting at `position`, as far as the target reaches. Returns the number of
    /// bytes read.
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize>;

    /// Sets the length in bytes. Called only if [`WriteAt::capacity`] is `None`.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Allocates space for a range without writing it. Called only if [`WriteAt::capacity`] is `None`.
    fn allocate(&self, _position: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Flushes all writes to stable storage.
    fn sync(&self) -> io::Result<()>;

    /// Drops cached pages of the target, so that later reads come from the storage.
    fn forget(&self) {}

    /// Returns the fixed length of an existing target, in bytes; `None` if the target grows as it is written.
    fn capacity(&self) -> Option<u64>;

    /// True if bytes that were never written read as zeros.
    fn reads_as_zero(&self) -> bool;

    /// True if concurrent writes are faster than sequential ones, as on a block device. On a regular file
    /// they are not, since the kernel locks the file for the duration of a write.
    fn prefers_concurrent_writes(&self) -> bool {
        false
    }

    /// Returns the underlying file, if any, for copies inside the kernel.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Opens the target for reading.
    fn reopen(&self, memory: &Memory) -> io::Result<Arc<dyn ReadAt>>;
}

/// Target of an image's bytes. Clones share the target and can write from several threads.
#[derive(Clone)]
pub struct Output(Arc<Inner>);

struct Inner {
    /// Final location, for messages.
    location: Location,
    target: Target,
    written: AtomicU64,
    /// Highest end position of all writes so far, in bytes.
    reached: AtomicU64,
    /// True once a range was zeroed without writing zeros.
    zeroed: AtomicBool,
    /// True once the length was set, or space was allocated.
    resized: AtomicBool,
}

enum Target {
    Positional(Box<dyn WriteAt>),
    Stream(Mutex<StreamTarget>),
    /// A stream inside another sink, which compresses or frames its bytes and writes them.
    Framed,
}

struct StreamTarget {
    writer: Box<dyn Write + Send>,
    position: u64,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Output").field(self.location()).finish()
    }
}

/// Maximum number of slices in one vectored write. Linux's limit: UIO_MAXIOV, 1024.
const MAX_SLICES: usize = 1024;

impl Output {
    /// Creates an output that is written by position.
    pub fn from_write_at(location: impl Into<Location>, target: Box<dyn WriteAt>) -> Self {
        Self::new(location, Target::Positional(target))
    }

    /// Creates an output that is written in order: standard output, a pipe, a socket.
    pub fn from_writer(location: impl Into<Location>, writer: Box<dyn Write + Send>) -> Self {
        Self::new(location, Target::Stream(Mutex::new(StreamTarget { writer, position: 0 })))
    }

    /// Creates the output of an append-only sink inside another sink. The outer sink takes the bytes from the
    /// prepared parts and compresses or frames them; writing to this output directly is an error.
    pub fn framed(location: impl Into<Location>) -> Self {
        Self::new(location, Target::Framed)
    }

    fn new(location: impl Into<Location>, target: Target) -> Self {
        Self(Arc::new(Inner {
            location: location.into(),
            target,
            written: AtomicU64::new(0),
            reached: AtomicU64::new(0),
            zeroed: AtomicBool::new(false),
            resized: AtomicBool::new(false),
        }))
    }

    fn positional(&self) -> Option<&dyn WriteAt> {
        match &self.0.target {
            Target::Positional(target) => Some(&**target),
            Target::Stream(_) | Target::Framed => None,
        }
    }

    /// Returns the final location, for messages.
    pub fn location(&self) -> &Location {
        &self.0.location
    }

    /// True if bytes can only be appended.
    pub fn is_stream(&self) -> bool {
        self.positional().is_none()
    }

    /// True if `other` is a handle to the same output.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// True if concurrent writes are faster than sequential ones; see [`WriteAt::prefers_concurrent_writes`].
    pub fn prefers_concurrent_writes(&self) -> bool {
        self.positional().is_some_and(WriteAt::prefers_concurrent_writes)
    }

    /// True if zeros must be written: to a stream, or if bytes that were never written do not read as zeros.
    pub fn needs_zeros(&self) -> bool {
        self.positional().is_none_or(|target| !target.reads_as_zero())
    }

    /// Returns the fixed length of an existing target, in bytes; `None` for a new file or a stream.
    pub fn capacity(&self) -> Option<u64> {
        self.positional().and_then(WriteAt::capacity)
    }

    /// Returns the number of bytes written so far, not counting zeros that needed no writing.
    pub fn written(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// True if the content of an existing target was overwritten, at least in part.
    pub fn was_changed(&self) -> bool {
        self.written() > 0 || self.0.zeroed.load(Ordering::Relaxed)
    }

    /// True if the length of the target was set, or space in it allocated.
    pub fn was_resized(&self) -> bool {
        self.0.resized.load(Ordering::Relaxed)
    }

    /// Returns the highest end position of all writes so far, in bytes.
    pub fn reached(&self) -> u64 {
        self.0.reached.load(Ordering::Relaxed)
    }

    /// Returns the underlying file, if any, for copies inside the kernel.
    pub fn file(&self) -> Option<&File> {
        self.positional().and_then(WriteAt::file)
    }

    /// Counts `len` bytes that the caller wrote through [`Output::file`].
    pub fn count_written(&self, len: u64) {
        self.0.written.fetch_add(len, Ordering::Relaxed);
    }

    /// Writes `bytes` at `position`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] if the range exceeds an existing target;
    /// [`crate::ErrorKind::OutOfOrder`] if `position` is not the end of a stream; I/O errors.
    pub fn write_at(&self, bytes: &[u8], position: u64) -> Result<()> {
        self.write_slices_at(&mut [IoSlice::new(bytes)], position)
    }

    /// Writes `slices` one after the other, starting at `position`, in as few calls as possible.
    ///
    /// # Errors
    /// Same as [`Output::write_at`].
    pub fn write_slices_at(&self, slices: &mut [IoSlice<'_>], position: u64) -> Result<()> {
        let total: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        match &self.0.target {
            Target::Positional(target) => self.write_positional(&**target, slices, position, total)?,
            Target::Stream(stream) => {
                let mut stream = lock(stream);
                self.check_order(stream.position, position)?;
                for slice in slices {
                    stream.writer.write_all(slice).map_err(|e| self.write_error(e, position))?;
                }
                stream.position += total;
            }
            Target::Framed => {
                return Err(
                    Error::unsupported("can't write directly to a compressed output").path(self.location())
                );
            }
        }
        self.0.written.fetch_add(total, Ordering::Relaxed);
        self.0.reached.fetch_max(position + total, Ordering::Relaxed);
        Ok(())
    }

    fn write_positional(
        &self,
        target: &dyn WriteAt,
        mut slices: &mut [IoSlice<'_>],
        position: u64,
        total: u64,
    ) -> Result<()> {
        self.check_capacity(target, position, total)?;
        let mut at = position;
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let batch = &slices[..slices.len().min(MAX_SLICES)];
            match retry(|| target.write_vectored_at(batch, at)) {
                Ok(0) => return Err(self.write_error(io::ErrorKind::WriteZero.into(), at)),
                Ok(count) => {
                    at += count as u64;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(e) => return Err(self.write_error(e, at)),
            }
        }
        Ok(())
    }

    /// Makes `len` bytes starting at `position` read as zeros, in the cheapest way that the target supports:
    /// nothing for a new file, otherwise a hole, the device's own zeroing, or plain zeros.
    pub fn write_zeros_at(&self, position: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if let Some(target) = self.positional() {
            self.check_capacity(target, position, len)?;
            if target.reads_as_zero() {
                return Ok(());
            }
            if target.zero_range(position, len).map_err(|e| self.write_error(e, position))? {
                self.0.zeroed.store(true, Ordering::Relaxed);
                return Ok(());
            }
        }
        self.write_plain_zeros_at(position, len)
    }

    /// Writes `len` zero bytes starting at `position`, even where a hole would do.
    pub fn write_plain_zeros_at(&self, position: u64, len: u64) -> Result<()> {
        let mut at = position;
        for slice in zero_slices(len) {
            self.write_at(slice, at)?;
            at += slice.len() as u64;
        }
        Ok(())
    }

    /// Reads bytes back. Bytes past the end of the target read as zeros.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream.
    pub fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let Some(target) = self.positional() else { return Err(self.not_readable()) };
        let mut filled = 0;
        while filled < buf.len() {
            match retry(|| target.read_at(&mut buf[filled..], position + filled as u64)) {
                Ok(0) => {
                    buf[filled..].fill(0);
                    break;
                }
                Ok(count) => filled += count,
                Err(e) => return Err(Error::io("read back", e).path(self.location()).at(position)),
            }
        }
        Ok(())
    }

    /// Opens the output for reading. The output need not have its final name yet.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream.
    pub fn reopen(&self, memory: &Memory) -> Result<Input> {
        let Some(target) = self.positional() else { return Err(self.not_readable()) };
        let bytes = target.reopen(memory).map_err(|e| Error::io("open again", e).path(self.location()))?;
        Ok(Input::from_read_at(self.location(), bytes))
    }

    fn not_readable(&self) -> Error {
        Error::unsupported("a stream can't be read back").path(self.location())
    }

    /// Flushes to stable storage and, where the system supports it, drops cached pages, so that later reads
    /// come from the storage.
    pub fn sync_and_forget(&self) -> Result<()> {
        self.sync()?;
        if let Some(target) = self.positional() {
            target.forget();
        }
        Ok(())
    }

    /// Sets the length of a new file, in bytes, so that zeros at its end need no writing. Does nothing for a
    /// stream or for an existing target, which keeps its length.
    pub fn set_len(&self, len: u64) -> Result<()> {
        match self.positional() {
            Some(target) if target.capacity().is_none() => {
                self.0.resized.store(true, Ordering::Relaxed);
                target.set_len(len).map_err(|e| self.write_error(e, len))
            }
            _ => Ok(()),
        }
    }

    /// Allocates space for a range without writing it, for preallocated images; only in a new file.
    pub fn allocate(&self, position: u64, len: u64) -> Result<()> {
        match self.positional() {
            Some(target) if target.capacity().is_none() && len > 0 => {
                self.0.resized.store(true, Ordering::Relaxed);
                target.allocate(position, len).map_err(|e| self.write_error(e, position))
            }
            _ => Ok(()),
        }
    }

    /// Flushes all writes to stable storage, or to the reader of a stream.
    ///
    /// # Errors
    /// If flushing fails, or if the system reports that an earlier write has failed.
    pub fn sync(&self) -> Result<()> {
        let flushed = match &self.0.target {
            Target::Positional(target) => target.sync(),
            Target::Stream(stream) => lock(stream).writer.flush(),
            Target::Framed => Ok(()),
        };
        flushed.map_err(|e| Error::io("flush", e).path(self.location()))
    }

    fn check_capacity(&self, target: &dyn WriteAt, position: u64, len: u64) -> Result<()> {
        let end = position.checked_add(len);
        match target.capacity() {
            Some(capacity) if end.is_none_or(|end| end > capacity) => Err(Error::out_of_bounds(format!(
                "the target has {capacity} bytes; {len} bytes at {position} do not fit"
            ))
            .path(self.location())),
            _ => Ok(()),
        }
    }

    fn check_order(&self, stream_end: u64, position: u64) -> Result<()> {
        if stream_end == position {
            return Ok(());
        }
        Err(Error::out_of_order(format!(
            "the content does not come in order, and a stream can't be written out of order (at {stream_end}, next piece at {position})"
        ))
        .path(self.location())
        .hint("write to a file instead of a pipe"))
    }

    fn write_error(&self, e: io::Error, position: u64) -> Error {
        let advice = match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if self.capacity().is_none() => {
                Some("free some space, or choose another directory")
            }
            io::ErrorKind::FileTooLarge => {
                Some("the file system or a limit (ulimit -f) does not allow files of this size")
            }
            _ => None,
        };
        let error = Error::io("write", e).path(self.location()).at(position);
        match advice {
            Some(advice) => error.hint(advice),
            None => error,
        }
    }
}
