//! Errors, signals and limits of every kind: a final name is always a finished output.

use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

mod changing_sources;
mod commands;
mod damaged_archives;
mod damaged_frames;
mod interrupted;
mod limits;
mod misnamed;
mod moved_directories;
mod odd_file_systems;
mod shaky_file_system;
mod standard_output;
mod stream_sizes;
mod system_calls;
mod targets;
mod verification;
mod wrong_lengths;

/// Returns the sorted paths of all unfinished outputs below a directory.
fn partials(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = vec![directory.to_owned()];
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else if text(&path).contains(".partial-") {
                found.push(text(&path).to_owned());
            }
        }
    }
    found.sort_unstable();
    found
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for the program to end, for at most 20 seconds.
fn ends(mut child: Child, what: &str) -> std::process::ExitStatus {
    // Standard input stays open: the program must not wait for more of it.
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

/// Creates a directory with a disk of 8 MiB, `disk.raw`, and an archive of it, `disk.vma`.
fn with_disk() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&dir.path().join("disk.raw"));
    imgtool(["convert", "disk.raw", "--to", "vma", "disk.vma"]).within(dir.path()).ok();
    dir
}

fn sh(directory: &Path, line: &str) -> Output {
    // Signals have their default effect, even if the tests run under nohup or in the background.
    let mut command = Command::new("env");
    command
        .args(["--default-signal=HUP,INT", "bash", "-c", line])
        .env("IMGTOOL", PROGRAM)
        .env("SOURCE_DATE_EPOCH", "1790000000");
    command.current_dir(directory).output().unwrap()
}

fn remove(path: &Path) {
    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
}
