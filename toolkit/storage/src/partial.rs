//! Unfinished outputs: names, creation, and removal of the files left by a killed run.
//!
//! An unfinished file is called `.NAME.partial-XXXXXXXXXXXX`. The last eight of the twelve characters are a
//! check value of everything before them, so that a file of the user with a similar name is not taken for an
//! unfinished output. The name is the proof because every file system keeps it; many have no extended
//! attributes.
//!
//! The process that creates an unfinished file locks it (flock) until it closes the file or ends. An unlocked
//! file with a partial name has no owner any more. A sweep between creating and locking may remove the file;
//! the creator notices that and creates another.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use twox_hash::XxHash64;

use crate::folder::{Entry, Folder};
use crate::os;

/// Maximum length of a file name on Linux, in bytes (NAME_MAX).
const NAME_MAX: usize = 255;
/// Number of random characters at the end of a partial name.
const RANDOM_LEN: usize = 4;
/// Number of characters of the check value behind them. Our choice: one of 2^47 names has the right ones by
/// accident.
const CHECK_LEN: usize = 8;
/// Number of bytes that a partial name adds to the name of the output.
const PARTIAL_EXTRA: usize = ".".len() + MARK.len() + RANDOM_LEN + CHECK_LEN;
/// Text between the name of the output and the random characters.
const MARK: &str = ".partial-";
/// Maximum number of attempts to create a file. An attempt fails if a sweep removes the file before the
/// creator has locked it. Our limit: even one failure is rare, unless several programs sweep all the time on a busy
/// machine.
const MAX_ATTEMPTS: u32 = 256;

/// Creates and locks the unfinished file of the output `name`.
pub(super) fn create(folder: &Arc<Folder>, name: &str) -> io::Result<(File, Entry)> {
    for _ in 0..MAX_ATTEMPTS {
        let temporary = new_name(name);
        let file = match folder.handle.create_file(&temporary) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?,
        };
        let entry = match file.metadata() {
            Ok(meta) => Entry { folder: folder.clone(), name: temporary, id: os::file_identity(&meta) },
            Err(e) => {
                // The file was created just now, so it is ours.
                let _ = folder.handle.remove_file(&temporary);
                return Err(e);
            }
        };
        // Waits for a sweep that holds the lock. On a file system without locks, no sweep removes the file.
        let locked = file.lock().is_ok();
        if !locked || entry.is_there() {
            return Ok((file, entry));
        }
    }
    Err(io::Error::other("another process keeps removing the unfinished file"))
}

/// Removes the unfinished files of the output `name` left by a killed run, and adds their paths to `swept`.
pub(super) fn sweep(folder: &Arc<Folder>, name: &str, swept: &mut Vec<PathBuf>) {
    // A process on another machine may hold a lock that we can't see.
    if os::is_remote(&folder.path) {
        return;
    }
    let prefix = prefix(name);
    let Ok(names) = folder.handle.names() else { return };
    for name in names {
        if is_partial(&name, &prefix) && remove_abandoned(folder, &name) {
            swept.push(folder.path.join(name));
        }
    }
}

/// Returns a new name for the unfinished file of the output `name`.
pub(super) fn new_name(name: &str) -> OsString {
    // The standard library seeds its hash tables with random numbers of the system.
    let random = RandomState::new().hash_one(std::process::id());
    let start = prefix(name) + &characters(random, RANDOM_LEN);
    let check = check(&start);
    OsString::from(start + &check)
}

/// True if `name` is the name of an unfinished file with this prefix.
fn is_partial(name: &OsStr, prefix: &str) -> bool {
    let Some(name) = name.to_str() else { return false };
    let Some(tail) = name.strip_prefix(prefix) else { return false };
    tail.len() == RANDOM_LEN + CHECK_LEN
        && name.split_at_checked(name.len() - CHECK_LEN).is_some_and(|(start, end)| check(start) == end)
}

/// Returns the check value of the start of a partial name.
fn check(start: &str) -> String {
    /// Seed, so that no other program has the same values: "imgtool" as a number.
    const SEED: u64 = 0x69_6d67_746f_6f6c;
    characters(XxHash64::oneshot(SEED, start.as_bytes()), CHECK_LEN)
}

/// Writes the lowest digits of a number to the base 62 as letters and digits.
fn characters(mut number: u64, len: usize) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut digit = || {
        let digit = DIGITS[(number % 62) as usize];
        number /= 62;
        char::from(digit)
    };
    (0..len).map(|_| digit()).collect()
}

/// Returns the start of the temporary name of the output `name`: `.NAME.partial-`, with NAME cut to fit
/// NAME_MAX.
fn prefix(name: &str) -> String {
    let mut keep = name.len().min(NAME_MAX - PARTIAL_EXTRA);
    while !name.is_char_boundary(keep) {
        keep -= 1;
    }
    format!(".{}{MARK}", &name[..keep])
}

/// Removes an unfinished file if no running program has locked it. Returns true if the file was removed.
fn remove_abandoned(folder: &Arc<Folder>, name: &OsStr) -> bool {
    if !folder.handle.look_up(name).is_ok_and(|found| found.is_regular) {
        return false;
    }
    let Ok(file) = folder.handle.open_file(name) else { return false };
    match file.try_lock() {
        Ok(()) => file.metadata().is_ok_and(|meta| {
            let id = os::file_identity(&meta);
            folder.handle.holds(name, id) && folder.handle.remove_file(name).is_ok()
        }),
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_removes_only_orphaned_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = Folder::open(dir.path()).expect("open");
        let (abandoned, _) = create(&folder, "x.raw").expect("create");
        let (in_use, _) = create(&folder, "x.raw").expect("create");
        drop(create(&folder, "y.raw").expect("create"));
        std::fs::create_dir(dir.path().join(new_name("x.raw"))).expect("mkdir");
        drop(abandoned);
        let mut swept = Vec::new();
        sweep(&folder, "x.raw", &mut swept);
        assert_eq!(swept.len(), 1);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 3);
        drop(in_use);
        sweep(&folder, "x.raw", &mut swept);
        assert_eq!(swept.len(), 2);
    }

    #[test]
    fn sweep_keeps_files_with_similar_names() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = Folder::open(dir.path()).expect("open");
        let ours = new_name("x.raw").into_string().expect("text");
        let changed = format!("{}{}", &ours[..ours.len() - 1], if ours.ends_with('0') { "1" } else { "0" });
        let names = [
            // A suffix of six letters was once enough.
            ".x.raw.partial-backup",
            ".x.raw.partial-abcdefghijkl",
            ".x.raw.partial-of-yesterday",
            ".x.raw.partial-",
            ".x.raw.partial-ä23456789012",
            &changed,
            &ours[1..],
            &format!("{ours}0"),
            &ours.replace(".x.", ".y."),
        ];
        for name in names {
            std::fs::write(dir.path().join(name), b"precious").expect("write");
        }
        let mut swept = Vec::new();
        sweep(&folder, "x.raw", &mut swept);
        assert_eq!(swept, Vec::<PathBuf>::new());
        std::fs::write(dir.path().join(&ours), b"left by a killed run").expect("write");
        sweep(&folder, "x.raw", &mut swept);
        assert_eq!(swept, [folder.path.join(&ours)]);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), names.len());
    }

    #[test]
    fn creation_survives_concurrent_sweeps() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = Folder::open(dir.path()).expect("open");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    sweep(&folder, "x", &mut Vec::new());
                }
            };
            scope.spawn(sweeper);
            scope.spawn(sweeper);
            let creators: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..500 {
                            let (_file, entry) = create(&folder, "x").expect("create");
                            assert!(entry.is_there(), "swept while in use");
                            assert!(entry.remove_file());
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
