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

/// Zeros behind the end of a disk are content: of a compressed raw disk, and in the report.
#[test]
fn grown_disks_are_whole_in_every_output_and_report() {
    let dir = workshop();
    imgtool(["convert", "-q", "disk.raw", "disk.raw.gz"]).within(dir.path()).ok();
    imgtool(["convert", "-q", "scsi0=disk.raw", "vm.vma"]).within(dir.path()).ok();
    let names = ["a.raw.zst", "b.raw.gz", "c.raw", "d.qcow2", "e.vhd"];
    let stdout =
        imgtool(["convert", "-q", "--size", "64M", "disk.raw", "-", "-O", "raw"]).within(dir.path()).ok();
    assert_eq!(stdout.stdout.len() as u64, NEW);
    for (index, source) in ["disk.raw", "disk.raw.gz", "vm.vma"].into_iter().enumerate() {
        for name in names {
            let name = format!("{index}{name}");
            let line = ["convert", "--verify", "--output", "json", "--size", "64M", source, &name];
            let report = imgtool(line).within(dir.path()).ok().json();
            let output = &report["outputs"][0];
            assert_eq!(
                (output["virtual-size"].as_u64(), &report["verified"]),
                (Some(NEW), &true.into()),
                "{name}"
            );
            assert_eq!(output["devices"][0]["virtual-size"], NEW, "{name}");
            imgtool(["convert", "-q", "--force", &name, "whole.raw"]).within(dir.path()).ok();
            assert_eq!(std::fs::metadata(dir.path().join("whole.raw")).unwrap().len(), NEW, "{name}");
            imgtool(["compare", "disk.raw", "whole.raw"]).within(dir.path()).ok();
        }
        // The way in makes no difference.
        for name in names {
            let read = |index: usize| std::fs::read(dir.path().join(format!("{index}{name}"))).unwrap();
            assert!(read(index) == read(0), "{source}, {name}");
        }
    }
}

/// What lies behind the end of the source must not show through: a base image's content, or the noise of a cipher.
#[test]
fn zeros_behind_a_grown_disk_hide_everything_else() {
    let dir = workshop();
    let base = images::noise(5, 8 << 20);
    std::fs::write(dir.path().join("base.raw"), &base).unwrap();
    std::fs::write(dir.path().join("pw"), "secret").unwrap();
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    let wanted = [&disk[..], &[0; 3 << 20]].concat();
    std::fs::write(dir.path().join("wanted.raw"), &wanted).unwrap();
    imgtool(["convert", "-q", "base.raw", "base.qcow2"]).within(dir.path()).ok();
    imgtool(["convert", "-q", "base.raw", "base.vhdx"]).within(dir.path()).ok();
    for line in [
        "-B base.qcow2 -F qcow2 disk.raw a.qcow2",
        "-S 0 -B base.qcow2 -F qcow2 disk.raw b.qcow2",
        "-B base.vhdx -F vhdx disk.raw c.vhdx",
        "--target-secret file=pw disk.raw d.luks",
        "--target-secret file=pw disk.raw e.luks.gz",
        "-o subformat=fixed disk.raw f.vhd",
    ] {
        let line: Vec<&str> = ["convert", "-q", "--size", "8M"].into_iter().chain(line.split(' ')).collect();
        imgtool(&line).within(dir.path()).ok();
        let compare = [
            "compare",
            "--allow-external",
            "chain",
            "--secret",
            "file=pw",
            line[line.len() - 1],
            "wanted.raw",
        ];
        imgtool(compare).within(dir.path()).ok();
    }
}

/// Salvage reads what it has lost as zeros: nobody knows whether it was zero.
#[test]
fn what_can_not_be_read_is_not_cut_off() {
    let dir = workshop();
    imgtool(["convert", "-q", "disk.raw", "disk.vdi"]).within(dir.path()).ok();
    let image = std::fs::read(dir.path().join("disk.vdi")).unwrap();
    // The last block of the file is the last one of the disk that has data.
    std::fs::write(dir.path().join("cut.vdi"), &image[..image.len() - (1 << 20)]).unwrap();
    let line = ["convert", "--salvage", "--size", "4M", "cut.vdi", "x.raw"];
    imgtool(line).within(dir.path()).go().exits(1).says("beyond 4194304 bytes can't be read");
    imgtool(["convert", "-q", "disk.raw", "disk.raw.gz"]).within(dir.path()).ok();
    let line = ["convert", "--salvage", "--size", "4M", "disk.raw.gz", "x.raw"];
    imgtool(line)
        .within(dir.path())
        .go()
        .exits(2)
        .says("the size of a stream can't change while it is salvaged");
    assert!(!dir.path().join("x.raw").exists());
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

/// A stream can't be checked before it is read: the error comes at the first byte that would be lost.
#[test]
fn streams_are_cut_and_grow_while_they_pass() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    convert(&["-q", "--size", "64M", "disk.raw", "large.raw"]).exits(0);
    convert(&["-q", "large.raw", "large.raw.gz"]).exits(0);
    convert(&["-q", "scsi0=large.raw", "vm.vma"]).exits(0);
    convert(&["-q", "disk.raw", "disk.raw.gz"]).exits(0);
    std::fs::write(dir.path().join("vm.vma.gz"), {
        let vm = std::fs::read(dir.path().join("vm.vma")).unwrap();
        oracles::filter("gzip", &["-c"], &vm)
    })
    .unwrap();
    // Of the disk of an archive, the size is known; of a raw stream, only at its end.
    for (source, name) in [("vm.vma.gz", "a.qcow2"), ("large.raw.gz", "b.qcow2"), ("large.raw.gz", "c.raw")] {
        convert(&["--verify", "--size", "5M", source, name]).exits(0).says("the rest was zero");
        assert_eq!(virtual_size(dir.path(), name), OLD, "{name}");
        imgtool(["compare", "disk.raw", name]).within(dir.path()).ok();
        convert(&["--size", "4M", source, "x.qcow2"])
            .exits(1)
            .says("holds data beyond 4194304 bytes, at guest byte 5242368");
        assert!(!dir.path().join("x.qcow2").exists());
    }
    convert(&["--verify", "--size", "64M", "disk.raw.gz", "d.raw"])
        .exits(0)
        .says("the disk grew from 5242880 to 67108864 bytes");
    assert_eq!(virtual_size(dir.path(), "d.raw"), NEW);
    imgtool(["compare", "large.raw", "d.raw"]).within(dir.path()).ok();
    convert(&["--size", "5M", "disk.raw.gz", "e.raw"]).exits(0);
    assert_eq!(virtual_size(dir.path(), "e.raw"), OLD);
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 11, "nothing else is left");
}

#[test]
fn sizes_of_archives_streams_and_nonsense_are_refused() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    convert(&["--size", "big", "disk.raw", "x.qcow2"]).exits(2).says("40G");
    convert(&["--size", "64M", "disk.raw", "x.vma"]).exits(2).says("not for an archive");
    convert(&["--size", "64M", "disk.raw", "disk.raw", "d/"]).exits(2).says("for one disk");
    imgtool(["convert", "-q", "-c=gzip", "disk.raw", "disk.raw.gz"]).within(dir.path()).ok();
    convert(&["--size", "+1M", "disk.raw.gz", "x.raw"]).exits(2).says("state the whole size");
    convert(&["--size", "5M", "disk.raw", "same.raw"]).exits(0);
    assert_eq!(virtual_size(dir.path(), "same.raw"), OLD);
}
