//! Directories that are moved, replaced or removed while a conversion writes into them: the run fails, and
//! neither the old place nor the new one keeps an unfinished file.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use imgtool_testing::{names, tempdir};

use super::{ends, kill, partials, with_disk};
use crate::support::imgtool;

/// Starts a conversion of several seconds, and waits until it has begun its output.
fn begin(directory: &Path, out: &str) -> Child {
    let line = ["convert", "-q", "-r", "4M", "disk.raw", "--to", "qcow2", out];
    let child = imgtool(line).within(directory).start();
    let began = Instant::now();
    while partials(directory).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "no output was begun");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

#[test]
fn moved_directory_keeps_no_partial_file() {
    for (out, is_replaced, signal) in [
        ("there/x.qcow2", false, None),
        ("there/x.qcow2", true, None),
        ("there/", true, None),
        ("there/new/", true, None),
        ("there/x.qcow2", false, Some("-TERM")),
        ("there/new/", true, Some("-INT")),
    ] {
        let dir = with_disk();
        let (there, moved) = (dir.path().join("there"), dir.path().join("moved"));
        std::fs::create_dir(&there).unwrap();
        let child = begin(dir.path(), out);
        std::fs::rename(&there, &moved).unwrap();
        if is_replaced {
            std::fs::create_dir_all(there.join("new")).unwrap();
        }
        if let Some(signal) = signal {
            kill(&child, signal);
        }
        let what = format!("{out}, {is_replaced}, {signal:?}");
        let status = ends(child, &what);
        assert_eq!(status.signal().is_some(), signal.is_some(), "{what}: {status}");
        assert!(!status.success(), "{what}");
        assert!(names(&moved).is_empty(), "{what}: {:?}", names(&moved));
        assert_eq!(partials(dir.path()), Vec::<String>::new(), "{what}");
        // The directory of the other program stays.
        assert_eq!(there.join("new").exists(), is_replaced, "{what}");
    }
}

#[test]
fn moved_new_directory_is_left_empty() {
    let dir = with_disk();
    let child = begin(dir.path(), "new/");
    std::fs::rename(dir.path().join("new"), dir.path().join("moved")).unwrap();
    assert_eq!(ends(child, "moved").code(), Some(1));
    assert!(names(&dir.path().join("moved")).is_empty());
    assert!(!dir.path().join("new").exists());
}

#[test]
fn error_names_the_move() {
    let dir = with_disk();
    let other = tempdir();
    std::fs::create_dir(dir.path().join("there")).unwrap();
    let mover = {
        let (from, to) = (dir.path().join("there"), other.path().join("moved"));
        std::thread::spawn(move || {
            while partials(&from).is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::fs::rename(&from, &to).unwrap();
        })
    };
    let line = ["convert", "-r", "4M", "disk.raw", "there/x.qcow2"];
    imgtool(line).within(dir.path()).go().ends_with(1).says("the directory was moved or removed");
    mover.join().unwrap();
}

#[test]
fn keeps_user_files_with_partial_names() {
    let dir = with_disk();
    for name in [".new.raw.partial-backup", ".new.raw.partial-abcdefghijkl"] {
        std::fs::write(dir.path().join(name), b"precious").unwrap();
    }
    let run = imgtool(["convert", "disk.raw", "new.raw"]).within(dir.path()).ok();
    assert!(!run.stderr.contains("killed run"), "{}", run.stderr);
    let left = names(dir.path());
    assert_eq!(left.iter().filter(|name| name.contains(".partial-")).count(), 2, "{left:?}");
}
