//! An input that is read by position, with errors that say where.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::read_at::ReadAt;
use super::stream::read_error;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, ExtentList};
use crate::progress::CancelToken;
use crate::storage::os::FileRun;

/// What is read at once where not all can be read: a page, in which a system reads disks.
const SALVAGE_SECTOR: u64 = 4096;
/// An input that is read by position; cloning shares it.
#[derive(Clone)]
pub struct RandomInput {
    pub(super) path: PathBuf,
    pub(super) source: Arc<dyn ReadAt>,
    pub(super) cancel: CancelToken,
}

impl RandomInput {
    /// The name for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.source.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `position`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] when the file ends before; [`crate::ErrorKind::Io`];
    /// [`crate::ErrorKind::Cancelled`].
    pub fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        self.cancel.check()?;
        let fits = position.checked_add(buf.len() as u64).is_some_and(|end| end <= self.len());
        if !fits {
            let needed = match buf.len() {
                1 => format!("the byte at {position} is needed"),
                len => format!("{len} bytes from {position} are needed"),
            };
            return Err(Error::corrupt(format!("the file ends at {}, but {needed}", self.len()))
                .path(&self.path)
                .at(position)
                .hint("the file is cut short: copy it again, or use a backup"));
        }
        self.source.read_exact_at(buf, position).map_err(|e| read_error(e, &self.path, position))
    }

    /// Fills `buf` from `position` with what can be read, sector by sector where all of it can't, and
    /// with zeros for the rest, of which `lost` is told: bytes of `buf`, and why.
    pub fn read_what_is_there(
        &self,
        buf: &mut [u8],
        position: u64,
        mut lost: impl FnMut(Range<usize>, Error),
    ) {
        let there = usize::try_from(self.len().saturating_sub(position)).unwrap_or(usize::MAX).min(buf.len());
        let mut done = 0;
        while done < there {
            let at = position + done as u64;
            // Below a sector.
            let len = (SALVAGE_SECTOR - at % SALVAGE_SECTOR) as usize;
            let part = done..done.saturating_add(len).min(there);
            if let Err(e) = self.read_exact_at(&mut buf[part.clone()], at) {
                // Nothing more is going to be read: the rest is one loss.
                let part = if e.kind() == ErrorKind::Cancelled { done..buf.len() } else { part.clone() };
                buf[part.clone()].fill(0);
                lost(part.clone(), e);
                done = part.end;
                continue;
            }
            done = part.end;
        }
        if there < buf.len() {
            // The words for a range that leaves the file.
            if let Err(e) = self.read_exact_at(&mut buf[there..], position.saturating_add(there as u64)) {
                buf[there..].fill(0);
                lost(there..buf.len(), e);
            }
        }
    }

    /// `len` bytes from `position`, which the caller has bounded.
    ///
    /// # Errors
    /// Those of [`RandomInput::read_exact_at`].
    pub fn read_vec(&self, position: u64, len: usize) -> Result<Vec<u8>> {
        if position.checked_add(len as u64).is_none_or(|end| end > self.len()) {
            self.read_exact_at(&mut [0], position.saturating_add(len as u64))?;
        }
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, position)?;
        Ok(bytes)
    }

    /// The run of data or hole around `position`, which is below the length.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn run(&self, position: u64) -> Result<FileRun> {
        self.source.run(position).map_err(|e| read_error(e, &self.path, position))
    }

    /// The runs of data and holes of a part of the file, as a driver answers about a disk.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.extents_by(range, |position| self.run(position))
    }

    /// [`RandomInput::extents`] of what `run_at` says about the run at each position.
    ///
    /// # Errors
    /// Those of `run_at`.
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

    /// The run around `position`, or the part of it up to `until`; what is a hole may be called data
    /// if there is data too before `until`. For who reads that part in one go anyway: on some file
    /// systems the exact answer is costly.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn rough_run(&self, position: u64, until: u64) -> Result<FileRun> {
        self.source.rough_run(position, until).map_err(|e| read_error(e, &self.path, position))
    }

    /// Reading costs least in multiples of this many bytes.
    pub fn granule(&self) -> u64 {
        self.source.granule()
    }

    /// The file, when the bytes stand in one as they are.
    pub fn file(&self) -> Option<&File> {
        self.source.file()
    }
}
