//! The outputs of one run: only a finished output gets its final name.
//!
//! Each file is written beside its target as `.NAME.partial-XXXXXXXXXXXX` (`partial.rs`). [`Outputs::commit`]
//! flushes all files and only then renames them. A drop without a commit removes everything that the set
//! created. The directories stay open, so that this works even if one of them is moved meanwhile.
//!
//! Block devices, images to change and files that no rename can replace have no temporary name (`in_place.rs`).

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{Error, Location, Output, Result};

use crate::file;
use crate::folder::{Entry, Folder, Naming, Temporary};
use crate::identity::Identity;
use crate::image_lock::{self, ImageLock};
use crate::os::{self, DirectoryHandle};
use crate::partial;

mod cleaner;
mod in_place;
mod naming;
mod rename;
mod targets;

pub use cleaner::Cleaner;
use in_place::Emptied;
use naming::{NamedFile, PendingFile, Replaces, check_in_place, roll_back, sync_directories};
use targets::final_path;

/// Set of the outputs of one run.
#[derive(Debug, Default)]
pub struct Outputs {
    files: Vec<PendingFile>,
    others: Vec<Output>,
    /// New directories, and files that other programs see before the commit.
    directories: Vec<Entry>,
    published: Vec<Temporary>,
    /// Directories that receive files.
    folders: Vec<Arc<Folder>>,
    /// The sources and their identities. No output may overlap a source.
    protected: Vec<(Location, Identity)>,
    /// Files that the images may open, with their identities. Only a part of an output may be one of them.
    allowed: Vec<(Location, Identity)>,
    /// Existing files that the outputs write into or replace.
    claimed: Vec<Identity>,
    swept: Vec<PathBuf>,
    /// Sentences about targets that may be sources or in use, as far as this process can see, and about what
    /// can't be kept of them.
    doubts: Vec<String>,
    /// Files that the outputs replace, open and locked so that no other program begins to use them.
    replaced: Vec<File>,
    /// True if the file system shall not copy the blocks of new files on writes.
    no_copy_on_write: bool,
    /// Files that no rename can replace, which are written in place.
    emptied: Vec<Emptied>,
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

    /// Sets whether the file system may copy the blocks of the next new files when they are written again (btrfs);
    /// by default it may. A file system without that choice gets a sentence in [`Outputs::doubts`].
    pub fn set_copy_on_write(&mut self, allowed: bool) {
        self.no_copy_on_write = !allowed;
    }

    /// Creates a file that [`Outputs::commit`] renames to `path`; it replaces an existing file only with
    /// `overwrite`, or if it is empty. Follows a symbolic link at `path`. A file at a mount point, or in a directory
    /// that this user can't change, is written in place.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the target already exists, is a source, is in use, or is no regular
    /// file;
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
        if let Some(why) = old.as_ref().and_then(|_| in_place::reason(&final_path)) {
            return self.create_in_place(path, &final_path, overwrite, why);
        }
        if old.is_some() {
            self.lock_replaced(path, &final_path)?;
        }
        let replaces = match (overwrite, &old) {
            (true, _) => Replaces::Anything,
            (false, Some(_)) => Replaces::Empty,
            (false, None) => Replaces::Nothing,
        };
        let (Some(directory), Some(name)) = (final_path.parent(), final_path.file_name()) else {
            return Err(Error::usage("is not a file name").path(path));
        };
        let (final_name, name) = (name.to_owned(), name.to_string_lossy());
        let folder = self.folder(directory).map_err(|e| create_error(e).path(path))?;
        partial::sweep(&folder, &name, &mut self.swept);
        let (file, temporary) = self.create_temporary(path, &folder, &name)?;
        if let Some(old) = old {
            self.claimed.extend(Identity::of(&old, &final_path));
            self.keep_attributes(path, &final_path, &file, &old)?;
        }
        // Only an empty file can get this flag.
        if self.no_copy_on_write && !os::forbid_copy_on_write(&file) {
            self.doubts.push(format!(
                "{}: its file system has no switch for copy-on-write; the file is like any other",
                Location::from(path)
            ));
        }
        let output = file::new_file(path, file);
        self.files.push(PendingFile { output: output.clone(), final_path, final_name, temporary, replaces });
        Ok(output)
    }

    /// Gives a new file the owner and permissions of the file that it replaces. The owner must not come from a
    /// file that another user may have planted, and only the superuser can set one.
    fn keep_attributes(&mut self, path: &Path, final_path: &Path, file: &File, old: &Metadata) -> Result<()> {
        let failed = |e| Error::io("create", e).path(path);
        let is_planted = targets::may_be_planted(final_path, old);
        if !is_planted && !os::give_owner_of(file, old).map_err(failed)? {
            self.doubts.push(format!("{}: its owner can't be kept by this user", Location::from(path)));
        }
        // Giving a file away clears some permissions.
        file.set_permissions(old.permissions()).map_err(failed)
    }

    /// Locks the existing file that an output replaces, until this set is dropped. Permission to overwrite does
    /// not include a file in use: its user would go on with a file without a name. A file that can't be opened
    /// for reading can't be locked either; its user is another one.
    fn lock_replaced(&mut self, path: &Path, final_path: &Path) -> Result<()> {
        let Ok(file) = File::open(final_path) else { return Ok(()) };
        self.lock_target(path, &file)
            .and_then(|()| match os::used_elsewhere(&file) {
                Some(how) => Err(Error::refused(format!("in use: {how}")).path(path)),
                None => Ok(()),
            })
            .map_err(|e| e.hint("stop the program that uses it, or choose another target"))?;
        self.replaced.push(file);
        Ok(())
    }

    /// Locks an existing target against other programs that use it.
    fn lock_target(&mut self, path: &Path, file: &File) -> Result<()> {
        if image_lock::for_writing(file).map_err(|e| e.path(path))? == ImageLock::Unavailable {
            self.doubts.push(format!(
                "{} can't be locked on its file system: a program that uses it may go unnoticed",
                Location::from(path)
            ));
        }
        Ok(())
    }

    /// Creates the unfinished file of the output `name`. The first one in a directory shows how files can be
    /// renamed there, and that they can, before any time is spent on their content.
    fn create_temporary(&self, path: &Path, folder: &Arc<Folder>, name: &str) -> Result<(File, Temporary)> {
        self.cleaner.register(|paths| {
            let created = partial::create(folder, name).map_err(|e| create_error(e).path(path))?;
            let (file, mut entry) = created;
            if folder.naming.get().is_none() {
                let before = Temporary::new(entry.clone());
                let naming = rename::probe(&mut entry, partial::new_name(name))
                    .map_err(|e| probe_error(e).path(path))?;
                // Another name may be another inode.
                entry.id = file.metadata().map_or(entry.id, |meta| os::file_identity(&meta));
                drop(before);
                folder.naming.get_or_init(|| naming);
            }
            paths.files.push(entry.clone());
            Ok((file, Temporary::new(entry)))
        })
    }

    /// Returns the open directory at `path`.
    fn folder(&mut self, path: &Path) -> io::Result<Arc<Folder>> {
        let folder = Folder::open(path)?;
        let known = self.folders.iter().find(|known| known.path == folder.path && known.is_in_place());
        if let Some(known) = known {
            return Ok(known.clone());
        }
        self.folders.push(folder.clone());
        Ok(folder)
    }

    /// Returns the directories whose file systems give a name to a finished file only by replacing an empty
    /// one: they can neither rename without replacing nor link.
    pub fn without_safe_naming(&self) -> impl Iterator<Item = &Path> {
        let unsafe_ones = self.folders.iter().filter(|folder| folder.naming.get() == Some(&Naming::Reserve));
        unsafe_ones.map(|folder| &*folder.path)
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
        let failed = |e| Error::io("create the directory", e).path(path);
        // A path that ends in ".." names a directory that exists.
        let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::AlreadyExists.into()))?;
        let folder = self.folder(parent(path)).map_err(failed)?;
        let made = self.cleaner.register(|paths| {
            folder.handle.create_directory(name).map_err(failed)?;
            let id = folder.handle.look_up(name).map_err(failed)?.id;
            let made = Entry { folder: folder.clone(), name: name.to_owned(), id };
            paths.directories.push(made.clone());
            Ok(made)
        })?;
        self.directories.push(made);
        Ok(())
    }

    /// Writes a new file that other programs see before the commit. Without a commit, the drop removes it.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Io`], also if the name already exists.
    pub fn publish(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io("unable to write file", e).path(path);
        let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let folder = self.folder(parent(path)).map_err(failed)?;
        let (mut file, published) = self.cleaner.register(|paths| {
            let file = folder.handle.create_file(name).map_err(failed)?;
            let id = os::file_identity(&file.metadata().map_err(failed)?);
            let entry = Entry { folder: folder.clone(), name: name.to_owned(), id };
            paths.files.push(entry.clone());
            Ok((file, Temporary::new(entry)))
        })?;
        self.published.push(published);
        file.write_all(bytes).map_err(failed)
    }

    /// Flushes every output, renames all files to their final names, then flushes the directories.
    ///
    /// # Errors
    /// The error of the first flush or rename that fails. The earlier renames are undone.
    /// [`imgtool_core::ErrorKind::Refused`] if a directory was moved or removed meanwhile.
    pub fn commit(mut self) -> Result<()> {
        for pending in &self.files {
            pending.output.sync()?;
        }
        for other in &self.others {
            other.sync()?;
        }
        check_in_place(&self.files)?;
        let mut named: Vec<NamedFile> = Vec::new();
        for pending in std::mem::take(&mut self.files) {
            match pending.rename() {
                Ok(file) => named.push(file),
                Err(error) => return Err(roll_back(named, error)),
            }
        }
        let of_directories = self.directories.iter().map(|directory| &directory.folder);
        let of_files = named.iter().map(|file| &file.named.folder);
        if let Err(error) = sync_directories(of_files.chain(of_directories).collect()) {
            return Err(roll_back(named, error));
        }
        self.directories.clear();
        self.emptied.clear();
        for published in self.published.drain(..) {
            let _ = published.keep();
        }
        self.cleaner.forget();
        Ok(())
    }

    /// Returns the directories in which [`Outputs::commit`] and the drop rename and remove files.
    pub fn file_directories(&self) -> Vec<Arc<DirectoryHandle>> {
        let files = self.files.iter().map(|pending| &pending.temporary).chain(&self.published);
        different(files.filter_map(Temporary::entry))
    }

    /// Returns those of [`Outputs::file_directories`] in which [`Outputs::commit`] creates an empty file to
    /// reserve a name.
    pub fn reserved_directories(&self) -> Vec<Arc<DirectoryHandle>> {
        let files = self.files.iter().filter_map(|pending| pending.temporary.entry());
        different(files.filter(|entry| entry.folder.naming.get() == Some(&Naming::Reserve)))
    }

    /// Returns the directories in which this set has created directories.
    pub fn parent_directories(&self) -> Vec<Arc<DirectoryHandle>> {
        different(self.directories.iter())
    }

    /// Returns the paths of the unfinished files that this set has removed, left by a killed run.
    pub fn swept(&self) -> &[PathBuf] {
        &self.swept
    }

    /// Returns a sentence for each pair of source and existing target that [`Outputs::check`] could not
    /// compare, since one of them is on an overlay whose layers this process can't see, for each existing
    /// target that can't be locked, whose owner can't be kept, or that is written in place since no rename can replace it.
    pub fn doubts(&self) -> &[String] {
        &self.doubts
    }
}

/// Returns each directory of `entries` once.
fn different<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Arc<DirectoryHandle>> {
    let mut handles: Vec<Arc<DirectoryHandle>> = Vec::new();
    for entry in entries {
        if !handles.iter().any(|known| Arc::ptr_eq(known, &entry.folder.handle)) {
            handles.push(Arc::clone(&entry.folder.handle));
        }
    }
    handles
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // Files remove themselves when dropped. A directory can be removed only if it is empty.
        self.files.clear();
        self.published.clear();
        self.emptied.iter().for_each(Emptied::empty);
        for directory in self.directories.iter().rev() {
            directory.remove_directory();
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

/// Returns the error for a file system that does not rename, found before the first byte is written.
fn probe_error(e: io::Error) -> Error {
    Error::io("rename a file in the directory", e)
        .hint("an unfinished output has a temporary name: choose a directory on another file system")
}

/// Returns the directory of a path.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests;
