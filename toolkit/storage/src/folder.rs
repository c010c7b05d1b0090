//! Directories of outputs, held open, and the names in them.
//!
//! A directory that is moved while a run writes into it keeps the run's files: they are reached through its
//! descriptor. Before a name is removed, its inode is compared, so that a file of another program stays. No
//! other file gets the inode number of an output, because the output is open until its run ends.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::os::{DirectoryHandle, FileId};

/// An open directory that receives outputs.
#[derive(Debug)]
pub(crate) struct Folder {
    /// Path when the directory was opened, without symbolic links.
    pub(crate) path: PathBuf,
    pub(crate) handle: Arc<DirectoryHandle>,
    /// Way to give a file of this directory a name that must be free; set with the first output.
    pub(crate) naming: OnceLock<Naming>,
}

/// Way to give a finished file a name that must be free, from the best one to the last resort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// By a rename that fails if the name already exists.
    NoReplace,
    /// By a second link. The first name is then removed.
    Link,
    /// By an empty file that reserves the name, which the finished file replaces. Between the two, the name
    /// belongs to an empty file.
    Reserve,
}

impl Folder {
    /// Opens a directory.
    ///
    /// # Errors
    /// The error of realpath(3) or open(2).
    pub(crate) fn open(path: &Path) -> io::Result<Arc<Self>> {
        let path = std::fs::canonicalize(path)?;
        let handle = Arc::new(DirectoryHandle::open(&path)?);
        Ok(Arc::new(Self { path, handle, naming: OnceLock::new() }))
    }

    /// True if the path still leads to the directory.
    pub(crate) fn is_in_place(&self) -> bool {
        self.handle.is_at(&self.path)
    }
}

/// A name in a directory, and the inode that it had.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) folder: Arc<Folder>,
    pub(crate) name: OsString,
    pub(crate) id: FileId,
}

impl Entry {
    /// Returns the path that the directory had when it was opened, with the name.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// True if the name still leads to the inode.
    pub(crate) fn is_there(&self) -> bool {
        self.folder.handle.holds(&self.name, self.id)
    }

    /// Removes the name of a file, if it still leads to the inode. Returns true if it does not any more.
    pub(crate) fn remove_file(&self) -> bool {
        if self.is_there() {
            let removed = self.folder.handle.remove_file(&self.name);
            // A removal that reports failure may have been done.
            return removed.is_ok() || !self.is_there();
        }
        true
    }

    /// Removes the name of a directory, if it still leads to the inode and the directory is empty.
    pub(crate) fn remove_directory(&self) {
        if self.is_there() {
            // The directory stays if another program has put a file into it meanwhile.
            let _ = self.folder.handle.remove_directory(&self.name);
        }
    }
}

/// A file that is removed when dropped.
#[derive(Debug)]
pub(crate) struct Temporary(Option<Entry>);

impl Temporary {
    pub(crate) fn new(entry: Entry) -> Self {
        Self(Some(entry))
    }

    /// Returns the name and inode of the file, which stays from now on.
    pub(crate) fn keep(mut self) -> Option<Entry> {
        self.0.take()
    }

    pub(crate) fn entry(&self) -> Option<&Entry> {
        self.0.as_ref()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(entry) = &self.0 {
            entry.remove_file();
        }
    }
}
