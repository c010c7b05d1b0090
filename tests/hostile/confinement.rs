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
fn commands_without_outputs_are_confined_further_when_all_is_open() {
    require!("strace");
    if !kernel_confines() {
        return;
    }
    for args in [
        &["map", "disk.raw"] as &[&str],
        &["measure", "disk.raw"],
        &["compare", "disk.raw", "disk.raw"],
        &["compare", "--strict", "disk.raw", "disk.raw"],
    ] {
        let dir = with_disk();
        let calls = trace(dir.path(), args);
        let confined = positions(&calls, "landlock_restrict_self(");
        let source = positions(&calls, "\"disk.raw\", O_RDONLY|O_CLOEXEC");
        assert_eq!(confined.len(), 2, "{args:?}: {calls:#?}");
        assert!(source.iter().all(|position| *position < confined[1]), "{args:?}: {calls:#?}");
    }
}

/// Creates an overlay `base.qcow2` of `mid.qcow2` in the directory `other`, and a link to it in `here`.
fn with_linked_base() -> tempfile::TempDir {
    let dir = with_disk();
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::create_dir(dir.path().join("here")).unwrap();
    imgtool(["create", "-f", "qcow2", "mid.qcow2", "2M"]).within(&other).ok();
    let line = ["create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "base.qcow2"];
    imgtool(line).within(&other).ok();
    std::os::unix::fs::symlink("../other/base.qcow2", dir.path().join("here/link.qcow2")).unwrap();
    dir
}

/// `chain` allows the directory of the file, not that of a link to it.
#[test]
fn verifies_an_overlay_whose_base_is_named_by_a_link() {
    let dir = with_linked_base();
    for base in ["link.qcow2", "../other/base.qcow2"] {
        let line =
            ["convert", "--verify", "--allow-external", "chain", "-O", "qcow2", "-F", "qcow2", "-B", base];
        imgtool([&line[..], &["../disk.raw", "out.qcow2"]].concat()).within(&dir.path().join("here")).ok();
        std::fs::remove_file(dir.path().join("here/out.qcow2")).unwrap();
    }
}

/// Another program puts another file in the place of the base after the confinement.
#[test]
fn a_refusal_by_the_confinement_says_so() {
    require!("strace");
    if !kernel_confines() {
        return;
    }
    let dir = with_linked_base();
    std::fs::copy(dir.path().join("other/mid.qcow2"), dir.path().join("new")).unwrap();
    let call = "landlock_restrict_self";
    let line = format!(
        "strace -f -o log -e trace={call} -e inject={call}:signal=SIGSTOP:when=2 {PROGRAM} convert --verify \
         --allow-external chain -O qcow2 -F qcow2 -B other/base.qcow2 disk.raw out.qcow2 & \
         until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do sleep 0.01; done; \
         mkdir elsewhere; mv new elsewhere; ln -sf ../elsewhere/new other/base.qcow2; \
         child=$(cat /proc/$!/task/$!/children); \
         while kill -CONT $child 2>/dev/null; do sleep 0.01; done; wait $!"
    );
    let run = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{said}");
    let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("ermission denied") && words.contains("confined itself"), "{said}");
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
