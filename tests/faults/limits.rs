//! Too little memory or space, or a limit on file sizes: an error, and no unfinished output.

use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, names, oracles, require, sha256_file, tempdir, text};

use crate::support::devices;
use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Returns the first lines of all panics except those of the standard library when it can't allocate the
/// signal stack of a new thread, which happens before any of our code runs.
fn our_panics(stderr: &str) -> Vec<&str> {
    let lines: Vec<&str> = stderr.lines().collect();
    let panics = lines.iter().enumerate().filter(|(_, line)| line.contains("panicked"));
    let ours = panics.filter(|(number, line)| {
        let message = lines.get(number + 1).copied().unwrap_or_default();
        !(line.contains("library/std/src/sys/")
            && message.starts_with("failed to allocate an alternative stack"))
    });
    ours.map(|(_, line)| *line).collect()
}

#[test]
fn panic_filter_ignores_only_the_std_stack_panic() {
    let theirs = "\nthread '<unnamed>' (7) panicked at library/std/src/sys/pal/unix/stack_overflow.rs:1:2:\n\
                  failed to allocate an alternative stack: Cannot allocate memory (os error 12)\n";
    let ours = "\nthread 'main' panicked at src/main.rs:1:2:\nfailed to allocate an alternative stack\n";
    assert_eq!(our_panics(theirs), [""; 0]);
    assert_eq!(
        our_panics(&format!("{theirs}{ours}{theirs}")),
        ["thread 'main' panicked at src/main.rs:1:2:"]
    );
}

#[test]
fn low_memory_never_leaves_an_unfinished_output() {
    require!("prlimit");
    let dir = tempdir();
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&dir.path().join("disk.raw"));
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let out = format!("out.{format}");
        let within = |mib: u64| {
            let limit = format!("--as={}", mib << 20);
            let line = ["convert", "--force", "--threads", "8", "disk.raw", "--to", format, &out];
            Command::new("prlimit")
                .arg(limit)
                .arg(PROGRAM)
                .args(line)
                .env("SOURCE_DATE_EPOCH", "1790000000")
                // When memory is short, the standard library runs out of it while taking a backtrace, and
                // deadlocks.
                .env("RUST_BACKTRACE", "0")
                .current_dir(dir.path())
                .output()
                .unwrap()
        };
        let run = within(1024);
        assert!(run.status.success(), "{format} in 1 GiB: {run:?}");
        let wanted = sha256_file(&dir.path().join(&out));
        std::fs::remove_file(dir.path().join(&out)).unwrap();
        let mut refused = 0;
        for mib in [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512] {
            let run = within(mib);
            refused += u32::from(!run.status.success());
            let stderr = String::from_utf8_lossy(&run.stderr);
            assert!(our_panics(&stderr).is_empty(), "{format} in {mib} MiB: {stderr}");
            match std::fs::remove_file(dir.path().join(&out)) {
                Ok(()) => assert!(run.status.success(), "{format} in {mib} MiB: {stderr}"),
                Err(_) => assert!(!run.status.success(), "{format} in {mib} MiB: {stderr}"),
            }
        }
        assert!(refused > 0, "{format}: no limit was too low");
        imgtool(["convert", "disk.raw", "--to", format, &out]).within(dir.path()).ok();
        assert_eq!(sha256_file(&dir.path().join(&out)), wanted);
        std::fs::remove_file(dir.path().join(&out)).unwrap();
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

/// Runs a shell line in a file system of 8 MiB at `small`. `None` if this user may not mount one.
fn in_a_small_file_system(directory: &Path, line: &str) -> Option<std::process::Output> {
    std::fs::create_dir_all(directory.join("small")).unwrap();
    let script = format!("mount -t tmpfs -o size=8m none small || exit 99; cd small || exit 99; {line}");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "bash", "-c", &script])
        .env("IMGTOOL", PROGRAM)
        .current_dir(directory)
        .output()
        .ok()?;
    let refused =
        output.status.code() == Some(99) || String::from_utf8_lossy(&output.stderr).contains("unshare");
    if refused {
        let why = format!("this user may not mount a file system: {output:?}");
        oracles::unable(&why, devices::may_administer());
    }
    (!refused).then_some(output)
}

#[test]
fn full_file_system_leaves_no_output() {
    let dir = tempdir();
    Image::hole("x", 24 << 20).with(0, images::noise(1, 24 << 20)).write_raw(&dir.path().join("disk.raw"));
    Image::hole("x", 24 << 20).with(0, images::noise(1, 3 << 20)).write_raw(&dir.path().join("small.raw"));
    std::fs::write(dir.path().join("zeros.raw"), vec![0; 24 << 20]).unwrap();
    let source = fixture("two-disks.vma.zst");
    for format in ["raw", "qcow2", "vhdx", "vma", "vmdk -o subformat=vmfs"] {
        // The program knows before the first byte, and says how much space there is.
        let line = format!("$IMGTOOL convert ../disk.raw --to {format} out; code=$?; ls -A; exit $code");
        let Some(run) = in_a_small_file_system(dir.path(), &line) else { return };
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b""[..]), "{format}: {stderr}");
        assert!(stderr.contains("not enough space") && stderr.contains("8388608"), "{format}: {stderr}");
        // The program finds out during the copy: from a pipe, or with --force.
        for how in [
            format!("$IMGTOOL convert --force ../disk.raw --to {format} out"),
            format!("cat ../disk.raw | $IMGTOOL convert --force - --to {format} new/out"),
            format!("$IMGTOOL convert --force ../disk.raw --to {format} dir/"),
        ] {
            let line = format!("mkdir new; {how}; code=$?; rmdir new; ls -A; exit $code");
            let run = in_a_small_file_system(dir.path(), &line).unwrap();
            let stderr = String::from_utf8_lossy(&run.stderr);
            assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b""[..]), "{how}: {stderr}");
            assert!(stderr.contains("No space left on device"), "{how}: {stderr}");
        }
        // A disk that fits is not refused, however large it looks.
        for fits in ["zeros.raw", "small.raw"] {
            let line = format!("$IMGTOOL convert ../{fits} --to {format} out && ls -A");
            let run = in_a_small_file_system(dir.path(), &line).unwrap();
            assert!(run.stdout.starts_with(b"out"), "{fits} to {format}: {run:?}");
        }
    }
    let line = format!(
        "head -c 7M /dev/zero > ballast; $IMGTOOL convert '{}' --to raw out; code=$?; ls -A; exit $code",
        text(&source)
    );
    let run = in_a_small_file_system(dir.path(), &line).unwrap();
    assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b"ballast\n"[..]), "{run:?}");
}

#[test]
fn file_size_limit_leaves_no_output() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma", "vmdk -o subformat=vmfs"] {
        // No file may grow beyond 2 MiB.
        let name = format.split(' ').next().unwrap();
        let command = format!("ulimit -f 2048; exec '{PROGRAM}' convert disk.raw --to {format} out.{name}");
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{format}: {stderr}");
        assert!(stderr.contains("out"), "{format}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

#[test]
fn full_standard_output_is_an_error() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&raw);
    for format in ["raw", "vma"] {
        let command = format!("exec '{PROGRAM}' convert disk.raw --to {format} - > /dev/full");
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        assert_eq!(run.status.code(), Some(1), "{format}: {}", String::from_utf8_lossy(&run.stderr));
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}
