//! `imgtool vma` against the `vma` program, and whole virtual machines in archives.

use std::path::{Path, PathBuf};

use imgtool_testing::images::noise;
use imgtool_testing::{fixture, tempdir, text};

use crate::support::imgtool;
use crate::support::run::Outcome;

mod command_line;
mod commands;
mod figures;
mod losses;
mod maps;
mod messages;
mod names;
mod packing;
mod pipes;
mod probing;
mod proxmox;
mod raw_names;
mod transcripts;
mod whole_vm;

/// SHA-256 of the disks of `two-disks.vma`.
const SCSI: &str = "2eb0f4945306c46775684ae3e6b0f9c401fea1cbfb4ff3c2d6cbe6b8745326f3";
const EFI: &str = "a0fd2cf34e841d0d1e7f30367fc2b547c952d35ae30d9003b2890c10b61d82c9";

const LIST: &str = "\
CFG: size: 256 name: qemu-server.conf
CFG: size: 20 name: qemu-server.fw
DEV: dev_id=1 size: 5255168 devname: drive-scsi0
DEV: dev_id=2 size: 540672 devname: drive-efidisk0
";

/// Writes an archive of the fixtures without its compression, and returns its path.
fn plain(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    // As raw, the archive is only decompressed.
    let compressed = fixture(&format!("{name}.zst"));
    imgtool(["convert", "-f", "raw", "--to", "raw"]).args([&compressed, &path]).ok();
    path
}

/// Creates a directory with the archive of two disks. Returns the directory and the name of the archive.
fn two_disks() -> (tempfile::TempDir, &'static str) {
    let dir = tempdir();
    plain(dir.path(), "two-disks.vma");
    (dir, "two-disks.vma")
}

fn without_time(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with("CTIME: ")).map(|line| format!("{line}\n")).collect()
}

/// Creates a target for a map, filled with `byte`.
fn target(directory: &Path, name: &str, size: usize, byte: u8) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, vec![byte; size]).unwrap();
    path
}

/// Runs `imgtool vma …` in a directory; words are separated by blanks.
fn vma(directory: &Path, line: &str) -> Outcome {
    imgtool(["vma"]).args(line.split(' ')).within(directory).go()
}

/// Creates a directory with the archive of two disks, `a.vma`, and a small disk, `d.raw`.
fn scene() -> tempfile::TempDir {
    let dir = tempdir();
    let (from, to) = (fixture("two-disks.vma.zst"), dir.path().join("a.vma"));
    imgtool(["convert", "-q", "-f", "raw", "--to", "raw", text(&from), text(&to)]).ok();
    std::fs::write(dir.path().join("d.raw"), noise(3, 70_000)).unwrap();
    dir
}
