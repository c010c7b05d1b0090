//! Sources that fail, are truncated or change while the program reads them.

use std::path::Path;
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, names, oracles, require, snapshot, tempdir, text};

use super::{ends, partials, remove, sh, with_disk};
use crate::support::imgtool;

#[test]
fn one_failed_source_discards_the_whole_archive() {
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
fn detects_a_source_truncated_during_conversion() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        Image::hole("x", 16 << 20).with(0, images::noise(1, 16 << 20)).write_raw(&raw);
        let source = dir.path().join(format!("source.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&source)]).ok();
        std::fs::remove_file(&raw).unwrap();
        let out = dir.path().join("out.qcow2");
        // At 8 MiB/s, the conversion takes two seconds, enough to cut the source meanwhile.
        let child = imgtool(["convert", "-r", "8M", text(&source), "--to", "qcow2", text(&out)]).start();
        let began = Instant::now();
        while partials(dir.path()).is_empty() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let file = std::fs::File::options().write(true).open(&source).unwrap();
        file.set_len(2 << 20).unwrap();
        assert_eq!(ends(child, format).code(), Some(1), "{format}");
        assert_eq!(names(dir.path()), [format!("source.{format}")]);
        std::fs::remove_file(&source).unwrap();
    }
}

/// Starts a command under strace, stops it at its first call that writes content, or at one that reads it,
/// runs the shell line `meanwhile`, and lets the command end with code 0. Returns what it says.
fn interrupted_by(directory: &Path, command: &str, meanwhile: &str) -> String {
    let (calls, count) = match command.starts_with("convert") || command.contains("create") {
        true => ("pwritev,pwrite64,copy_file_range", 1),
        // Chains take more reads to open.
        false if command.starts_with("compare --allow-external") => ("pread64", 24),
        false if command.contains("--allow-external") => ("pread64", 13),
        false => ("pread64", 8),
    };
    let line = format!(
        "strace -f -o log -e trace={calls} -e inject={calls}:signal=SIGSTOP:when={count} $IMGTOOL {command} & \
         until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do sleep 0.01; done; \
         {meanwhile}; child=$(cat /proc/$!/task/$!/children); \
         while kill -CONT $child 2>/dev/null; do sleep 0.01; done; wait $!"
    );
    let run = sh(directory, &line);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status.code(), Some(0), "{command}: {said}");
    remove(&directory.join("log"));
    said
}

const WRITE: &str = "printf x | dd bs=1 seek=4096 conv=notrunc status=none of=";

/// A source that another program writes meanwhile has no single state to convert, and the program says so.
#[test]
fn warns_about_a_source_written_during_conversion() {
    require!("strace");
    let said = |meanwhile: &str| {
        let dir = with_disk();
        std::os::unix::fs::symlink("disk.raw", dir.path().join("link")).unwrap();
        std::fs::copy(dir.path().join("disk.raw"), dir.path().join("other")).unwrap();
        let said = interrupted_by(dir.path(), "convert link --to qcow2 out.qcow2", meanwhile);
        let [written, attributes, elsewhere] =
            ["link was written to while it was read", "the attributes of link changed", "no longer leads to"]
                .map(|words| said.split_whitespace().collect::<Vec<_>>().join(" ").contains(words));
        (written, attributes, elsewhere)
    };
    assert_eq!(said("cat disk.raw >/dev/null"), (false, false, false));
    assert_eq!(said("chmod 600 disk.raw"), (false, true, false));
    // The old file is read.
    assert_eq!(said("mv other disk.raw"), (false, true, true));
    assert_eq!(said("ln -sf other link"), (false, false, true));
    assert_eq!(said("rm link"), (false, false, true));
    assert_eq!(said(&format!("{WRITE}disk.raw")), (true, false, false));
    assert_eq!(said("printf x >> disk.raw"), (true, false, false));
    assert_eq!(said(&format!("mv disk.raw away; {WRITE}away")), (true, false, true));
    let set_back = format!("cp -p disk.raw old; {WRITE}disk.raw; touch -r old disk.raw");
    assert_eq!(said(&set_back), (false, true, false));
}

/// Backing files count as well as the image, whatever command reads them.
#[test]
fn every_reading_command_warns_about_changed_files() {
    require!("strace", "qemu-img");
    let dir = with_disk();
    let path = dir.path();
    oracles::qemu_make(&path.join("disk.raw"), "qcow2", "", &path.join("base.qcow2"));
    for (backing, format, file) in [("base.qcow2", "qcow2", "top.qcow2"), ("disk.raw", "raw", "over.qcow2")] {
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b", backing, file])
            .current_dir(path)
            .status();
        assert!(made.unwrap().success());
    }
    for (command, read) in [
        ("convert --allow-external chain over.qcow2 --to raw out", "disk.raw"),
        ("compare --allow-external chain over.qcow2 over.qcow2", "disk.raw"),
        ("checksum --allow-external chain over.qcow2", "disk.raw"),
        ("convert --allow-external chain top.qcow2 --to raw out", "base.qcow2"),
        ("convert disk.raw --to qcow2 -B base.qcow2 -F qcow2 out", "base.qcow2"),
        ("compare disk.raw disk.raw", "disk.raw"),
        ("checksum disk.raw", "disk.raw"),
        ("checksum < disk.raw -", "standard input"),
        ("vma create out -d format=raw:d=disk.raw", "disk.raw"),
        ("vma extract disk.vma out", "disk.vma"),
        ("vma verify disk.vma", "disk.vma"),
    ] {
        let file = if read == "standard input" { "disk.raw" } else { read };
        let said = interrupted_by(path, command, &format!("touch {file}"));
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(&format!("{read} was written to while it was read")), "{command}: {said}");
        if path.join("out").exists() {
            remove(&path.join("out"));
        }
    }
}
