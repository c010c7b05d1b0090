//! Unfinished outputs: how they are named, made, and told from those of a run that was killed.
//!
//! Whoever makes one holds a lock on it (flock) until the program ends, however it ends. A file of
//! that name without a lock belongs to nobody any more. Making and locking are two steps: a sweep in
//! between may take the file, which its maker notices, and makes another.

use std::cell::Cell;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::os;

/// Longest file name of the file systems in use (NAME_MAX).
const NAME_MAX: usize = 255;
/// What a partial name adds: a dot, ".partial-" and six characters.
const PARTIAL_EXTRA: usize = 16;
/// Characters at the end that are drawn at random.
const RANDOM_LEN: usize = 6;
/// How often a file may be swept away between making and locking. Ours: once is rare.
const ATTEMPTS: u32 = 16;

/// Makes and locks the unfinished file of an output that will be called `name`.
pub(super) fn create(directory: &Path, name: &str) -> io::Result<(File, TempPath)> {
    let prefix = prefix(name);
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).rand_bytes(RANDOM_LEN);
    // The crate's error names the temporary file, and hides what the system said.
    let code = Cell::new(None);
    let open = |path: &Path| new_file(path).inspect_err(|e| code.set(e.raw_os_error()));
    for _ in 0..ATTEMPTS {
        let made = builder.make_in(directory, open);
        let made = made.map_err(|e| code.get().map_or(e, io::Error::from_raw_os_error));
        let (file, temporary) = made?.into_parts();
        // Waits for a sweep that is looking at it. A file system without locks is no reason to stop:
        // there nothing is swept either.
        let locked = file.lock().is_ok();
        if !locked || is_at(&file, &temporary) {
            return Ok((file, temporary));
        }
    }
    Err(io::Error::other("the unfinished file vanishes as soon as it is made"))
}

/// A file of a new name, with the permissions of any new file.
fn new_file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

/// Removes what a killed run left of an output called `name`; their paths are added to `swept`.
pub(super) fn sweep(directory: &Path, name: &str, swept: &mut Vec<PathBuf>) {
    // A lock may not be seen by another machine.
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

/// Whether a file name is that of an unfinished output.
pub fn partial_name(name: &str) -> bool {
    let random = |tail: &str| tail.len() == RANDOM_LEN && tail.bytes().all(|b| b.is_ascii_alphanumeric());
    name.starts_with('.') && name.rsplit_once(".partial-").is_some_and(|(_, tail)| random(tail))
}

/// What the temporary name of an output called `name` begins with: `.NAME.partial-`.
fn prefix(name: &str) -> String {
    let mut keep = name.len().min(NAME_MAX - PARTIAL_EXTRA);
    while !name.is_char_boundary(keep) {
        keep -= 1;
    }
    format!(".{}.partial-", &name[..keep])
}

/// Removes an unfinished file that belongs to no running program.
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

/// Whether `path` is (still) the name of `file`.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: io::Result<std::fs::Metadata>| meta.ok().map(|meta| os::file_identity(&meta));
    let known = id(file.metadata());
    known.is_some() && known == id(std::fs::symlink_metadata(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_swept_and_what_is_in_use_is_not() {
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
    fn makers_and_sweepers_do_not_harm_each_other() {
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
            let makers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..500 {
                            let (file, path) = create(dir.path(), "x").expect("create");
                            assert!(is_at(&file, &path), "swept while it is in use");
                        }
                    })
                })
                .collect();
            let failed = makers.into_iter().any(|maker| maker.join().is_err());
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(!failed);
        });
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
    }
}
