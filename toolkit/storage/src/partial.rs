//! Unfinished outputs: names, creation, and removal of the files left by a killed run.
//!
//! The process that creates an unfinished file locks it (flock) until it closes the file or ends. An unlocked
//! file with a partial name has no owner any more. A sweep between creating and locking may remove the file;
//! the creator notices that and creates another.

use std::cell::Cell;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::os;

/// Maximum length of a file name on Linux, in bytes (NAME_MAX).
const NAME_MAX: usize = 255;
/// Number of bytes that a partial name adds: a dot, ".partial-" and six characters.
const PARTIAL_EXTRA: usize = 16;
/// Number of random characters at the end of a partial name.
const RANDOM_LEN: usize = 6;
/// Maximum number of attempts to create a file. An attempt fails if a sweep removes the file before the
/// creator has locked it. Our limit: even one failure is rare.
const MAX_ATTEMPTS: u32 = 16;

/// Creates and locks the unfinished file of the output `name`.
pub(super) fn create(directory: &Path, name: &str) -> io::Result<(File, TempPath)> {
    let prefix = prefix(name);
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).rand_bytes(RANDOM_LEN);
    // Keep the system's error code: the error of tempfile hides it, and names the temporary file.
    let code = Cell::new(None);
    let open = |path: &Path| create_new(path).inspect_err(|e| code.set(e.raw_os_error()));
    for _ in 0..MAX_ATTEMPTS {
        let created = builder.make_in(directory, open);
        let created = created.map_err(|e| code.get().map_or(e, io::Error::from_raw_os_error));
        let (file, temporary) = created?.into_parts();
        // Waits for a sweep that holds the lock. On a file system without locks, no sweep removes the file.
        let locked = file.lock().is_ok();
        if !locked || is_at(&file, &temporary) {
            return Ok((file, temporary));
        }
    }
    Err(io::Error::other("another process keeps removing the unfinished file"))
}

/// Creates a new file with the default permissions (tempfile would use 0600).
fn create_new(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

/// Removes the unfinished files of the output `name` left by a killed run, and adds their paths to `swept`.
pub(super) fn sweep(directory: &Path, name: &str, swept: &mut Vec<PathBuf>) {
    // A process on another machine may hold a lock that we can't see.
    if os::is_remote(directory) {
        return;
    }
    let prefix = prefix(name);
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let ours = name.strip_prefix(&prefix).is_some_and(|tail| tail.len() == RANDOM_LEN);
        if ours && partial_name(name) && remove_abandoned(&entry.path()) {
            swept.push(entry.path());
        }
    }
}

/// Returns true if `name` is the file name of an unfinished output.
pub fn partial_name(name: &str) -> bool {
    let random = |tail: &str| tail.len() == RANDOM_LEN && tail.bytes().all(|b| b.is_ascii_alphanumeric());
    name.starts_with('.') && name.rsplit_once(".partial-").is_some_and(|(_, tail)| random(tail))
}

/// Returns the start of the temporary name of the output `name`: `.NAME.partial-`, with NAME cut to fit
/// NAME_MAX.
fn prefix(name: &str) -> String {
    let mut keep = name.len().min(NAME_MAX - PARTIAL_EXTRA);
    while !name.is_char_boundary(keep) {
        keep -= 1;
    }
    format!(".{}.partial-", &name[..keep])
}

/// Removes an unfinished file if no running program has locked it. Returns true if the file was removed.
fn remove_abandoned(path: &Path) -> bool {
    if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()) {
        return false;
    }
    let Ok(file) = File::open(path) else { return false };
    match file.try_lock() {
        Ok(()) => is_at(&file, path) && std::fs::remove_file(path).is_ok(),
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
    }
}

/// True if `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: io::Result<std::fs::Metadata>| meta.ok().map(|meta| os::file_identity(&meta));
    let own = id(file.metadata());
    own.is_some() && own == id(std::fs::symlink_metadata(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_removes_only_orphaned_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        let make = |name: &str| File::create_new(dir.path().join(name)).expect("create");
        for name in [
            ".x.raw.partial-abcdef",
            ".y.raw.partial-abcdef",
            ".x.raw.partial-abc-ef",
            ".x.raw.partial-toolong",
            "x.raw.partial-abcdef",
        ] {
            drop(make(name));
        }
        let in_use = make(".x.raw.partial-inuse1");
        in_use.lock().expect("lock");
        std::fs::create_dir(dir.path().join(".x.raw.partial-folder")).expect("mkdir");
        let mut swept = Vec::new();
        sweep(dir.path(), "x.raw", &mut swept);
        assert_eq!(swept, [dir.path().join(".x.raw.partial-abcdef")]);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 6);
        drop(in_use);
        sweep(dir.path(), "x.raw", &mut swept);
        assert_eq!(swept.len(), 2);
    }

    #[test]
    fn creation_survives_concurrent_sweeps() {
        let dir = tempfile::tempdir().expect("tempdir");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    sweep(dir.path(), "x", &mut Vec::new());
                }
            };
            scope.spawn(sweeper);
            scope.spawn(sweeper);
            let creators: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..500 {
                            let (file, path) = create(dir.path(), "x").expect("create");
                            assert!(is_at(&file, &path), "swept while in use");
                        }
                    })
                })
                .collect();
            let failed = creators.into_iter().any(|creator| creator.join().is_err());
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(!failed);
        });
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
    }
}
