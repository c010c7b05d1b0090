//! The outputs of one run: a final name is always a finished output.
//!
//! Each file is written beside its target as `.NAME.partial-XXXXXX`. [`Outputs::commit`] flushes all
//! of them and only then renames them; until that, dropping the set removes everything.

use std::fs::{File, Metadata, Permissions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempPath;

use super::os::{self, FileClass};
use super::output::Output;
use crate::error::{Error, Result, escape_control};

/// Longest file name of the file systems in use (NAME_MAX).
const NAME_MAX: usize = 255;
/// What a partial name adds: a dot, ".partial-" and six characters.
const PARTIAL_EXTRA: usize = 16;

/// The outputs of one run.
#[derive(Default)]
pub struct Outputs {
    files: Vec<PendingFile>,
    others: Vec<Output>,
    directories: Vec<PathBuf>,
    published: Vec<PathBuf>,
    protected: Vec<(PathBuf, (u64, u64))>,
    /// Files that exist and are written to, or will be replaced.
    taken: Vec<(u64, u64)>,
    swept: Vec<PathBuf>,
    cleaner: Cleaner,
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
        if self.overwrite && path.exists() {
            // The old file keeps a name until every output has its own.
            if os::exchange_names(&self.temporary, &path).map_err(failed)? {
                return Ok(Named { path, old: Some(self.temporary) });
            }
            self.temporary.persist(&path).map_err(|e| failed(e.error))?;
        } else {
            self.temporary.persist_noclobber(&path).map_err(|e| failed(e.error))?;
        }
        Ok(Named { path, old: None })
    }
}

/// An output that has its final name; `old` is the file that had it before, removed when dropped.
struct Named {
    path: PathBuf,
    old: Option<TempPath>,
}

impl Named {
    /// Takes the final name back.
    fn undo(self) {
        // Nothing more can be done when this fails: the error that led here is reported.
        let _ = match &self.old {
            Some(old) => os::exchange_names(old, &self.path).map(|_| ()),
            None => std::fs::remove_file(&self.path),
        };
    }
}

/// Removes the partial files of a run from another thread: for signal handlers whose program has
/// no time to unwind.
#[derive(Debug, Clone, Default)]
pub struct Cleaner(Arc<Mutex<Paths>>);

#[derive(Debug, Default)]
struct Paths {
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Cleaner {
    /// Removes what is not finished.
    pub fn clean(&self) {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for path in paths.files.drain(..) {
            // The file may be gone already; there is nobody left to tell otherwise.
            let _ = std::fs::remove_file(path);
        }
        for path in paths.directories.drain(..).rev() {
            let _ = std::fs::remove_dir(path);
        }
    }

    fn forget(&self) {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paths.files.clear();
        paths.directories.clear();
    }

    fn with<T>(&self, f: impl FnOnce(&mut Paths) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
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

    /// Refuses outputs that are this file under any name: it is a source.
    pub fn protect(&mut self, source: &Path) {
        if let Ok(meta) = std::fs::metadata(source) {
            self.protected.push((source.to_owned(), os::file_identity(&meta)));
        }
    }

    /// A new file that will be called `path`. Nothing of that name exists, or `overwrite` is set.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] when it exists, is a source, or is no regular file;
    /// [`crate::ErrorKind::Io`].
    pub fn create(&mut self, path: &Path, overwrite: bool) -> Result<Output> {
        let final_path = final_path(path)?;
        let old = self.check_target(path, &final_path, overwrite)?;
        let (Some(directory), Some(name)) = (final_path.parent(), final_path.file_name()) else {
            return Err(Error::usage("is not a file name").path(path));
        };
        let prefix = partial_prefix(&name.to_string_lossy());
        self.sweep(directory, &prefix);
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
        let (file, temporary) = builder
            .prefix(&prefix)
            .rand_bytes(6)
            .tempfile_in(directory)
            // The kind alone: the error's text would name the temporary file.
            .map_err(|e| Error::io("create", e.kind().into()).path(path))?
            .into_parts();
        self.cleaner.with(|paths| paths.files.push(temporary.to_path_buf()));
        // Held while the program lives: tells a later run that this file is in use.
        let _ = file.try_lock();
        if let Some(old) = old {
            self.taken.push(os::file_identity(&old));
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
        self.check_protected(path, os::file_identity(&meta))?;
        self.check_taken(path, os::file_identity(&meta))?;
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
        self.taken.push(os::file_identity(&meta));
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
        std::fs::create_dir(path).map_err(|e| Error::io("make the directory", e).path(path))?;
        self.directories.push(path.to_owned());
        self.cleaner.with(|paths| paths.directories.push(path.to_owned()));
        Ok(())
    }

    /// Writes a file of a new name that others are to see before the end; it is removed again unless
    /// all goes well.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn publish(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io("unable to write file", e).path(path);
        let mut file = File::create_new(path).map_err(failed)?;
        self.published.push(path.to_owned());
        self.cleaner.with(|paths| paths.files.push(path.to_owned()));
        file.write_all(bytes).map_err(failed)
    }

    /// Flushes every output, then gives all files their final names.
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
                Err(error) => {
                    named.into_iter().rev().for_each(Named::undo);
                    return Err(error);
                }
            }
        }
        let named: Vec<PathBuf> = named.into_iter().map(|done| done.path).collect();
        self.directories.clear();
        self.published.clear();
        self.cleaner.forget();
        sync_directories(&named);
        Ok(())
    }

    /// Unfinished files that an earlier run had to leave behind and this one has removed.
    pub fn swept(&self) -> &[PathBuf] {
        &self.swept
    }

    /// Removes what a killed run left of an output of the same name. A file that is in use is
    /// locked; one that is being made this moment is too young.
    fn sweep(&mut self, directory: &Path, prefix: &str) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let ours = name.strip_prefix(prefix).is_some_and(|tail| tail.len() == 6) && partial_name(name);
            if ours && is_abandoned(&entry.path()) && std::fs::remove_file(entry.path()).is_ok() {
                self.swept.push(entry.path());
            }
        }
    }

    /// Refuses a target that can't be, or may not be, replaced; what is there now.
    fn check_target(&self, path: &Path, final_path: &Path, overwrite: bool) -> Result<Option<Metadata>> {
        if self.files.iter().any(|pending| pending.final_path == final_path) {
            return Err(Error::usage("two outputs would be this file").path(path));
        }
        let Ok(meta) = std::fs::metadata(final_path) else {
            return Ok(None);
        };
        self.check_protected(path, os::file_identity(&meta))?;
        self.check_taken(path, os::file_identity(&meta))?;
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

    fn check_taken(&self, path: &Path, identity: (u64, u64)) -> Result<()> {
        if self.taken.contains(&identity) {
            return Err(Error::usage("two outputs would be this file").path(path));
        }
        Ok(())
    }

    fn check_protected(&self, path: &Path, identity: (u64, u64)) -> Result<()> {
        match self.protected.iter().find(|(_, known)| *known == identity) {
            Some((source, _)) => Err(Error::refused(format!(
                "source and target are the same file ({})",
                escape_control(&source.to_string_lossy())
            ))
            .path(path)),
            None => Ok(()),
        }
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

/// Where a file called `path` will be: links are followed, the directory is resolved.
fn final_path(path: &Path) -> Result<PathBuf> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
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
    let directory = std::fs::canonicalize(directory).map_err(|e| Error::io("create", e).path(path))?;
    Ok(directory.join(name))
}

/// What the temporary name of an output called `name` begins with: `.NAME.partial-`.
fn partial_prefix(name: &str) -> String {
    let mut keep = name.len().min(NAME_MAX - PARTIAL_EXTRA);
    while !name.is_char_boundary(keep) {
        keep -= 1;
    }
    format!(".{}.partial-", &name[..keep])
}

/// Whether a file name is that of an unfinished output.
pub fn partial_name(name: &str) -> bool {
    name.starts_with('.')
        && name.rsplit_once(".partial-").is_some_and(|(_, tail)| tail.len() == 6 && tail.is_ascii())
}

/// Whether an unfinished file belongs to no running program.
fn is_abandoned(path: &Path) -> bool {
    /// Younger files may be about to be locked.
    const GRACE: Duration = Duration::from_secs(2);
    let old_enough = std::fs::symlink_metadata(path).is_ok_and(|meta| {
        meta.is_file() && meta.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age > GRACE))
    });
    old_enough && File::open(path).is_ok_and(|file| file.try_lock().is_ok())
}

/// Makes the new names durable. Not every file system can; the files themselves are flushed already.
fn sync_directories(paths: &[PathBuf]) {
    let mut directories: Vec<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        let _ = File::open(directory).and_then(|file| file.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn what_a_killed_run_left_is_swept_and_what_is_in_use_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let past = std::time::SystemTime::now() - Duration::from_secs(60);
        let make = |name: &str| {
            let file = File::create_new(dir.path().join(name)).expect("create");
            file.set_modified(past).expect("set time");
            file
        };
        drop(make(".x.raw.partial-abcdef"));
        drop(make(".y.raw.partial-abcdef"));
        let in_use = make(".x.raw.partial-inuse1");
        in_use.lock().expect("lock");
        let mut outputs = Outputs::new();
        outputs.create(&dir.path().join("x.raw"), false).expect("create");
        assert_eq!(outputs.swept(), [dir.path().join(".x.raw.partial-abcdef")]);
        assert!(dir.path().join(".x.raw.partial-inuse1").exists());
        assert!(dir.path().join(".y.raw.partial-abcdef").exists());
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
}
