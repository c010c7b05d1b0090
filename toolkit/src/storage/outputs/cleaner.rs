//! Removing what is not finished when the program is told to end.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Removes the partial files of a run from another thread: for signal handlers whose program has
/// no time to unwind. Nothing is begun any more after that.
#[derive(Debug, Clone, Default)]
pub struct Cleaner(Arc<Mutex<Paths>>);

#[derive(Debug, Default)]
pub(super) struct Paths {
    pub(super) files: Vec<PathBuf>,
    pub(super) directories: Vec<PathBuf>,
    /// The program ends: whatever would be made now would stay.
    closed: bool,
}

impl Cleaner {
    /// Removes what is not finished.
    pub fn clean(&self) {
        let mut paths = self.lock();
        paths.closed = true;
        for path in paths.files.drain(..) {
            // The file may be gone already; there is nobody left to tell otherwise.
            let _ = std::fs::remove_file(path);
        }
        for path in paths.directories.drain(..).rev() {
            let _ = std::fs::remove_dir(path);
        }
    }

    pub(super) fn forget(&self) {
        let mut paths = self.lock();
        paths.files.clear();
        paths.directories.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Paths> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `make` so that [`Cleaner::clean`] comes before or after it, never in between.
    pub(super) fn making<T>(&self, make: impl FnOnce(&mut Paths) -> Result<T>) -> Result<T> {
        let mut paths = self.lock();
        if paths.closed {
            return Err(Error::cancelled("interrupted"));
        }
        make(&mut paths)
    }
}
