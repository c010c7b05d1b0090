//! Standard output that can't be written: finished outputs count as finished, and an exit code that has a
//! meaning keeps it.

use std::path::Path;

use imgtool_testing::{assert_same, names, require};

use super::{remove, sh, with_disk};
use crate::support::imgtool;

/// Standard outputs that can't be written: full, closed, and open for reading only.
const BAD: [&str; 3] = ["> /dev/full", ">&-", "1< /dev/null"];

/// Runs the program with a redirection and returns the exit code and standard error.
fn run(directory: &Path, args: &str, redirection: &str) -> (Option<i32>, String) {
    let run = sh(directory, &format!("$IMGTOOL {args} {redirection}"));
    let stderr = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{args} {redirection}: {stderr}");
    (run.status.code(), stderr)
}

#[test]
fn unprinted_reports_do_not_fail_finished_outputs() {
    let dir = with_disk();
    let before = names(dir.path());
    for (args, out) in [
        ("convert --output json disk.raw new.raw", "new.raw"),
        ("convert -q --output json disk.vma --to raw new/", "new"),
        ("create --output json -f qcow2 new.qcow2 8M", "new.qcow2"),
        ("create -f qcow2 new.qcow2 8M", "new.qcow2"),
        ("vma create -v new.vma disk=disk.raw", "new.vma"),
    ] {
        for redirection in BAD {
            let (code, stderr) = run(dir.path(), args, redirection);
            assert_eq!(code, Some(0), "{args} {redirection}: {stderr}");
            let is_noted = stderr.contains("the outputs are complete");
            assert_eq!(is_noted, redirection.contains("full") && !args.contains("vma create"), "{stderr}");
            assert_eq!(names(dir.path()).len(), before.len() + 1, "{args} {redirection}");
            if out == "new.raw" {
                assert_same(&dir.path().join("disk.raw"), &dir.path().join(out), redirection);
            }
            remove(&dir.path().join(out));
        }
    }
}

#[test]
fn extraction_fails_before_its_work_or_succeeds() {
    let dir = with_disk();
    let before = names(dir.path());
    // The announcement comes before the first byte is written.
    let (code, stderr) = run(dir.path(), "vma extract disk.vma new", "> /dev/full");
    assert_eq!(code, Some(1), "{stderr}");
    assert_eq!(names(dir.path()), before);
    let extracted = dir.path().join("new/disk-disk.raw");
    // The reader takes the announcement and leaves.
    let (code, stderr) = run(dir.path(), "vma extract -v disk.vma new", "| head -n 1; exit ${PIPESTATUS[0]}");
    match code {
        Some(0) => {
            assert_same(&dir.path().join("disk.raw"), &extracted, "with a reader that leaves");
            remove(&dir.path().join("new"));
        }
        // As the reference program, it dies of SIGPIPE if it has more to say; Proxmox relies on that.
        killed => assert!(killed == Some(141) && !extracted.exists(), "{killed:?} {stderr}"),
    }
    require!("strace");
    // The file that receives standard output is full after the announcement.
    let line = "strace -f -o /dev/null -P said --inject=write:error=ENOSPC:when=2+ \
                $IMGTOOL vma extract -v disk.vma new > said";
    let run = sh(dir.path(), line);
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("vma: note: can't write to standard output"), "{stderr}");
    assert_same(&dir.path().join("disk.raw"), &extracted, "with a full file");
}

#[test]
fn unprinted_results_keep_the_meaning_of_exit_codes() {
    let dir = with_disk();
    imgtool(["convert", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    imgtool(["create", "-f", "raw", "other.raw", "8M"]).within(dir.path()).ok();
    for (args, printed, unprinted) in [
        ("compare disk.raw disk.vma", 0, 2),
        ("compare --output json disk.raw disk.vma", 0, 2),
        ("compare disk.raw other.raw", 1, 2),
        ("compare -q disk.raw other.raw", 1, 1),
        ("compare -q disk.raw disk.vma", 0, 0),
        ("compare disk.raw missing.raw", 2, 2),
        ("check disk.qcow2", 0, 1),
        ("check --output json disk.qcow2", 0, 1),
        ("check -q disk.qcow2", 0, 0),
        ("check -r some disk.qcow2", 1, 1),
        ("check --no-such-flag disk.qcow2", 1, 1),
        ("check", 1, 1),
        ("checksum disk.raw", 0, 1),
        ("info disk.raw", 0, 1),
        ("map disk.raw", 0, 1),
        ("measure --size 8M", 0, 1),
        ("vma verify -v disk.vma", 0, 1),
    ] {
        for (redirection, code) in [
            ("> /dev/null", printed),
            ("> /dev/full", unprinted),
            // A reader that has seen enough is no failure. A closed standard output becomes /dev/null.
            ("| true; exit ${PIPESTATUS[0]}", printed),
            (">&-", printed),
        ] {
            let (ended, stderr) = run(dir.path(), args, redirection);
            // As the reference program, `vma` may die of SIGPIPE.
            let killed = args.starts_with("vma") && redirection.starts_with('|') && ended == Some(141);
            assert!(killed || ended == Some(code), "{args} {redirection}: {ended:?} {stderr}");
        }
    }
}
