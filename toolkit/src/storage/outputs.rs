//! The outputs of one run: a final name is always a finished output.
//!
//! Each file is written beside its target as `.NAME.partial-XXXXXX` (`partial.rs`). [`Outputs::commit`]
//! flushes all of them and only then renames them; until that, dropping the set removes everything.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::os::{self, FileClass, FileId};
use super::output::Output;
use super::partial;
use crate::error::{Error, Result};

mod cleaner;
mod naming;
mod targets;

pub use cleaner::Cleaner;
use naming::{Named, PendingFile, sync_directories, taken_back};
use targets::final_path;

/// The outputs of one run.
#[derive(Default)]
pub struct Outputs {
    files: Vec<PendingFile>,
    others: Vec<Output>,
    directories: Vec<PathBuf>,
    published: Vec<PathBuf>,
    /// What is read: no output may be it, lie beneath it or on top of it.
    protected: Vec<(PathBuf, Vec<FileId>)>,
    /// Files that exist and are written to, or will be replaced.
    taken: Vec<Vec<FileId>>,
    swept: Vec<PathBuf>,
    cleaner: Cleaner,
}

/// What to do where the name of an output is a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// The user named it: the file that it leads to is meant.
    Follow,
    /// The name comes from an image: whoever put the link there does not decide what is written to.
    Refuse,
}

/// An output that is going to be made, for [`Outputs::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A file for [`Outputs::create`].
    New {
        /// Its path.
        path: PathBuf,
        /// It may exist.
        overwrite: bool,
        /// Whether a link is followed.
        links: Links,
    },
    /// A file or device for [`Outputs::existing`].
    Existing(PathBuf),
    /// Standard output.
    Stdout,
}

impl Outputs {
    /// No outputs.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handle that removes what is not finished.
    pub fn cleaner(&self) -> Cleaner {
        self.cleaner.clone()
    }

    /// A new file that will be called `path`. Nothing of that name exists, or `overwrite` is set.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] when it exists, is a source, or is no regular file;
    /// [`crate::ErrorKind::Io`].
    pub fn create(&mut self, path: &Path, overwrite: bool) -> Result<Output> {
        self.create_linked(path, overwrite, Links::Follow)
    }

    /// [`Outputs::create`], with a say in what happens where `path` is a symbolic link.
    ///
    /// # Errors
    /// Those of [`Outputs::create`]; [`crate::ErrorKind::Refused`] for a link that is not to be followed.
    pub fn create_linked(&mut self, path: &Path, overwrite: bool, links: Links) -> Result<Output> {
        let final_path = final_path(path, links)?;
        if self.files.iter().any(|pending| pending.final_path == final_path) {
            return Err(Error::usage("two outputs would be this file").path(path));
        }
        let old = self.check_target(path, &final_path, overwrite, &self.taken)?;
        let (Some(directory), Some(name)) = (final_path.parent(), final_path.file_name()) else {
            return Err(Error::usage("is not a file name").path(path));
        };
        let name = name.to_string_lossy();
        partial::sweep(directory, &name, &mut self.swept);
        let (file, temporary) = self.cleaner.making(|paths| {
            let made = partial::create(directory, &name).map_err(|e| cannot_create(e).path(path))?;
            paths.files.push(made.1.to_path_buf());
            Ok(made)
        })?;
        if let Some(old) = old {
            self.taken.push(os::file_layers(&old, false));
            file.set_permissions(old.permissions()).map_err(|e| Error::io("create", e).path(path))?;
        }
        let output = Output::from_new_file(path, file);
        self.files.push(PendingFile { output: output.clone(), final_path, temporary, overwrite });
        Ok(output)
    }

    /// An existing block device or file, written in place; it keeps its length. `reads_as_zero`: it
    /// is known to hold zeros. What is mounted, locked or otherwise held is refused without `force`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] when it is a source or busy; [`crate::ErrorKind::Io`].
    pub fn existing(&mut self, path: &Path, reads_as_zero: bool, force: bool) -> Result<Output> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
        self.check_free(path, &meta, &self.taken)?;
        let file = match os::classify(&meta) {
            FileClass::BlockDevice => os::open_block_device(path, !force).map_err(|e| {
                if e.kind() == std::io::ErrorKind::ResourceBusy {
                    Error::refused("the device is mounted or otherwise in use")
                        .path(path)
                        .hint("unmount it; --force writes all the same")
                } else {
                    Error::io("open for writing", e).path(path)
                }
            })?,
            FileClass::Regular => File::options()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| Error::io("open for writing", e).path(path))?,
            FileClass::Directory => return Err(Error::usage("is a directory").path(path)),
            FileClass::Stream => return Err(Error::usage("is neither a file nor a block device").path(path)),
        };
        if let Some(how) = os::used_elsewhere(&file).filter(|_| !force) {
            return Err(Error::refused(format!("it is in use: {how}"))
                .path(path)
                .hint("nothing was written; stop what uses it, or write all the same with --force"));
        }
        let output = Output::from_existing(path, file, reads_as_zero)?;
        self.taken.push(os::file_layers(&meta, false));
        self.others.push(output.clone());
        Ok(output)
    }

    /// A stream: flushed by [`Outputs::commit`].
    pub fn stream(&mut self, output: Output) {
        self.others.push(output);
    }

    /// Makes a directory if there is none; it is removed again (if empty) unless all goes well.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn directory(&mut self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        // Without the '/' at its end, with which nothing but a directory is found.
        if path.components().as_path().exists() {
            return Err(Error::refused("is a file, not a directory").path(path));
        }
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
            && !parent.exists()
        {
            self.directory(parent)?;
        }
        self.new_directory(path)
    }

    /// Makes a directory that must not be there yet; it is removed again (if empty) unless all goes
    /// well.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new_directory(&mut self, path: &Path) -> Result<()> {
        self.cleaner.making(|paths| {
            std::fs::create_dir(path).map_err(|e| Error::io("make the directory", e).path(path))?;
            paths.directories.push(path.to_owned());
            Ok(())
        })?;
        self.directories.push(path.to_owned());
        Ok(())
    }

    /// Writes a file of a new name that others are to see before the end; it is removed again unless
    /// all goes well.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn publish(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io("unable to write file", e).path(path);
        let mut file = self.cleaner.making(|paths| {
            let file = File::create_new(path).map_err(failed)?;
            paths.files.push(path.to_owned());
            Ok(file)
        })?;
        self.published.push(path.to_owned());
        file.write_all(bytes).map_err(failed)
    }

    /// Flushes every output, then gives all files their final names, then flushes the names.
    ///
    /// # Errors
    /// When a flush or a rename fails; final names that were given in this call are taken back.
    pub fn commit(mut self) -> Result<()> {
        for pending in &self.files {
            pending.output.sync()?;
        }
        for other in &self.others {
            other.sync()?;
        }
        let mut named: Vec<Named> = Vec::new();
        for pending in std::mem::take(&mut self.files) {
            match pending.give_name() {
                Ok(done) => named.push(done),
                Err(error) => return Err(taken_back(named, error)),
            }
        }
        let made = self.directories.iter().filter_map(|directory| directory.parent());
        let holders: Vec<&Path> = named.iter().filter_map(|done| done.path.parent()).chain(made).collect();
        if let Err(error) = sync_directories(holders) {
            return Err(taken_back(named, error));
        }
        self.directories.clear();
        self.published.clear();
        self.cleaner.forget();
        Ok(())
    }

    /// Unfinished files that an earlier run had to leave behind and this one has removed.
    pub fn swept(&self) -> &[PathBuf] {
        &self.swept
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // Temporary files remove themselves; directories go after them.
        self.files.clear();
        for file in &self.published {
            // Somebody may have taken it away meanwhile.
            let _ = std::fs::remove_file(file);
        }
        for directory in self.directories.iter().rev() {
            // Somebody may have put a file there meanwhile: it stays.
            let _ = std::fs::remove_dir(directory);
        }
        self.cleaner.forget();
    }
}

/// Why a file could not be made, and what to do about it.
fn cannot_create(e: io::Error) -> Error {
    let hint = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("there is no room for another file: free some space, or choose another directory")
        }
        _ if os::is_out_of_files(&e) => Some("allow more open files (ulimit -n)"),
        _ => None,
    };
    let error = Error::io("create", e);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

#[cfg(test)]
mod tests;
