//! Targets and directories that can't be written, vanish, or are wanted by two runs.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, fixture, names, snapshot, tempdir, text};

use super::{sh, with_disk};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

#[test]
fn exactly_one_of_two_concurrent_runs_succeeds() {
    let dir = with_disk();
    // Rate-limited, so that both run at the same time.
    let line = "$IMGTOOL convert -q -r 16M disk.raw new.qcow2 & $IMGTOOL convert -q -r 16M disk.raw new.qcow2; \
                first=$?; wait $!; echo $first $?";
    let run = sh(dir.path(), line);
    let codes = String::from_utf8_lossy(&run.stdout).trim().to_owned();
    // Either run may win, but exactly one does.
    assert!(["0 1", "1 0"].contains(&&*codes), "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).to_lowercase().contains(" exists"), "{run:?}");
    imgtool(["compare", "disk.raw", "new.qcow2"]).within(dir.path()).ok();
    assert_eq!(names(dir.path()), ["disk.raw", "disk.vma", "new.qcow2"]);
}

#[test]
fn directory_removed_during_conversion_is_an_error() {
    let dir = with_disk();
    for out in ["out/new.qcow2", "out/"] {
        let directory = dir.path().join("out");
        std::fs::create_dir(&directory).unwrap();
        let run = imgtool(["convert", "-q", "-r", "16M", "disk.raw", "--to", "qcow2", out]);
        let mut child = run.within(dir.path()).start();
        let began = Instant::now();
        while names(&directory).is_empty() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{out}");
        assert_eq!(names(dir.path()), ["disk.raw", "disk.vma"], "{out}");
    }
}

#[test]
fn writes_or_refuses_every_kind_of_target() {
    let dir = with_disk();
    let path = dir.path();
    std::os::unix::fs::symlink("nowhere", path.join("dangling")).unwrap();
    std::os::unix::fs::symlink("victim", path.join("link")).unwrap();
    std::fs::write(path.join("victim"), b"old").unwrap();
    std::fs::create_dir(path.join("directory")).unwrap();
    let before = names_and_lengths(path);
    let convert = |options: &[&str], to: &str| {
        let all = [&["convert", "-q"], options, &["disk.raw", "--to", "raw", to]].concat();
        imgtool(all).within(path).go()
    };
    convert(&[], "dangling").exits(1).says("leads nowhere");
    convert(&["--force"], "dangling").exits(1).says("leads nowhere");
    convert(&[], "link").exits(1).says("already exists");
    convert(&[], "victim").exits(1).says("already exists");
    convert(&[], "/dev/full").exits(1).says("No space left");
    convert(&[], "disk.raw/new.raw").exits(1);
    assert_eq!(names_and_lengths(path), before);
    // The program follows a link that the user named, and keeps it.
    convert(&["--force"], "link").exits(0);
    assert!(std::fs::symlink_metadata(path.join("link")).unwrap().is_symlink());
    assert_same(&path.join("disk.raw"), &path.join("victim"), "through the link");
    convert(&[], "directory").exits(0);
    assert_same(&path.join("disk.raw"), &path.join("directory/disk.raw"), "into the directory");
    convert(&[], "/dev/null").exits(0);
    let run = sh(path, "mkfifo pipe; cat pipe > got & $IMGTOOL convert -q disk.raw --to raw pipe && wait");
    assert!(run.status.success(), "{run:?}");
    assert_same(&path.join("disk.raw"), &path.join("got"), "through the pipe");
}

/// Returns the names and lengths of all entries, except of links that lead nowhere.
fn names_and_lengths(directory: &Path) -> Vec<(String, u64)> {
    let of = |name: String| std::fs::metadata(directory.join(&name)).ok().map(|meta| (name, meta.len()));
    names(directory).into_iter().filter_map(of).collect()
}

#[test]
fn broken_pipe_is_an_error() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    for format in ["raw", "vma"] {
        let line = format!(
            "set -o pipefail; '{PROGRAM}' convert disk.raw --to {format} - | head -c 1000 > /dev/null"
        );
        let run = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{format}: {stderr}");
        assert!(stderr.contains("Broken pipe"), "{format}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"]);
    }
}

#[test]
fn failure_to_create_the_directory_is_an_error() {
    let dir = tempdir();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("file/out/");
    imgtool(["convert", text(&fixture("two-disks.vma.zst")), "--to", "raw", text(&out)]).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}
