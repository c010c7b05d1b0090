//! `convert --size`: disks that grow on the way.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, tempdir};

use crate::support::imgtool;

const OLD: u64 = 5 << 20;
const NEW: u64 = 64 << 20;

fn workshop() -> tempfile::TempDir {
    let dir = tempdir();
    let disk = Image::hole("d", OLD).with(1 << 20, images::noise(1, 70_000)).with(OLD - 512, vec![7; 512]);
    disk.write_raw(&dir.path().join("disk.raw"));
    dir
}

fn virtual_size(directory: &Path, name: &str) -> u64 {
    let info = imgtool(["info", "--output", "json", name]).within(directory).ok().json();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn disk_grows_on_the_way_and_the_rest_is_zero() {
    let dir = workshop();
    for (size, name) in [("64M", "a.raw"), ("+59M", "b.qcow2"), ("64M", "c.vhdx"), ("67108864", "d.vdi")] {
        let run = imgtool(["convert", "--verify", "--size", size, "disk.raw", name]).within(dir.path()).ok();
        run.says("the disk grew from 5 MiB (5242880 bytes) to 64 MiB (67108864 bytes)");
        assert_eq!(virtual_size(dir.path(), name), NEW, "{name}");
        // A longer image compares equal if its end is zero.
        imgtool(["compare", "disk.raw", name]).within(dir.path()).ok();
    }
}

#[test]
fn grown_images_read_the_same_in_qemu() {
    require!("qemu-img");
    let dir = workshop();
    imgtool(["convert", "-q", "--size", "64M", "disk.raw", "a.qcow2"]).within(dir.path()).ok();
    imgtool(["convert", "-q", "--size", "64M", "disk.raw", "a.raw"]).within(dir.path()).ok();
    oracles::qemu_compare(&dir.path().join("a.raw"), "raw", &dir.path().join("a.qcow2"), "qcow2");
    assert_eq!(std::fs::metadata(dir.path().join("a.raw")).unwrap().len(), NEW);
}

#[test]
fn smaller_sizes_cut_off_zeros_alone() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    convert(&["--size", "4M", "disk.raw", "x.qcow2"])
        .exits(1)
        .says("holds data beyond 4194304 bytes, at guest byte 5242368")
        .says("shrink its partitions");
    convert(&["--size", "64M", "disk.raw", "large.qcow2"]).exits(0);
    for (source, name) in [("large.qcow2", "small.raw"), ("large.qcow2", "small.vhdx")] {
        convert(&["--verify", "--size", "5M", source, name]).exits(0).says("the rest was zero");
        assert_eq!(virtual_size(dir.path(), name), OLD, "{name}");
        imgtool(["compare", "disk.raw", name]).within(dir.path()).ok();
    }
    convert(&["-q", "--size", "-59M", "large.qcow2", "less.raw"]).exits(0);
    assert_eq!(virtual_size(dir.path(), "less.raw"), OLD);
}

#[test]
fn sizes_of_archives_streams_and_nonsense_are_refused() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    convert(&["--size", "big", "disk.raw", "x.qcow2"]).exits(2).says("40G");
    convert(&["--size", "64M", "disk.raw", "x.vma"]).exits(2).says("not for an archive");
    convert(&["--size", "64M", "disk.raw", "disk.raw", "d/"]).exits(2).says("for one disk");
    imgtool(["convert", "-q", "-c=gzip", "disk.raw", "disk.raw.gz"]).within(dir.path()).ok();
    convert(&["--size", "64M", "disk.raw.gz", "x.raw"]).exits(2).says("imgtool resize");
    convert(&["--size", "5M", "disk.raw", "same.raw"]).exits(0);
    assert_eq!(virtual_size(dir.path(), "same.raw"), OLD);
}
