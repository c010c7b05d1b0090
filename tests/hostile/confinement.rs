//! Confinement of the program by the kernel: it is in force before an image is read.

use std::path::Path;
use std::process::Command;

use imgtool_testing::{oracles, require, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Runs the program in `directory` and returns its system calls that concern confinement, files and threads.
fn trace(directory: &Path, args: &[&str]) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls = "trace=seccomp,landlock_restrict_self,openat,clone,clone3,rename,renameat2,execve";
    let run = Command::new("strace")
        .args(["-f", "-o", text(log.path()), "-e", calls, PROGRAM])
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    std::fs::read_to_string(log.path()).unwrap().lines().map(str::to_owned).collect()
}

/// Returns the positions of the calls that contain `what`.
fn positions(calls: &[String], what: &str) -> Vec<usize> {
    let has = |call: &String| call.contains(what);
    calls.iter().enumerate().filter(|(_, call)| has(call)).map(|(position, _)| position).collect()
}

/// True if the kernel enforces everything. Otherwise reports the test as skipped.
fn kernel_confines() -> bool {
    let version = imgtool(["--version"]).ok().text();
    let all = version.contains("Landlock") && version.contains("seccomp");
    if !all {
        oracles::unable(&format!("this kernel does not confine programs: {version}"), false);
    }
    all
}

fn with_disk() -> tempfile::TempDir {
    let dir = tempdir();
    std::fs::write(dir.path().join("disk.raw"), vec![7; 1 << 20]).unwrap();
    dir
}

#[test]
fn is_confined_before_it_opens_a_source() {
    require!("strace");
    if !kernel_confines() {
        return;
    }
    for args in [
        &["convert", "disk.raw", "disk.qcow2"] as &[&str],
        &["convert", "disk.raw", "--to", "vma", "new/"],
        &["info", "disk.raw"],
        &["map", "disk.raw"],
        &["measure", "disk.raw"],
        &["checksum", "disk.raw"],
        &["compare", "disk.raw", "disk.raw"],
        &["vma", "create", "a.vma", "disk.raw"],
    ] {
        let dir = with_disk();
        let calls = trace(dir.path(), args);
        let source = positions(&calls, "\"disk.raw\", O_RDONLY|O_CLOEXEC")[0];
        let confined = ["seccomp(SECCOMP_SET_MODE_FILTER", "landlock_restrict_self("]
            .map(|call| positions(&calls, call).first().copied().unwrap_or(usize::MAX));
        assert!(confined.iter().all(|position| *position < source), "{args:?}: {calls:#?}");
        // The thread that serves signals is confined, too.
        let threads = positions(&calls, "clone");
        assert!(threads.iter().all(|thread| confined[1] < *thread), "{args:?}: {calls:#?}");
    }
}

#[test]
fn is_confined_further_before_it_copies() {
    require!("strace");
    if !kernel_confines() {
        return;
    }
    let dir = with_disk();
    let calls = trace(dir.path(), &["convert", "-m", "2", "disk.raw", "disk.qcow2"]);
    let confined = positions(&calls, "landlock_restrict_self(");
    assert_eq!(confined.len(), 2, "{calls:#?}");
    let created = positions(&calls, ".disk.qcow2.partial-")[0];
    let workers = positions(&calls, "clone").into_iter().filter(|position| *position > created);
    let workers: Vec<usize> = workers.collect();
    assert!(!workers.is_empty() && created < confined[1] && confined[1] < workers[0], "{calls:#?}");
}

#[test]
fn commands_that_read_an_archive_are_free() {
    require!("strace");
    let dir = with_disk();
    let calls = trace(dir.path(), &["vma", "create", "exec:mkdir new && cat > new/a.vma", "disk.raw"]);
    assert!(positions(&calls, "SECCOMP_SET_MODE_FILTER").is_empty(), "{calls:#?}");
    assert!(positions(&calls, "landlock_restrict_self(").is_empty(), "{calls:#?}");
    imgtool(["check", "new/a.vma"]).within(dir.path()).ok();
}

#[test]
fn version_names_the_confinement() {
    let long = imgtool(["--version"]).ok().text();
    assert_eq!(long.lines().count(), 2, "{long}");
    assert!(long.lines().nth(1).unwrap().starts_with("confinement: "), "{long}");
    assert_eq!(imgtool(["-V"]).ok().text().lines().count(), 1);
}
