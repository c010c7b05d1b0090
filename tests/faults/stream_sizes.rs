//! Raw disks from streams, whose size shows only at their end: empty streams, and existing targets of another
//! size.

use std::fs;
use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{names, oracles, require, tempdir};

use crate::support::imgtool;
use crate::support::run::{Outcome, Run};

const SIZE: u64 = 1 << 20;

/// Largest accepted difference between a target and its disk, in bytes.
const TOLERANCE: u64 = 4 << 20;

/// Compressors of streams, by extension.
const PACKERS: [(&str, &str); 3] = [("zst", "zstd"), ("gz", "gzip"), ("lzo", "lzop")];

/// Ways in which the disk arrives: through a pipe (`-`), or as a compressed file.
fn sources(directory: &Path) -> Vec<String> {
    let raw = directory.join("disk.raw");
    Image::hole("x", SIZE).with(4096, images::noise(1, 600_000)).write_raw(&raw);
    let bytes = fs::read(&raw).unwrap();
    let mut sources = vec!["-".to_owned()];
    for (extension, program) in PACKERS {
        let name = format!("disk.raw.{extension}");
        fs::write(directory.join(&name), oracles::filter(program, &["-c"], &bytes)).unwrap();
        sources.push(name);
    }
    sources
}

/// Sets up a run; `-` among the arguments brings the disk through a pipe.
fn run(directory: &Path, line: &str) -> Run {
    let run = imgtool(line.split(' ')).within(directory);
    if line.split(' ').any(|word| word == "-") { run.pipe_from(&directory.join("disk.raw")) } else { run }
}

/// Converts `source` into the target `t.raw` of `len` old bytes, and returns the outcome and the target.
fn into_existing(directory: &Path, line: &str, len: u64) -> (Outcome, Vec<u8>) {
    let target = directory.join("t.raw");
    fs::write(&target, vec![7; len as usize]).unwrap();
    (run(directory, line).go(), fs::read(target).unwrap())
}

#[test]
fn an_existing_target_must_have_the_size_of_the_stream() {
    require!("zstd", "gzip", "lzop");
    let dir = tempdir();
    let sources = sources(dir.path());
    let disk = fs::read(dir.path().join("disk.raw")).unwrap();
    for source in &sources {
        for line in [
            format!("convert -n -f raw {source} --to raw t.raw"),
            format!("convert -n --target-is-zero -f raw {source} --to raw t.raw"),
        ] {
            for len in [SIZE, SIZE + TOLERANCE] {
                let (outcome, target) = into_existing(dir.path(), &line, len);
                outcome.exits(0);
                let is_zeroed = line.contains("zero");
                assert!(is_zeroed || target.starts_with(&disk), "{line}: {len}");
                assert!(target[SIZE as usize..].iter().all(|byte| *byte == 7), "{line}: {len}");
            }
            // All of the disk's content fits into the smaller target, only zeros do not.
            let (outcome, _) = into_existing(dir.path(), &line, SIZE - 65_536);
            outcome.ends_with(1).says("the target is too small: it has 983040 bytes").says("now incomplete");
            let (outcome, target) = into_existing(dir.path(), &line, SIZE + TOLERANCE + 1);
            let outcome =
                outcome.ends_with(1).says("much larger: it has 5242881 bytes, the stream had 1048576");
            outcome.says("overwritten in place").says("now incomplete").says("--force accepts");
            assert!(target[SIZE as usize..].iter().all(|byte| *byte == 7), "{line}");
            let (outcome, _) = into_existing(dir.path(), &format!("{line} --force"), SIZE + TOLERANCE + 1);
            outcome.exits(0);
        }
    }
}

#[test]
fn the_target_of_one_disk_must_have_the_size_of_the_stream() {
    require!("zstd", "gzip", "lzop");
    let dir = tempdir();
    for source in sources(dir.path()) {
        let name = if source == "-" { "disk" } else { "x" };
        let source = if source == "-" { source } else { format!("x={source}") };
        let line = format!("convert -f raw {source} --target {name}=t.raw");
        into_existing(dir.path(), &line, SIZE).0.exits(0);
        into_existing(dir.path(), &line, SIZE - 65_536).0.ends_with(1).says("too small");
        into_existing(dir.path(), &line, 6 * SIZE).0.ends_with(1).says("much larger");
    }
}

/// A stream of nothing but zeros writes nothing to a target that can make holes.
#[test]
fn zeros_that_overwrite_a_target_count_as_a_change() {
    let dir = tempdir();
    Image::hole("x", SIZE).write_raw(&dir.path().join("disk.raw"));
    let line = "convert -n -f raw - --to raw t.raw";
    let (outcome, target) = into_existing(dir.path(), line, 6 * SIZE);
    outcome.ends_with(1).says("overwritten in place").says("now incomplete");
    assert!(target[..SIZE as usize].iter().all(|byte| *byte == 0));
    let (outcome, target) = into_existing(dir.path(), "convert -n --target-is-zero -f raw - t.raw", 6 * SIZE);
    assert!(!outcome.ends_with(1).stderr.contains("now incomplete"));
    assert!(target.iter().all(|byte| *byte == 7), "nothing was written");
}

#[test]
fn a_stream_without_an_end_stops_at_the_end_of_its_target() {
    let dir = tempdir();
    fs::write(dir.path().join("t.raw"), vec![7; SIZE as usize]).unwrap();
    let line = "convert -n --target-is-zero -f raw /dev/zero --to raw t.raw";
    imgtool(line.split(' ')).within(dir.path()).cpu_limit(20).go().ends_with(1).says("too small");
}

#[test]
fn an_empty_stream_is_an_error_for_every_command() {
    require!("gzip");
    let dir = tempdir();
    Image::hole("x", SIZE).write_raw(&dir.path().join("disk.raw"));
    fs::write(dir.path().join("t.raw"), vec![7; SIZE as usize]).unwrap();
    fs::write(dir.path().join("nothing.raw.gz"), oracles::filter("gzip", &["-c"], b"")).unwrap();
    let empty = "input is empty; did the command before the pipe fail?";
    let nothing = "the gzip stream contains nothing; did the command that wrote it fail?";
    for (source, message) in [("-", empty), ("/dev/null", empty), ("nothing.raw.gz", nothing)] {
        for (line, code) in [
            ("convert SOURCE --to raw out", 1),
            ("convert SOURCE --to raw -", 1),
            ("convert SOURCE --to qcow2 out", 1),
            ("convert SOURCE --to vma out", 1),
            ("convert SOURCE --to raw out.raw.zst", 1),
            ("convert --salvage SOURCE --to raw out", 1),
            ("convert -n SOURCE --to raw t.raw", 1),
            ("convert -n SOURCE t.raw --to raw --force", 1),
            ("checksum SOURCE", 1),
            ("compare SOURCE disk.raw", 2),
            ("compare disk.raw SOURCE", 2),
            ("info SOURCE", 1),
            ("map SOURCE", 1),
            ("measure --to raw SOURCE", 1),
        ] {
            for format in ["", " -f raw"] {
                let line = line.replace("SOURCE", source) + format;
                let run = imgtool(line.split(' ')).within(dir.path()).pipe_bytes([]);
                run.go().exits(code).says(message);
            }
        }
    }
    assert_eq!(names(dir.path()), ["disk.raw", "nothing.raw.gz", "t.raw"]);
    assert!(fs::read(dir.path().join("t.raw")).unwrap().iter().all(|byte| *byte == 7));
}

#[test]
fn an_empty_fifo_is_an_error_for_vma_create() {
    let dir = tempdir();
    let fifo = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || drop(fs::File::options().write(true).open(fifo).unwrap())
    });
    let line = "vma create out.vma -d format=raw:x=pipe";
    imgtool(line.split(' ')).within(dir.path()).go().ends_with(1).says("input is empty");
    writer.join().unwrap();
    assert_eq!(names(dir.path()), ["pipe"]);
}

/// The size of a file is known, so it may be empty.
#[test]
fn an_empty_file_is_an_empty_disk() {
    let dir = tempdir();
    fs::write(dir.path().join("empty.raw"), b"").unwrap();
    imgtool(["convert", "empty.raw", "--to", "raw", "out"]).within(dir.path()).ok();
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"");
    // Readers would take the result for the output of a command that failed.
    for target in ["out.raw.gz", "out.raw.zst"] {
        let run = imgtool(["convert", "empty.raw", target]).within(dir.path()).go().exits(1);
        run.says("a disk of 0 bytes can't be compressed");
    }
    assert_eq!(names(dir.path()), ["empty.raw", "out"]);
}
