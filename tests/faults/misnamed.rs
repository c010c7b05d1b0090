//! Names and contents that contradict each other: a damaged compressed file is never taken for the disk, and
//! a disk that looks compressed is not decompressed if the user states its format.

use std::fs;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, tempdir};

use crate::support::imgtool;

/// Compressors by extension, with the name of the compression.
const PACKERS: [(&str, &str, &str); 5] = [
    ("zst", "zstd", "zstd"),
    ("gz", "gzip", "gzip"),
    ("lzo", "lzop", "lzop"),
    ("xz", "xz", "xz"),
    ("bz2", "bzip2", "bzip2"),
];

/// Commands that read a raw disk, with their exit codes for an image that can't be opened.
const READERS: [(&str, i32); 9] = [
    ("convert SOURCE --to raw out", 1),
    ("convert SOURCE --to raw -", 1),
    ("convert SOURCE --to vma out", 1),
    ("checksum SOURCE", 1),
    ("compare SOURCE disk.raw", 2),
    ("compare disk.raw SOURCE", 2),
    ("info SOURCE", 1),
    ("map SOURCE", 1),
    ("measure --to raw SOURCE", 1),
];

#[test]
fn the_bytes_of_a_damaged_compressed_file_are_not_the_disk() {
    require!("zstd", "gzip", "lzop", "xz", "bzip2");
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(4096, images::noise(1, 100_000)).write_raw(&raw);
    let bytes = fs::read(&raw).unwrap();
    for (extension, program, compression) in PACKERS {
        let mut packed = oracles::filter(program, &["-c"], &bytes);
        let intact = format!("intact.raw.{extension}");
        fs::write(dir.path().join(&intact), &packed).unwrap();
        imgtool(["compare", "-f", "raw", &intact, "disk.raw"]).within(dir.path()).ok();
        packed[0] ^= 1;
        for (what, content) in [("damaged", packed.as_slice()), ("empty", b"")] {
            for name in [format!("{what}.raw.{extension}"), format!("{what}.{}", extension.to_uppercase())] {
                fs::write(dir.path().join(&name), content).unwrap();
                for (line, code) in READERS {
                    for format in ["", " -f raw"] {
                        let line = line.replace("SOURCE", &name) + format;
                        let run = imgtool(line.split(' ')).within(dir.path()).go().exits(code);
                        run.says(&format!("the name says {compression}, but the content")).says("rename it");
                    }
                }
            }
        }
        // As the hint says: under another name, the same bytes are a disk.
        fs::write(dir.path().join("renamed.raw"), &packed).unwrap();
        imgtool(["convert", "-f", "raw", "renamed.raw", "--to", "raw", "out"]).within(dir.path()).ok();
        assert!(fs::read(dir.path().join("out")).unwrap() == packed, "{extension}");
        fs::remove_file(dir.path().join("out")).unwrap();
    }
}

#[test]
fn an_inner_layer_that_the_name_says_must_be_there_too() {
    require!("zstd", "gzip");
    let dir = tempdir();
    let packed = oracles::filter("gzip", &["-c"], &images::noise(1, 100_000));
    let mut damaged = packed.clone();
    damaged[1] ^= 1;
    let outer = |bytes: &[u8]| oracles::filter("zstd", &["-q", "-c"], bytes);
    fs::write(dir.path().join("good.raw.gz.zst"), outer(&packed)).unwrap();
    fs::write(dir.path().join("bad.raw.gz.zst"), outer(&damaged)).unwrap();
    for format in ["", " -f raw"] {
        let line = |name: &str| format!("convert {name} --to raw -{format}");
        let run = imgtool(line("good.raw.gz.zst").split(' ')).within(dir.path()).ok();
        assert!(run.stdout == images::noise(1, 100_000));
        let run = imgtool(line("bad.raw.gz.zst").split(' ')).within(dir.path()).go();
        run.exits(1).says("the name says gzip, but the content");
    }
}

#[test]
fn a_disk_that_looks_compressed_stays_as_it_is_if_its_format_is_stated() {
    require!("gzip");
    let dir = tempdir();
    // A volume that a backup program has written an archive to.
    let mut disk = oracles::filter("gzip", &["-c"], &images::noise(1, 100_000));
    disk.resize(1 << 20, 0);
    fs::write(dir.path().join("disk.raw"), &disk).unwrap();
    for name in ["disk.raw.zst", "disk.raw.gz"] {
        let line = ["convert", "--verify", "-f", "raw", "disk.raw", "--to", "raw", name];
        imgtool(line).within(dir.path()).ok();
        let run = imgtool(["convert", "-f", "raw", name, "--to", "raw", "-"]).within(dir.path()).ok();
        assert!(run.stdout == disk, "{name}");
        imgtool(["compare", "-f", "raw", "-F", "raw", name, "disk.raw"]).within(dir.path()).ok();
    }
}
