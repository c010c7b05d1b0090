//! System calls that fail, are interrupted, do nothing or take long, between all formats: either the program
//! reports an error, exits with 1 and leaves nothing, or the content is right. strace injects the faults.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, names, require, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

const FORMATS: [&str; 4] = ["raw", "qcow2", "vhdx", "vma"];

/// Runs the program in `directory` with the fault `SYSCALLS:error=E:when=N`, or several separated by blanks,
/// only on `path` if it is given. Also returns the calls that were hit, as strace prints them.
fn with_fault(directory: &Path, fault: &str, path: Option<&Path>, args: &[&str]) -> (Output, Vec<String>) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls: Vec<&str> = fault.split(' ').filter_map(|fault| fault.split(':').next()).collect();
    let output = Command::new("strace")
        .args(["-f", "-o", text(log.path()), "-e", &format!("trace={}", calls.join(","))])
        .args(fault.split(' ').map(|fault| format!("--inject={fault}")))
        .args(path.iter().flat_map(|path| ["-P", text(path)]))
        .arg(PROGRAM)
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap();
    let calls = std::fs::read_to_string(log.path()).unwrap();
    let hit = calls.lines().filter(|line| line.contains("(INJECTED)") || line.contains("(DELAYED)"));
    (output, hit.map(str::to_owned).collect())
}

/// Asserts that a run that was hit fails, prints `words` and changes nothing. Returns true if it was hit.
#[track_caller]
fn fails_cleanly(directory: &Path, fault: &str, args: &[&str], words: &[&str]) -> bool {
    let before = snapshot(directory);
    let (output, hit) = with_fault(directory, fault, None, args);
    let hit = !hit.is_empty();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let what = format!("{fault}: {args:?}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{what}");
    if hit {
        assert_eq!(output.status.code(), Some(1), "{what}");
        for word in words {
            assert!(stderr.contains(word), "no '{word}': {what}");
        }
        assert_eq!(snapshot(directory), before, "{what}");
    } else {
        assert_eq!(output.status.code(), Some(0), "{what}");
    }
    hit
}

/// Writes one disk in every format and returns the paths, raw first.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let raw = directory.join("disk.raw");
    Image::hole("x", 3 << 20).with(70_000, images::noise(1, 1 << 20)).write_raw(&raw);
    let mut all = vec![raw.clone()];
    for format in &FORMATS[1..] {
        let path = directory.join(format!("disk.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&path)]).ok();
        all.push(path);
    }
    all
}

/// A conversion between two formats.
struct Conversion {
    directory: PathBuf,
    source: PathBuf,
    to: &'static str,
    out: String,
}

/// Creates the sources in `directory`, and returns the conversions from each of them to each of `formats`.
fn conversions(directory: &Path, formats: &[&'static str]) -> Vec<Conversion> {
    let sources = sources(directory);
    let each = sources.iter().flat_map(|source| formats.iter().map(move |to| (source.clone(), *to)));
    each.map(|(source, to)| Conversion { directory: directory.into(), source, to, out: format!("out.{to}") })
        .collect()
}

/// Result of a conversion with a fault.
struct Ended {
    code: Option<i32>,
    /// Calls that were hit, as strace prints them.
    hit: Vec<String>,
    /// The fault, the command and the messages of the program, for messages of the test.
    what: String,
}

impl Conversion {
    /// Runs the conversion with a fault, only on `path` if it is given. If it succeeds, the output must be
    /// right; nothing else may be left.
    #[track_caller]
    fn under(&self, fault: &str, path: Option<&Path>) -> Ended {
        let line = ["convert", "--threads", "2", text(&self.source), "--to", self.to, &self.out];
        let (output, hit) = with_fault(&self.directory, fault, path, &line);
        let code = output.status.code();
        let what = format!("{fault}: {line:?}: {hit:?}\n{}", String::from_utf8_lossy(&output.stderr));
        if code == Some(0) {
            imgtool(["compare", "disk.raw", &self.out]).within(&self.directory).ok();
            std::fs::remove_file(self.directory.join(&self.out)).unwrap();
        }
        assert_eq!(names(&self.directory).len(), FORMATS.len(), "{what}");
        Ended { code, hit, what }
    }
}

#[test]
fn failed_reads_and_writes_name_the_file() {
    require!("strace");
    let dir = tempdir();
    let mut hits = 0;
    for conversion in conversions(dir.path(), &FORMATS) {
        let source = Some(&*conversion.source);
        for nth in [1, 2, 5, 8] {
            // All later reads fail as well, like on a broken disk; otherwise a second read of the same range
            // could succeed.
            let reads = format!("pread64,copy_file_range:error=EIO:when={nth}+");
            let writes = ["ENOSPC", "EIO", "EDQUOT"][nth % 3];
            let writes = format!("pwrite64,pwritev:error={writes}:when={nth}");
            for (fault, path, name) in
                [(reads, source, text(&conversion.source)), (writes, None, &conversion.out)]
            {
                let Ended { code, hit, what } = conversion.under(&fault, path);
                assert_eq!(code, Some(i32::from(!hit.is_empty())), "{what}");
                assert!(hit.is_empty() || what.contains(&format!("{name}:")), "names no file: {what}");
                hits += usize::from(!hit.is_empty());
            }
        }
    }
    assert!(hits >= 4 * 4 * 4, "only {hits} faults hit");
}

/// A read of content that fails once is repeated sector by sector: salvage then loses nothing.
#[test]
fn salvage_repeats_a_failed_read_in_small_parts() {
    require!("strace");
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 6 << 20).with(0, images::noise(1, 6 << 20)).write_raw(&raw);
    for (format, flags) in
        [("raw", ""), ("vhdx", ""), ("vhd", ""), ("vdi", ""), ("vmdk", "subformat=monolithicSparse")]
    {
        let source = dir.path().join(format!("source.{format}"));
        let mut line = vec!["convert", "-q", text(&raw), "--to", format, text(&source)];
        line.extend(["-o", flags].into_iter().filter(|_| !flags.is_empty()));
        imgtool(line).ok();
        let mut hits = 0;
        for nth in (4..80).step_by(2) {
            let fault = format!("pread64:error=EIO:when={nth}");
            let line =
                ["convert", "--salvage", "-f", format, text(&source), "--to", "qcow2", "--force", "out"];
            let (output, hit) = with_fault(dir.path(), &fault, Some(&source), &line);
            // Calls of more than 64 KiB read content alone.
            let len = |call: &String| call.rsplit(", ").nth(1).and_then(|len| len.parse::<u64>().ok());
            if hit.is_empty() || hit.iter().any(|call| len(call).is_none_or(|len| len <= 65_536)) {
                continue;
            }
            hits += 1;
            let what = format!("{hit:?}\n{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(output.status.code(), Some(0), "{what}");
            imgtool(["compare", "disk.raw", "out"]).within(dir.path()).ok();
        }
        assert!(hits > 2, "only {hits} faults hit the content of {format}");
    }
}

/// Reads of a VHDX image that may fail: those of its region table, which has two equal copies ([MS-VHDX]
/// 2.2). All other reads are needed, even those of both headers, since either may be the newer one.
const SPARE_READS: [&str; 2] = [", 65536, 196608)", ", 65536, 262144)"];

#[test]
fn single_failed_read_is_an_error_unless_redundant() {
    require!("strace");
    let dir = tempdir();
    let (mut errors, mut spare) = (0, 0);
    for conversion in conversions(dir.path(), &["raw", "vma"]) {
        for nth in 1..100 {
            let fault = format!("pread64,copy_file_range:error=EIO:when={nth}");
            let Ended { code, hit, what } = conversion.under(&fault, Some(&conversion.source));
            let [hit] = hit.as_slice() else {
                assert_eq!(code, Some(0), "{what}");
                break;
            };
            match code {
                Some(1) => {
                    assert!(what.contains(&format!("{}:", text(&conversion.source))), "{what}");
                    errors += 1;
                }
                Some(0) if conversion.source.ends_with("disk.vhdx") => {
                    assert!(SPARE_READS.iter().any(|read| hit.contains(read)), "{what}");
                    spare += 1;
                }
                other => panic!("{other:?}: {what}"),
            }
        }
    }
    eprintln!("{errors} errors, {spare} spare reads");
    assert!(errors >= 4 * 4 && spare == 4, "{errors} errors, {spare} spare reads");
}

#[test]
fn retries_interrupted_calls_and_rejects_empty_transfers() {
    require!("strace");
    let dir = tempdir();
    let mut hits = 0;
    for conversion in conversions(dir.path(), &FORMATS) {
        // Only reads of the source, since the loader of the program reads as well.
        let from = Some(&*conversion.source);
        for (fault, path, code) in [
            ("pread64,copy_file_range:error=EINTR:when=2", from, 0),
            ("pread64,copy_file_range:error=EINTR:when=5", from, 0),
            ("pread64,copy_file_range:delay_enter=20000:when=1+2", from, 0),
            ("pwrite64,pwritev:error=EINTR:when=1", None, 0),
            ("pwrite64,pwritev:delay_enter=20000:when=1+2", None, 0),
            // A read of no bytes is the end of the file; a write of no bytes is an error.
            ("pread64:retval=0:when=2", from, 1),
            ("pwrite64,pwritev:retval=0:when=1", None, 1),
        ] {
            let Ended { code: ended, hit, what } = conversion.under(fault, path);
            assert_eq!(ended, Some(if hit.is_empty() { 0 } else { code }), "{what}");
            hits += hit.len();
        }
    }
    eprintln!("{hits} calls hit");
    assert!(hits >= 4 * 4 * 4, "only {hits} calls hit");
}

#[test]
fn failed_flush_truncate_or_allocation_leaves_no_output() {
    require!("strace");
    let dir = tempdir();
    Image::hole("x", 3 << 20).with(70_000, images::noise(1, 1 << 20)).write_raw(&dir.path().join("disk.raw"));
    for to in FORMATS {
        let out = format!("out.{to}");
        let line = ["convert", "disk.raw", "--to", to, &out];
        for fault in ["fsync:error=EIO:when=1", "fsync:error=EDQUOT:when=1", "fsync:error=EIO:when=2"] {
            // The second flush is of the directory, when the output has its final name.
            assert!(fails_cleanly(dir.path(), fault, &line, &[]), "{to}: {fault}");
        }
        let new_directory = format!("new/{out}/");
        let line = ["convert", "disk.raw", "--to", to, &new_directory];
        assert!(fails_cleanly(dir.path(), "fsync:error=EIO:when=1", &line, &[]), "{to}");
    }
    let preallocated = ["convert", "disk.raw", "--to", "raw", "-o", "preallocation=falloc", "out.raw"];
    assert!(fails_cleanly(dir.path(), "fallocate:error=ENOSPC", &preallocated, &["out.raw"]));
    let line = ["convert", "disk.raw", "--to", "raw", "out.raw"];
    assert!(fails_cleanly(dir.path(), "ftruncate:error=EFBIG", &line, &["out.raw", "File too large"]));
}

#[test]
fn failed_rename_rolls_back_all_outputs() {
    require!("strace");
    let dir = tempdir();
    let source = fixture("two-disks.vma.zst");
    let renames = "rename,renameat,renameat2,link,linkat";
    let line = ["convert", text(&source), "--to", "raw", "out/"];
    let mut hits = 0;
    for nth in 1..=12 {
        let fault = format!("{renames}:error=EIO:when={nth}");
        if !fails_cleanly(dir.path(), &fault, &line, &["can't rename"]) {
            break;
        }
        hits += 1;
    }
    let files = names(&dir.path().join("out"));
    assert_eq!(hits, files.len() + 1, "the directory is tried by one call, each file gets its name by one");
    // After a failed rename, existing files are restored.
    for name in &files {
        std::fs::write(dir.path().join("out").join(name), format!("old {name}")).unwrap();
    }
    let line = ["convert", "--force", text(&source), "--to", "raw", "out/"];
    for nth in 1..=files.len() + 1 {
        let fault = format!("{renames}:error=EIO:when={nth}");
        assert!(fails_cleanly(dir.path(), &fault, &line, &[]), "rename {nth}");
    }
    // If undoing a rename fails, the message lists the file and its old content, which is kept.
    let fault = "renameat2:error=EIO:when=3+ renameat:error=EIO";
    let (output, _) = with_fault(dir.path(), fault, None, &line);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("could not be taken back"), "{stderr}");
    let (_, place) = stderr.split_once("(the old file is ").expect("it names the old file");
    let old = std::fs::read_to_string(place.split(')').next().unwrap()).unwrap();
    assert!(files.iter().any(|name| old == format!("old {name}")), "{old}");
}
