//! Removal of unfinished outputs when a signal ends the program.

use std::fs::File;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Error, Result};

use crate::folder::Entry;

/// Handle that removes the unfinished files of a run from another thread, for a signal handler that has no
/// time to unwind. Afterwards, the run can't create any more files.
#[derive(Debug, Clone, Default)]
pub struct Cleaner(Arc<Mutex<Paths>>);

#[derive(Debug, Default)]
pub(super) struct Paths {
    pub(super) files: Vec<Entry>,
    pub(super) directories: Vec<Entry>,
    /// Files that no rename can replace, which are written in place.
    pub(super) emptied: Vec<File>,
    /// True once the program is ending. A file created now would be left behind.
    closed: bool,
}

impl Cleaner {
    /// Removes the unfinished files and the directories created for them, and empties what has no temporary name.
    pub fn clean(&self) {
        let mut paths = lock(&self.0);
        paths.closed = true;
        for file in paths.files.drain(..) {
            // The program is ending, so nothing follows from a failure.
            file.remove_file();
        }
        for file in paths.emptied.drain(..) {
            let _ = file.set_len(0);
        }
        for directory in paths.directories.drain(..).rev() {
            directory.remove_directory();
        }
    }

    /// Forgets all paths. Their files have their final names or are removed.
    pub(super) fn forget(&self) {
        let mut paths = lock(&self.0);
        paths.files.clear();
        paths.directories.clear();
        paths.emptied.clear();
    }

    /// Runs `create`, which adds the paths of its files. [`Cleaner::clean`] can't run between a file's
    /// creation and its registration. Fails after [`Cleaner::clean`].
    pub(super) fn register<T>(&self, create: impl FnOnce(&mut Paths) -> Result<T>) -> Result<T> {
        let mut paths = lock(&self.0);
        if paths.closed {
            return Err(Error::cancelled("interrupted"));
        }
        create(&mut paths)
    }
}
