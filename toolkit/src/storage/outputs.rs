//! The outputs of one run: a final name is always a finished output.
//!
//! Each file is written beside its target as `.NAME.partial-XXXXXX` (`partial.rs`). [`Outputs::commit`]
//! flushes all of them and only then renames them; until that, dropping the set removes everything.

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempPath;

use super::os::{self, FileClass, FileId};
use super::output::Output;
use super::partial;
use crate::error::{Error, Result, escape_control};

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

struct PendingFile {
    output: Output,
    /// Where it will be: the directory resolved, so that one file has one such path.
    final_path: PathBuf,
    temporary: TempPath,
    overwrite: bool,
}

impl PendingFile {
    /// Renames the finished file to its final name.
    fn give_name(self) -> Result<Named> {
        let path = self.final_path;
        let failed = |e| Error::io("give the finished output its name", e).path(&path);
        let id =
            self.output.file().and_then(|file| file.metadata().ok()).map(|meta| os::file_identity(&meta));
        if self.overwrite && path.exists() {
            // The old file keeps a name until every output has its own.
            if os::exchange_names(&self.temporary, &path).map_err(failed)? {
                return Ok(Named { path, id, old: Some(self.temporary) });
            }
            self.temporary.persist(&path).map_err(|e| failed(e.error))?;
        } else {
            self.temporary.persist_noclobber(&path).map_err(|e| failed(e.error))?;
        }
        Ok(Named { path, id, old: None })
    }
}

/// An output that has its final name; `old` is the file that had it before, removed when dropped.
struct Named {
    path: PathBuf,
    id: Option<FileId>,
    old: Option<TempPath>,
}

impl Named {
    /// Takes the final name back; the path, when that fails.
    fn undo(self) -> Option<PathBuf> {
        let ours = std::fs::symlink_metadata(&self.path).ok().map(|meta| os::file_identity(&meta)) == self.id;
        if !ours {
            // Somebody has put another file there: it is not ours to remove.
            return None;
        }
        let undone = match &self.old {
            Some(old) => os::exchange_names(old, &self.path).map(|_| ()),
            None => std::fs::remove_file(&self.path),
        };
        undone.is_err().then_some(self.path)
    }
}

/// Removes the partial files of a run from another thread: for signal handlers whose program has
/// no time to unwind. Nothing is begun any more after that.
#[derive(Debug, Clone, Default)]
pub struct Cleaner(Arc<Mutex<Paths>>);

#[derive(Debug, Default)]
struct Paths {
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
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

    fn forget(&self) {
        let mut paths = self.lock();
        paths.files.clear();
        paths.directories.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Paths> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `make` so that [`Cleaner::clean`] comes before or after it, never in between.
    fn making<T>(&self, make: impl FnOnce(&mut Paths) -> Result<T>) -> Result<T> {
        let mut paths = self.lock();
        if paths.closed {
            return Err(Error::cancelled("interrupted"));
        }
        make(&mut paths)
    }
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

    /// Refuses outputs that are this file under any name, or a device that it lies on: it is a
    /// source. `-` is standard input.
    pub fn protect(&mut self, source: &Path) {
        let meta = if source == Path::new("-") { stdin_metadata() } else { std::fs::metadata(source) };
        if let Ok(meta) = meta
            && matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice)
        {
            self.protected.push((source.to_owned(), os::file_layers(&meta, true)));
        }
    }

    /// Refuses what [`Outputs::create`] and the others would refuse, for all outputs of a run, before
    /// anything is opened or made.
    ///
    /// # Errors
    /// Those of [`Outputs::create`] and [`Outputs::existing`].
    pub fn check(&self, wanted: &[Wanted]) -> Result<()> {
        let mut names: Vec<PathBuf> = Vec::new();
        let mut taken = self.taken.clone();
        for output in wanted {
            match output {
                Wanted::New { path, overwrite, links } => {
                    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                    let missing = parent.is_some_and(|parent| !parent.exists());
                    // In a directory that is not there yet nothing is in the way.
                    let final_path = if missing { path.clone() } else { final_path(path, *links)? };
                    if names.contains(&final_path) {
                        return Err(Error::usage("two outputs would be this file").path(path));
                    }
                    if let Some(meta) = self.check_target(path, &final_path, *overwrite, &taken)? {
                        taken.push(os::file_layers(&meta, false));
                    }
                    names.push(final_path);
                }
                Wanted::Existing(path) => {
                    let meta =
                        std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
                    self.check_free(path, &meta, &taken)?;
                    taken.push(os::file_layers(&meta, false));
                }
                Wanted::Stdout => self.check_stdout(&mut taken)?,
            }
        }
        Ok(())
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
            let made = partial::create(directory, &name)
                // The kind alone: the error's text would name the temporary file.
                .map_err(|e| Error::io("create", plain(&e)).path(path))?;
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

    /// Refuses a target that can't be, or may not be, replaced; what is there now.
    fn check_target(
        &self,
        path: &Path,
        final_path: &Path,
        overwrite: bool,
        taken: &[Vec<FileId>],
    ) -> Result<Option<Metadata>> {
        let Ok(meta) = std::fs::metadata(final_path) else {
            return Ok(None);
        };
        self.check_free(path, &meta, taken)?;
        match os::classify(&meta) {
            FileClass::Regular if overwrite => Ok(Some(meta)),
            FileClass::Regular => {
                Err(Error::refused("exists").path(path).hint("--force overwrites it; -n writes into it"))
            }
            FileClass::Directory => Err(Error::refused("is a directory").path(path)),
            FileClass::BlockDevice => Err(Error::refused("is a block device")
                .path(path)
                .hint("write into it with -n, or with --target NAME=PATH")),
            FileClass::Stream => {
                Err(Error::refused("is neither a regular file nor a block device").path(path))
            }
        }
    }

    /// Refuses what is a source, or another output.
    fn check_free(&self, path: &Path, meta: &Metadata, taken: &[Vec<FileId>]) -> Result<()> {
        let own = os::file_identity(meta);
        let layers = os::file_layers(meta, false);
        if taken.iter().any(|other| other.contains(&own) || layers.contains(&other[0])) {
            return Err(Error::usage("two outputs would be this file").path(path));
        }
        for (source, beneath) in &self.protected {
            let source_name = escape_control(&source.to_string_lossy());
            if beneath[0] == own {
                let text = format!("source and target are the same file ({source_name})");
                return Err(Error::refused(text).path(path).hint("give the new image another name"));
            }
            if beneath.contains(&own) || layers.contains(&beneath[0]) {
                let text = format!("writing to the target would change the source ({source_name})");
                return Err(Error::refused(text)
                    .path(path)
                    .hint("one of them is a device on top of the other, or holds it"));
            }
        }
        Ok(())
    }

    /// Refuses standard output when it leads into a source or into another output.
    fn check_stdout(&self, taken: &mut Vec<Vec<FileId>>) -> Result<()> {
        let Ok(meta) = stdout_metadata() else { return Ok(()) };
        if matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice) {
            self.check_free(Path::new("-"), &meta, taken)?;
            taken.push(os::file_layers(&meta, false));
        }
        Ok(())
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

/// Takes the names back that were given; the error then, with what could not be taken back.
fn taken_back(named: Vec<Named>, error: Error) -> Error {
    let stuck: Vec<String> =
        named.into_iter().rev().filter_map(Named::undo).map(|path| shown(&path)).collect();
    if stuck.is_empty() {
        return error;
    }
    error.hint(format!(
        "finished, but without the others, and its name could not be taken back: {}",
        stuck.join(", ")
    ))
}

fn shown(path: &Path) -> String {
    escape_control(&path.to_string_lossy())
}

/// The system's own error without the text that a library put around it.
fn plain(e: &io::Error) -> io::Error {
    match std::error::Error::source(e).and_then(|e| e.downcast_ref::<io::Error>()).or(Some(e)) {
        Some(inner) if inner.raw_os_error().is_some() => {
            io::Error::from_raw_os_error(inner.raw_os_error().unwrap_or_default())
        }
        _ => e.kind().into(),
    }
}

/// Where a file called `path` will be: the directory is resolved, and a link if it is to be followed.
fn final_path(path: &Path, links: Links) -> Result<PathBuf> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
        if links == Links::Refuse {
            return Err(Error::refused("is a symbolic link, and names that an image gives are not followed")
                .path(path)
                .hint("remove the link, or send the disk where it leads with --target NAME=PATH"));
        }
        return std::fs::canonicalize(path).map_err(|e| {
            Error::io("follow the link", e)
                .path(path)
                .hint("the link leads nowhere: remove it, or name another file")
        });
    }
    let name = path.file_name().ok_or_else(|| Error::usage("is not a file name").path(path))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let found = std::fs::canonicalize(directory).map_err(|e| {
        let is_missing = e.kind() == io::ErrorKind::NotFound;
        let error = Error::io("create", e).path(path);
        let directory = directory.display();
        if is_missing {
            error.hint(format!("there is no directory {directory}: make it first"))
        } else {
            error
        }
    })?;
    Ok(found.join(name))
}

/// Makes new names durable. Where a directory can't be flushed at all that is no error: the files
/// themselves are flushed already.
fn sync_directories(mut directories: Vec<&Path>) -> Result<()> {
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        match File::open(directory).and_then(|file| file.sync_all()) {
            Err(e) if is_failure(&e) => {
                return Err(Error::io("flush the directory", e).path(directory));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether flushing a directory failed, rather than not being offered.
fn is_failure(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotFound, PermissionDenied, Unsupported};
    !matches!(e.kind(), InvalidInput | IsADirectory | NotFound | PermissionDenied | Unsupported)
}

#[cfg(unix)]
fn stdin_metadata() -> io::Result<Metadata> {
    use std::os::fd::AsFd;
    File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata()
}

#[cfg(unix)]
fn stdout_metadata() -> io::Result<Metadata> {
    use std::os::fd::AsFd;
    File::from(io::stdout().as_fd().try_clone_to_owned()?).metadata()
}

#[cfg(not(unix))]
fn stdin_metadata() -> io::Result<Metadata> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(unix))]
fn stdout_metadata() -> io::Result<Metadata> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn nothing_is_left_without_commit() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = dir.path().join("sub/deep/x.raw");
        let mut outputs = Outputs::new();
        outputs.directory(target.parent().expect("parent")).expect("mkdir");
        let output = outputs.create(&target, false).expect("create");
        output.write_at(b"abc", 0).expect("write");
        assert!(!target.exists());
        drop(outputs);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
    }

    #[test]
    fn commit_names_all() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut outputs = Outputs::new();
        outputs.create(&a, false).expect("create").write_at(b"a", 0).expect("write");
        outputs.create(&b, false).expect("create").write_at(b"b", 1).expect("write");
        outputs.commit().expect("commit");
        assert_eq!(std::fs::read(&a).expect("read"), b"a");
        assert_eq!(std::fs::read(&b).expect("read"), b"\0b");
        assert!(Outputs::new().create(&a, false).is_err());
    }

    #[test]
    fn a_failed_commit_gives_back_what_was_there() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        std::fs::write(&a, b"old").expect("write");
        let mut outputs = Outputs::new();
        outputs.create(&a, true).expect("create").write_at(b"new", 0).expect("write");
        outputs.create(&b, false).expect("create").write_at(b"new", 0).expect("write");
        outputs.create(&c, false).expect("create").write_at(b"new", 0).expect("write");
        std::fs::write(&c, b"in the way").expect("write");
        outputs.commit().expect_err("c exists by now");
        assert_eq!(std::fs::read(&a).expect("read"), b"old");
        assert!(!b.exists());
        assert_eq!(std::fs::read(&c).expect("read"), b"in the way");
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
    }

    #[test]
    fn overwriting_leaves_only_the_new_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let a = dir.path().join("a");
        std::fs::write(&a, b"old").expect("write");
        let mut outputs = Outputs::new();
        outputs.create(&a, true).expect("create").write_at(b"new", 0).expect("write");
        outputs.commit().expect("commit");
        assert_eq!(std::fs::read(&a).expect("read"), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 1);
    }

    #[test]
    fn long_names_still_get_a_partial_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ä".repeat(127));
        let mut outputs = Outputs::new();
        outputs.create(&path, false).expect("create");
        outputs.commit().expect("commit");
        assert!(path.exists());
    }

    #[test]
    fn one_file_is_not_two_outputs_under_any_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (file, link) = (dir.path().join("f"), dir.path().join("l"));
        std::fs::write(&file, b"x").expect("write");
        std::fs::hard_link(&file, &link).expect("link");
        let mut outputs = Outputs::new();
        outputs.existing(&file, false, false).expect("first");
        assert!(outputs.existing(&link, false, false).is_err());
        assert!(outputs.create(&link, true).is_err());
        let mut outputs = Outputs::new();
        outputs.create(&dir.path().join("n"), true).expect("first");
        assert!(outputs.create(&dir.path().join("./n"), true).is_err());
        outputs.create(&file, true).expect("second");
        assert!(outputs.existing(&link, false, false).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_modes_are_kept() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().expect("tempdir");
        let (file, link) = (dir.path().join("f"), dir.path().join("l"));
        symlink("f", &link).expect("link");
        assert!(Outputs::new().create(&link, true).is_err(), "leads nowhere");
        std::fs::write(&file, b"old").expect("write");
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("mode");
        let mut outputs = Outputs::new();
        outputs.create(&link, true).expect("create").write_at(b"new", 0).expect("write");
        outputs.commit().expect("commit");
        assert_eq!(std::fs::read(&file).expect("read"), b"new");
        assert!(std::fs::symlink_metadata(&link).expect("meta").is_symlink());
        assert_eq!(std::fs::metadata(&file).expect("meta").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_source_is_not_a_target() {
        let dir = tempfile::tempdir().expect("tempdir");
        let source = dir.path().join("s");
        std::fs::write(&source, b"x").expect("write");
        let link = dir.path().join("l");
        std::fs::hard_link(&source, &link).expect("link");
        let mut outputs = Outputs::new();
        outputs.protect(&source);
        assert!(outputs.create(&link, true).is_err());
        assert!(outputs.existing(&link, false, true).is_err());
    }

    #[test]
    fn all_outputs_are_checked_before_one_is_made() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (free, taken, source) =
            (dir.path().join("free"), dir.path().join("taken"), dir.path().join("source"));
        std::fs::write(&taken, b"x").expect("write");
        std::fs::write(&source, b"x").expect("write");
        let new =
            |path: &Path, overwrite| Wanted::New { path: path.to_owned(), overwrite, links: Links::Follow };
        let mut outputs = Outputs::new();
        outputs.protect(&source);
        outputs.check(&[new(&free, false), new(&taken, true)]).expect("fine");
        outputs.check(&[new(&dir.path().join("not/yet"), false)]).expect("a directory to be made");
        for bad in [
            vec![new(&free, false), new(&taken, false)],
            vec![new(&free, false), new(&dir.path().join("./free"), false)],
            vec![new(&free, false), new(&source, true)],
            vec![new(&free, false), Wanted::Existing(source.clone())],
            vec![new(&taken, true), Wanted::Existing(taken.clone())],
            vec![new(&dir.path().join("not/yet"), false), new(&dir.path().join("not/yet"), false)],
        ] {
            outputs.check(&bad).expect_err("refused");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_under_a_name_from_an_image_is_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (victim, link, nowhere) = (dir.path().join("v"), dir.path().join("l"), dir.path().join("n"));
        std::fs::write(&victim, b"old").expect("write");
        std::os::unix::fs::symlink(&victim, &link).expect("link");
        std::os::unix::fs::symlink("nowhere", &nowhere).expect("link");
        for path in [&link, &nowhere] {
            for overwrite in [false, true] {
                let refused = Outputs::new().create_linked(path, overwrite, Links::Refuse);
                assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::Refused));
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 3);
        assert_eq!(std::fs::read(&victim).expect("read"), b"old");
    }

    #[test]
    fn nothing_is_begun_after_cleaning() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut outputs = Outputs::new();
        outputs.directory(&dir.path().join("d")).expect("mkdir");
        outputs.create(&dir.path().join("d/a"), false).expect("create");
        outputs.cleaner().clean();
        assert_eq!(
            outputs.create(&dir.path().join("b"), false).err().map(|e| e.kind()),
            Some(ErrorKind::Cancelled)
        );
        assert!(outputs.directory(&dir.path().join("e")).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
    }

    #[test]
    fn a_name_that_somebody_took_meanwhile_is_not_taken_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, b"theirs").expect("write");
        std::fs::write(&b, b"ours").expect("write");
        let id = std::fs::metadata(&b).ok().map(|meta| os::file_identity(&meta));
        assert_eq!(Named { path: a.clone(), id, old: None }.undo(), None);
        assert_eq!(Named { path: b.clone(), id, old: None }.undo(), None);
        assert!(a.exists() && !b.exists());
    }
}
