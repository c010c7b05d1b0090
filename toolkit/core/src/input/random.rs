//! Inputs that are read by position: the trait [`ReadAt`] and its wrapper [`RandomInput`], whose errors name
//! the file and the offset.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use super::{Input, InputBody, Section, read_error};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, ExtentList};
use crate::location::Location;
use crate::progress::CancelToken;
use crate::remedy::Remedy;

/// Bytes that can be read by position: a file, its decompressed content, an object in a store.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` with the bytes starting at `position`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the range exceeds the input.
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()>;

    /// Like [`ReadAt::read_exact_at`], for a caller that verifies the bytes itself, by a checksum that they
    /// contain. A decoder may skip its own checksum if it would have to read much more for it. No other
    /// caller may use this: it could return damaged bytes.
    fn read_unverified_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.read_exact_at(buf, position)
    }

    /// Returns the length in bytes.
    fn len(&self) -> u64;

    /// True if the input has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the run of data or hole that contains `position`, which must be less than the length.
    fn run(&self, _position: u64) -> io::Result<FileRun> {
        Ok(FileRun { end: self.len(), is_data: true })
    }

    /// Like [`ReadAt::run`], but may end the run at `until`. If the exact answer is costly, it may also
    /// report a hole as data if data follows before `until`.
    fn rough_run(&self, position: u64, _until: u64) -> io::Result<FileRun> {
        self.run(position)
    }

    /// Returns the unit, in bytes, in which reads are cheapest.
    fn granule(&self) -> u64 {
        1
    }

    /// Returns the underlying file, if it stores exactly these bytes.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Returns the position in the compressed file of what stores the byte at `position`: the start of its
    /// frame;
    /// `None` if the input is not compressed.
    fn compressed_offset(&self, _position: u64) -> Option<u64> {
        None
    }

    /// Returns the number of reads at once up to which more of them take no longer: 1 for a file, whose reads the
    /// kernel orders, more for a server that is far away. A reader that waits does not compute, so it may have
    /// more threads than processors.
    fn concurrency(&self) -> usize {
        1
    }

    /// Returns a reader of all bytes in order that reads ahead; `None` if reads by position are as fast.
    fn reader(&self) -> Option<Box<dyn Read + Send>> {
        None
    }

    /// Frees the caches. The caller has read what it needs; later reads are slower, but succeed.
    fn release(&self) {}
}

/// A run of data or a hole in a file, as its file system reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRun {
    /// Position one past the last byte.
    pub end: u64,
    /// True for data; a hole reads as zeros.
    pub is_data: bool,
}

/// Length in bytes of a read after a larger one has failed: one page, the unit in which the kernel reads
/// disks.
const SALVAGE_SECTOR: u64 = 4096;

/// An input that is read by position. Clones share the source.
#[derive(Debug, Clone)]
pub struct RandomInput {
    location: Location,
    source: Arc<dyn ReadAt>,
    cancel: CancelToken,
}

impl From<RandomInput> for Input {
    fn from(input: RandomInput) -> Self {
        Self::from_body(input.location, InputBody::Random(input.source)).cancelled_by(input.cancel)
    }
}

impl RandomInput {
    /// Returns the first bytes: `max_len`, or the whole file if it is shorter.
    ///
    /// # Errors
    /// Any error of the read.
    pub fn read_head(&self, max_len: usize) -> Result<Vec<u8>> {
        // At most `max_len`, so it fits.
        self.read_vec(0, self.len().min(max_len as u64) as usize)
    }

    pub(super) fn new(location: Location, source: Arc<dyn ReadAt>, cancel: CancelToken) -> Self {
        Self { location, source, cancel }
    }

    /// Returns the location, for messages and for resolving names in the image.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Returns a range of the input, such as a member of a container, as a separate input.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] if the range exceeds the input.
    pub fn section(&self, range: Range<u64>) -> Result<Input> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::out_of_bounds(format!(
                "bytes {}..{} leave the file of {} bytes",
                range.start,
                range.end,
                self.len()
            ))
            .path(&self.location));
        }
        let section = Section { source: Arc::clone(&self.source), range };
        let input = Input::from_body(&self.location, InputBody::Random(Arc::new(section)));
        Ok(input.cancelled_by(self.cancel.clone()))
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        self.source.len()
    }

    /// True if the input has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes starting at `position`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] if the file ends early; [`crate::ErrorKind::Cancelled`]; any error of
    /// the source.
    pub fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        self.check_range(buf.len(), position)?;
        self.source.read_exact_at(buf, position).map_err(|e| self.read_error(e, position))
    }

    /// Like [`RandomInput::read_exact_at`], for a caller that verifies the bytes itself; see
    /// [`ReadAt::read_unverified_at`].
    pub fn read_unverified_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        self.check_range(buf.len(), position)?;
        self.source.read_unverified_at(buf, position).map_err(|e| self.read_error(e, position))
    }

    /// Checks before a read that it is within the file and not cancelled.
    fn check_range(&self, len: usize, position: u64) -> Result<()> {
        self.cancel.check()?;
        let fits = position.checked_add(len as u64).is_some_and(|end| end <= self.len());
        if !fits {
            let needed = match len {
                1 => format!("the byte at {position} is needed"),
                len => format!("{len} bytes from {position} are needed"),
            };
            return Err(Error::corrupt(format!("the file ends at {}, but {needed}", self.len()))
                .path(&self.location)
                .at(position)
                .remedied_by(Remedy::Salvage(
                    "the file is cut short: copy it again, or use a backup".into(),
                )));
        }
        Ok(())
    }

    /// Like [`RandomInput::read_exact_at`], but reads sector by sector, and fills `buf` with zeros where a
    /// read fails. Calls `lost` with each range of `buf` that could not be read, and with the error.
    pub fn read_salvage(&self, buf: &mut [u8], position: u64, mut lost: impl FnMut(Range<usize>, Error)) {
        let there = usize::try_from(self.len().saturating_sub(position)).unwrap_or(usize::MAX).min(buf.len());
        let mut done = 0;
        while done < there {
            let at = position + done as u64;
            // At most `SALVAGE_SECTOR`, so it fits.
            let len = (SALVAGE_SECTOR - at % SALVAGE_SECTOR) as usize;
            let part = done..done.saturating_add(len).min(there);
            if let Err(e) = self.read_exact_at(&mut buf[part.clone()], at) {
                // After cancellation, no read succeeds: report the rest as one range.
                let part = if e.kind() == ErrorKind::Cancelled { done..buf.len() } else { part.clone() };
                buf[part.clone()].fill(0);
                lost(part.clone(), e);
                done = part.end;
                continue;
            }
            done = part.end;
        }
        if there < buf.len() {
            // This read always fails; its error describes a range beyond the end of the file.
            if let Err(e) = self.read_exact_at(&mut buf[there..], position.saturating_add(there as u64)) {
                buf[there..].fill(0);
                lost(there..buf.len(), e);
            }
        }
    }

    /// Reads `len` bytes starting at `position`. The caller must bound `len`.
    pub fn read_vec(&self, position: u64, len: usize) -> Result<Vec<u8>> {
        if position.checked_add(len as u64).is_none_or(|end| end > self.len()) {
            // This read always fails, before memory is allocated for bytes that the file does not have.
            self.read_exact_at(&mut [0], position.saturating_add(len as u64))?;
        }
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, position)?;
        Ok(bytes)
    }

    /// Returns the run of data or hole that contains `position`, which must be less than the length.
    pub fn run(&self, position: u64) -> Result<FileRun> {
        self.source.run(position).map_err(|e| self.read_error(e, position))
    }

    /// Returns the runs of data and holes in `range`, as extents. The answer may end before `range.end`; see
    /// [`ExtentList::is_full`].
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.extents_by(range, |position| self.run(position))
    }

    /// Like [`RandomInput::extents`], but takes the run at each position from `run_at`.
    pub fn extents_by(
        &self,
        range: Range<u64>,
        run_at: impl Fn(u64) -> Result<FileRun>,
    ) -> Result<Vec<Extent>> {
        let mut extents = ExtentList::new();
        let mut position = range.start;
        while position < range.end && !extents.is_full() {
            let run = run_at(position)?;
            let end = run.end.min(range.end);
            let kind = if run.is_data { ExtentKind::Data } else { ExtentKind::Hole };
            extents.push(position, end - position, kind);
            position = end;
        }
        Ok(extents.into_vec())
    }

    /// Returns the run that contains `position`, possibly ended at `until`; see [`ReadAt::rough_run`].
    pub fn rough_run(&self, position: u64, until: u64) -> Result<FileRun> {
        self.source.rough_run(position, until).map_err(|e| self.read_error(e, position))
    }

    /// See [`ReadAt::compressed_offset`].
    pub fn compressed_offset(&self, position: u64) -> Option<u64> {
        self.source.compressed_offset(position)
    }

    fn read_error(&self, e: io::Error, position: u64) -> Error {
        read_error(e, &self.location, position, self.compressed_offset(position))
    }

    /// See [`ReadAt::release`].
    pub fn release(&self) {
        self.source.release();
    }

    /// Returns the unit, in bytes, in which reads are cheapest.
    pub fn granule(&self) -> u64 {
        self.source.granule()
    }

    /// See [`ReadAt::concurrency`].
    pub fn concurrency(&self) -> usize {
        self.source.concurrency()
    }

    /// Returns the underlying file, if it stores exactly these bytes.
    pub fn file(&self) -> Option<&File> {
        self.source.file()
    }
}
