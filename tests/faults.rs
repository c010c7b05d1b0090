//! Whatever goes wrong: a final name is always a finished output.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::support::images::{self, Image};
use crate::support::run::PROGRAM;
use crate::support::{fixture, imgtool, names, snapshot, tempdir, text};

/// The unfinished outputs in a directory and those below it.
fn partials(directory: &Path) -> Vec<String> {
    snapshot(directory).into_keys().filter(|name| name.contains(".partial-")).collect()
}

/// A conversion of a piped archive that waits for the rest of it, its output begun.
fn stalled(out: &Path) -> Child {
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let mut child = imgtool(["convert", "-", "--to", "qcow2", text(out)]).start();
    child.stdin.as_mut().unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap();
    let began = Instant::now();
    while partials(out.parent().unwrap()).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "no output was begun");
        assert!(child.try_wait().unwrap().is_none(), "the program did not wait for its input");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for the end, but not forever.
fn ends(mut child: Child, what: &str) -> std::process::ExitStatus {
    // Its input stays open: the program must not wait for more of it.
    let stdin = child.stdin.take();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{what}: the program went on");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop(stdin);
    status
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        for out in ["out.qcow2", "new/"] {
            let dir = tempdir();
            let child = stalled(&dir.path().join(out));
            kill(&child, signal);
            assert!(!ends(child, signal).success(), "{signal}");
            assert!(names(dir.path()).is_empty(), "{signal}: {:?}", names(dir.path()));
        }
    }
}

#[test]
fn a_kill_leaves_only_the_temporary_name() {
    let dir = tempdir();
    let child = stalled(&dir.path().join("out.qcow2"));
    kill(&child, "-KILL");
    assert!(!ends(child, "SIGKILL").success());
    let left = names(dir.path());
    assert!(left.iter().all(|name| name.starts_with(".out.qcow2.partial-")), "{left:?}");
}

#[test]
fn a_failed_source_takes_the_whole_archive_with_it() {
    let dir = tempdir();
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let (whole, cut) = (dir.path().join("whole.raw"), dir.path().join("cut.vma"));
    Image::hole("w", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&whole);
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("out.vma");
    imgtool(["convert", text(&whole), text(&cut), "--to", "vma", text(&out)]).go().exits(1).says("cut.vma");
    let from_pipe = imgtool(["convert", text(&whole), "-", "--to", "vma", text(&out)]);
    from_pipe.pipe_from(&cut).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        // No file may grow beyond 2 MiB; with the signal ignored a write fails instead.
        let command = format!(
            "trap '' XFSZ; ulimit -f 2048; exec '{PROGRAM}' convert disk.raw --to {format} out.{format}"
        );
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{format}: {stderr}");
        assert!(stderr.contains(&format!("out.{format}")), "{format}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

#[test]
fn standard_output_that_is_full_is_an_error() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&raw);
    for format in ["raw", "vma"] {
        let command = format!("exec '{PROGRAM}' convert disk.raw --to {format} - > /dev/full");
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        assert_eq!(run.status.code(), Some(1), "{format}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let dir = tempdir();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("file/out/");
    imgtool(["convert", text(&fixture("two-disks.vma.zst")), "--to", "raw", text(&out)]).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}
