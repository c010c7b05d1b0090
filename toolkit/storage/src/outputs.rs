//! The outputs of one run: only a finished output gets its final name.
//!
//! Each file is written beside its target as `.NAME.partial-XXXXXX` (`partial.rs`). [`Outputs::commit`]
//! flushes all files and only then renames them. A drop without a commit removes everything that the set
//! created.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use imgtool_core::{Error, Location, Output, Remedy, Result};

use crate::file;
use crate::open::Identity;
use crate::os::{self, FileClass};
use crate::partial;

mod cleaner;
mod naming;
mod targets;

pub use cleaner::Cleaner;
use naming::{NamedFile, PendingFile, roll_back, sync_directories};
use targets::final_path;

/// Set of the outputs of one run.
#[derive(Debug, Default)]
pub struct Outputs {
    files: Vec<PendingFile>,
    others: Vec<Output>,
    directories: Vec<PathBuf>,
    published: Vec<PathBuf>,
    /// The sources and their identities. No output may overlap a source.
    protected: Vec<(Location, Identity)>,
    /// Existing files that the outputs write into or replace.
    claimed: Vec<Identity>,
    swept: Vec<PathBuf>,
    cleaner: Cleaner,
}

/// Treatment of an output name that is a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Write to the link's target: the user chose the name.
    Follow,
    /// Refuse the link: the name comes from an image, and a planted link must not choose the target.
    Refuse,
}

/// A planned output, for [`Outputs::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputRequest {
    /// A file for [`Outputs::create`].
    New {
        /// Path of the file.
        path: PathBuf,
        /// True if the file may exist already.
        overwrite: bool,
        /// Treatment of a symbolic link at `path`.
        links: Links,
    },
    /// A file or device for [`Outputs::existing`].
    Existing(PathBuf),
    /// Standard output.
    Stdout,
}

impl Outputs {
    /// Creates an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a handle to remove the unfinished outputs from another thread.
    pub fn cleaner(&self) -> Cleaner {
        self.cleaner.clone()
    }

    /// Creates a file that [`Outputs::commit`] renames to `path`; it replaces an existing file only with
    /// `overwrite`. Follows a symbolic link at `path`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the target already exists, is a source, or is no regular file;
    /// [`imgtool_core::ErrorKind::Usage`] if another output writes to it; [`imgtool_core::ErrorKind::Io`].
    pub fn create(&mut self, path: &Path, overwrite: bool) -> Result<Output> {
        self.create_linked(path, overwrite, Links::Follow)
    }

    /// Like [`Outputs::create`], but treats a symbolic link at `path` according to `links`.
    ///
    /// # Errors
    /// Same as [`Outputs::create`]; [`imgtool_core::ErrorKind::Refused`] for a link with [`Links::Refuse`].
    pub fn create_linked(&mut self, path: &Path, overwrite: bool, links: Links) -> Result<Output> {
        let final_path = final_path(path, links)?;
        if self.files.iter().any(|pending| pending.final_path == final_path) {
            return Err(Error::usage("two outputs would write this file").path(path));
        }
        let old = self.check_target(path, &final_path, overwrite, &self.claimed)?;
        let (Some(directory), Some(name)) = (final_path.parent(), final_path.file_name()) else {
            return Err(Error::usage("is not a file name").path(path));
        };
        let name = name.to_string_lossy();
        partial::sweep(directory, &name, &mut self.swept);
        let (file, temporary) = self.cleaner.register(|paths| {
            let created = partial::create(directory, &name).map_err(|e| create_error(e).path(path))?;
            paths.files.push(created.1.to_path_buf());
            Ok(created)
        })?;
        if let Some(old) = old {
            self.claimed.extend(Identity::of(&old));
            file.set_permissions(old.permissions()).map_err(|e| Error::io("create", e).path(path))?;
        }
        let output = file::new_file(path, file);
        self.files.push(PendingFile { output: output.clone(), final_path, temporary, overwrite });
        Ok(output)
    }

    /// Opens an existing block device or file to overwrite it in place. It keeps its length.
    ///
    /// `reads_as_zero` is true if the target is known to contain only zeros. `force` opens a target even if
    /// it is mounted, locked or otherwise in use.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if it is a source or in use; [`imgtool_core::ErrorKind::Usage`]
    /// if it is another output, a directory or a stream; [`imgtool_core::ErrorKind::Io`].
    pub fn existing(&mut self, path: &Path, reads_as_zero: bool, force: bool) -> Result<Output> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
        self.check_free(path, &meta, &self.claimed)?;
        let file = match os::classify(&meta) {
            FileClass::BlockDevice => os::open_block_device(path, !force).map_err(|e| {
                if e.kind() == std::io::ErrorKind::ResourceBusy {
                    Error::refused("the device is mounted or otherwise in use")
                        .path(path)
                        .remedied_by(Remedy::ForceWrite("unmount it".into()))
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
            return Err(Error::refused(format!("in use: {how}"))
                .path(path)
                .remedied_by(Remedy::ForceWrite("stop the program that uses it".into())));
        }
        let output = file::existing(path, file, reads_as_zero)?;
        self.claimed.extend(Identity::of(&meta));
        self.others.push(output.clone());
        Ok(output)
    }

    /// Adds a stream, which [`Outputs::commit`] flushes.
    pub fn stream(&mut self, output: Output) {
        self.others.push(output);
    }

    /// Creates a directory and its missing parents. Without a commit, the drop removes each new directory
    /// that is empty.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if a file has that name; [`imgtool_core::ErrorKind::Io`].
    pub fn directory(&mut self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        // `components` drops a trailing '/', since a path with one matches only directories.
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

    /// Creates a directory that must not exist yet. Without a commit, the drop removes it if it is empty.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Io`], also if the name already exists.
    pub fn new_directory(&mut self, path: &Path) -> Result<()> {
        self.cleaner.register(|paths| {
            std::fs::create_dir(path).map_err(|e| Error::io("create the directory", e).path(path))?;
            paths.directories.push(path.to_owned());
            Ok(())
        })?;
        self.directories.push(path.to_owned());
        Ok(())
    }

    /// Writes a new file that other programs see before the commit. Without a commit, the drop removes it.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Io`], also if the name already exists.
    pub fn publish(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io("unable to write file", e).path(path);
        let mut file = self.cleaner.register(|paths| {
            let file = File::create_new(path).map_err(failed)?;
            paths.files.push(path.to_owned());
            Ok(file)
        })?;
        self.published.push(path.to_owned());
        file.write_all(bytes).map_err(failed)
    }

    /// Flushes every output, renames all files to their final names, then flushes the directories.
    ///
    /// # Errors
    /// The error of the first flush or rename that fails. The earlier renames are undone.
    pub fn commit(mut self) -> Result<()> {
        for pending in &self.files {
            pending.output.sync()?;
        }
        for other in &self.others {
            other.sync()?;
        }
        let mut named: Vec<NamedFile> = Vec::new();
        for pending in std::mem::take(&mut self.files) {
            match pending.rename() {
                Ok(file) => named.push(file),
                Err(error) => return Err(roll_back(named, error)),
            }
        }
        let of_directories = self.directories.iter().filter_map(|directory| directory.parent());
        let of_files = named.iter().filter_map(|file| file.path.parent());
        if let Err(error) = sync_directories(of_files.chain(of_directories).collect()) {
            return Err(roll_back(named, error));
        }
        self.directories.clear();
        self.published.clear();
        self.cleaner.forget();
        Ok(())
    }

    /// Returns the paths of the unfinished files that this set has removed, left by a killed run.
    pub fn swept(&self) -> &[PathBuf] {
        &self.swept
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // A temporary file removes itself when dropped. A directory can be removed only if it is empty.
        self.files.clear();
        for file in &self.published {
            // Another program may have removed it meanwhile.
            let _ = std::fs::remove_file(file);
        }
        for directory in self.directories.iter().rev() {
            // The directory stays if another program has put a file into it meanwhile.
            let _ = std::fs::remove_dir(directory);
        }
        self.cleaner.forget();
    }
}

/// Returns the error for a file that could not be created, with a hint if there is a remedy.
fn create_error(e: io::Error) -> Error {
    let hint = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("not enough space for another file: free some, or choose another directory")
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
