//! `imgtool vma` when the reader of its output is gone: it dies of SIGPIPE, as the vma program does.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use imgtool_testing::images::noise;
use imgtool_testing::{names, oracles, text};

use super::scene;
use crate::support::run::PROGRAM;

const SIGPIPE: i32 = 13;

/// Returns the writing end of a pipe without a reader.
fn closed_pipe() -> std::io::PipeWriter {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer
}

/// Runs `vma …` with standard output, or standard error, in a pipe without a reader. Returns the signal.
fn signal(directory: &Path, line: &str, is_error: bool) -> Option<i32> {
    let mut command = Command::new(PROGRAM);
    command.arg("vma").args(line.split(' ')).current_dir(directory).stdin(Stdio::null());
    let command = if is_error {
        command.stdout(Stdio::null()).stderr(closed_pipe())
    } else {
        command.stdout(closed_pipe()).stderr(Stdio::null())
    };
    command.status().unwrap().signal()
}

#[test]
fn dies_of_sigpipe_at_the_next_output_and_leaves_nothing() {
    let dir = scene();
    for line in ["extract -v a.vma d", "extract a.vma d", "list a.vma", "config a.vma", "verify -v a.vma"] {
        assert_eq!(signal(dir.path(), line, false), Some(SIGPIPE), "{line}");
        assert_eq!(names(dir.path()), ["a.vma", "d.raw"], "{line}");
    }
    assert_eq!(signal(dir.path(), "verify a.vma", false), None);
    assert_eq!(signal(dir.path(), "create -v x.vma d.raw", true), Some(SIGPIPE));
    assert_eq!(names(dir.path()), ["a.vma", "d.raw"]);
}

#[test]
fn create_dies_of_sigpipe_if_the_reader_of_the_archive_leaves() {
    let dir = scene();
    std::fs::write(dir.path().join("d.raw"), noise(4, 3 << 20)).unwrap();
    assert_eq!(signal(dir.path(), "create /dev/stdout d.raw", false), Some(SIGPIPE));
    oracles::run("mkfifo", &[text(&dir.path().join("fifo"))]);
    let mut reader = Command::new("head")
        .args(["-c", "100", "fifo"])
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = Command::new(PROGRAM)
        .args(["vma", "create", "fifo", "d.raw"])
        .current_dir(dir.path())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    reader.wait().unwrap();
    assert_eq!(status.signal(), Some(SIGPIPE));
    assert_eq!(names(dir.path()), ["a.vma", "d.raw", "fifo"]);
}

#[test]
fn command_does_not_take_a_part_of_an_archive_for_a_whole_one() {
    let dir = scene();
    let line = ["vma", "create", "-v", "exec:cat > x && mv x done", "d.raw"];
    let status =
        Command::new(PROGRAM).args(line).current_dir(dir.path()).stderr(closed_pipe()).status().unwrap();
    assert_eq!(status.signal(), Some(SIGPIPE));
    assert!(!dir.path().join("done").exists());
}
