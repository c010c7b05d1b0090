//! Removal of unfinished outputs when a signal ends the program.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Removes the partial files of a run from another thread, for signal handlers of a program that has
/// no time to unwind. The run creates no file after that.
#[derive(Debug, Clone, Default)]
pub struct Cleaner(Arc<Mutex<Paths>>);

#[derive(Debug, Default)]
pub(super) struct Paths {
    pub(super) files: Vec<PathBuf>,
    pub(super) directories: Vec<PathBuf>,
    /// True once the program ends: a file created now would be left behind.
    closed: bool,
}

impl Cleaner {
    /// Removes the unfinished files and the directories made for them.
    pub fn clean(&self) {
        let mut paths = self.lock();
        paths.closed = true;
        for path in paths.files.drain(..) {
            // The file may be gone already; no one is left to report another error to.
            let _ = std::fs::remove_file(path);
        }
        for path in paths.directories.drain(..).rev() {
            let _ = std::fs::remove_dir(path);
        }
    }

    /// Drops all paths: their files have final names, or are gone.
    pub(super) fn forget(&self) {
        let mut paths = self.lock();
        paths.files.clear();
        paths.directories.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Paths> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `create`, which adds the paths of its files. [`Cleaner::clean`] runs before or after it, never
    /// between a file's creation and its registration.
    pub(super) fn register<T>(&self, create: impl FnOnce(&mut Paths) -> Result<T>) -> Result<T> {
        let mut paths = self.lock();
        if paths.closed {
            return Err(Error::cancelled("interrupted"));
        }
        create(&mut paths)
    }
}
