//! Files without a known format: what is no disk is refused by name, what may be one is read as raw with a note.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, oracles, require, snapshot, tempdir};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

const NOTE: &str = "no known format, read as raw (-f raw to silence)";

/// Asserts that every command refuses the file by name, and that `-f raw` reads it.
#[track_caller]
fn refused_as(directory: &Path, file: &str, name: &str) {
    for line in [&["convert", file, "--to", "qcow2", "out.qcow2"][..], &["info", file], &["map", file]] {
        imgtool(line).within(directory).go().exits(1).says(file).says(name).says("-f raw");
    }
    let run = imgtool(["convert", "-f", "raw", file, "--to", "raw", "out.raw"]).within(directory).ok();
    assert!(!run.stderr.contains(NOTE), "{}", run.stderr);
    assert_same(&directory.join(file), &directory.join("out.raw"), file);
    std::fs::remove_file(directory.join("out.raw")).unwrap();
}

#[test]
fn refuses_archives_by_name() {
    require!("gzip", "python3", "tar", "xz");
    let dir = tempdir();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("vm.xml", b"<?xml version='1.0'?><domain/>");
    let run = |tool: &str, args: &[&str]| drop(oracles::run_in(tool, dir.path(), args));
    run("gzip", &["-k", "vm.xml"]);
    run("tar", &["--format=ustar", "-cf", "disk.raw", "vm.xml"]);
    run("tar", &["--format=gnu", "-cf", "gnu", "vm.xml"]);
    run("tar", &["--format=pax", "-czf", "box", "vm.xml"]);
    run("tar", &["--format=v7", "-cf", "old", "vm.xml"]);
    run("python3", &["-m", "zipfile", "-c", "zipped", "vm.xml"]);
    run("xz", &["--format=lzma", "-k", "vm.xml"]);
    write("vm.xml.Z", b"\x1f\x9d\x90\x3c\x7e\xe0\xf1");
    write("document", b"%PDF-1.7\n");
    write("download", b"<!DOCTYPE html><title>404 Not Found</title>");
    for (file, magic) in [
        ("bochs", &b"\xce\x8a\x46\x02"[..]),
        ("android", b"\x3a\xff\x26\xed"),
        ("macos", b"sprs"),
        ("aff", b"AFF10\x0d\x0a\0"),
    ] {
        write(file, &[magic, &[0; 4096]].concat());
    }
    std::fs::copy(PROGRAM, dir.path().join("program")).unwrap();
    for (file, name) in [
        ("disk.raw", "is a tar archive"),
        ("gnu", "is a tar archive"),
        ("box", "is a tar archive, in gzip"),
        ("old", "is a tar archive"),
        ("zipped", "is a zip archive"),
        ("vm.xml.lzma", "is an lzma file"),
        ("vm.xml.Z", "is a file of compress(1)"),
        ("document", "is a PDF document"),
        ("download", "is a web page"),
        ("program", "is an ELF program"),
        ("vm.xml", "is an XML document"),
        ("bochs", "is a sparse image of Bochs"),
        ("android", "is a sparse image of Android"),
        ("macos", "is a sparse image of macOS"),
        ("aff", "is an AFF image"),
    ] {
        refused_as(dir.path(), file, name);
    }
    let before = snapshot(dir.path());
    for line in [&["convert", "vm.xml.gz", "out.qcow2"][..], &["info", "vm.xml.gz"]] {
        imgtool(line).within(dir.path()).go().exits(1).says("is an XML document, in gzip");
    }
    // A pipe has no name that says otherwise: the archive is read, and its file is no disk.
    let archive = dir.path().join("zipped");
    let run = imgtool(["convert", "-", "out.raw"]).within(dir.path()).pipe_from(&archive);
    run.go().exits(1).says("is neither a known image nor a disk");
    assert_eq!(snapshot(dir.path()), before);
}

/// The footer of a fixed VHD is at its end, so the file looks like a raw disk.
#[test]
fn refuses_images_with_their_signature_at_the_end() {
    require!("qemu-img");
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536)).write_raw(&dir.path().join("disk.raw"));
    let make = ["convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed", "disk.raw", "disk.vhd"];
    oracles::run_in("qemu-img", dir.path(), &make);
    for name in ["disk.img", "disk", "other.raw"] {
        std::fs::copy(dir.path().join("disk.vhd"), dir.path().join(name)).unwrap();
        refused_as(dir.path(), name, "ends like a vhd image");
        imgtool(["compare", "-f", "vhd", name, "-F", "vhd", "disk.vhd"]).within(dir.path()).ok();
    }
}

/// A pipe shows its end last: no output may keep the footer of a VHD as a part of its disk.
#[test]
fn refuses_pipes_that_end_like_an_image() {
    require!("zstd");
    let dir = tempdir();
    let disk = Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536));
    disk.write_raw(&dir.path().join("disk.raw"));
    let make = ["convert", "-q", "disk.raw", "-O", "vhd", "-o", "subformat=fixed", "f.vhd"];
    imgtool(make).within(dir.path()).ok();
    let plain = dir.path().join("f.vhd");
    oracles::run_in("zstd", dir.path(), &["-q", "f.vhd", "-o", "f.zst"]);
    let before = snapshot(dir.path());
    for (file, to) in [("f.vhd", "qcow2"), ("f.vhd", "raw"), ("f.zst", "qcow2"), ("f.zst", "vhdx")] {
        let run = imgtool(["convert", "-", "-O", to, "out"]).within(dir.path());
        let run = run.pipe_from(&dir.path().join(file)).go().exits(1);
        run.says("ends like a vhd image").says("-f vhd").says("-f raw");
        assert_eq!(snapshot(dir.path()), before, "{file} to {to}");
    }
    imgtool(["convert", "f.zst", "out.qcow2"]).within(dir.path()).go().exits(1).says("ends like a vhd image");
    // With the format, the pipe is read, also into formats that need the size before the data.
    for to in ["raw", "vhdx", "vdi", "vmdk", "vhd", "vma"] {
        let out = format!("out.{to}");
        let run = imgtool(["convert", "-q", "-f", "vhd", "-", "-O", to, &out]).within(dir.path());
        run.pipe_from(&plain).ok();
        imgtool(["compare", "-q", "disk.raw", &out]).within(dir.path()).ok();
    }
    let raw = imgtool(["convert", "-q", "-f", "raw", "-", "-O", "raw", "kept.raw"]).within(dir.path());
    raw.pipe_from(&plain).ok();
    assert_same(&plain, &dir.path().join("kept.raw"), "a disk that ends like an image");
}

#[test]
fn notes_what_nothing_recognises() {
    let dir = tempdir();
    let disk = Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536));
    for name in ["disk", "disk.img", "disk.raw"] {
        disk.write_raw(&dir.path().join(name));
    }
    std::fs::copy("/etc/passwd", dir.path().join("passwd")).unwrap();
    let first_line = |args: &[&str]| {
        let run = imgtool(args).within(dir.path()).ok();
        run.stderr.lines().next().unwrap_or_default().to_owned()
    };
    for line in [
        &["convert", "disk", "--to", "qcow2", "a.qcow2"][..],
        &["convert", "disk.img", "--to", "qcow2", "b.qcow2"],
        &["convert", "passwd", "--to", "qcow2", "c.qcow2"],
        &["info", "disk"],
        &["map", "disk"],
        &["checksum", "disk"],
        &["measure", "-O", "qcow2", "disk"],
        &["compare", "disk.raw", "disk"],
    ] {
        assert!(first_line(line).contains(NOTE), "{line:?}: {}", first_line(line));
        std::fs::remove_file(dir.path().join("a.qcow2")).ok();
        std::fs::remove_file(dir.path().join("b.qcow2")).ok();
        std::fs::remove_file(dir.path().join("c.qcow2")).ok();
    }
    for line in [
        &["convert", "-q", "disk", "--to", "qcow2", "d.qcow2"][..],
        &["convert", "-f", "raw", "disk", "--to", "qcow2", "e.qcow2"],
        &["convert", "disk.raw", "--to", "qcow2", "f.qcow2"],
        &["checksum", "-q", "disk"],
        &["info", "-f", "raw", "disk"],
    ] {
        assert!(!first_line(line).contains(NOTE), "{line:?}");
    }
}

/// An image whose header was overwritten with zeros looks like a new disk at its beginning.
#[test]
fn notes_data_behind_zeros() {
    require!("zstd");
    let dir = tempdir();
    let disk = Image::hole("x", 3 << 20).with(1 << 20, images::noise(1, 65_536));
    disk.write_raw(&dir.path().join("disk"));
    let mut allocated = vec![0; 64 << 10];
    std::fs::write(dir.path().join("blank"), &allocated).unwrap();
    allocated[5000] = 1;
    std::fs::write(dir.path().join("one"), &allocated).unwrap();
    Image::hole("x", 3 << 20).write_raw(&dir.path().join("hole"));
    for (name, is_noted) in [("disk", true), ("one", true), ("blank", false), ("hole", false)] {
        for line in [&["info", name][..], &["convert", name, "--to", "qcow2", &format!("{name}.qcow2")]] {
            let run = imgtool(line).within(dir.path()).ok();
            assert_eq!(run.stderr.lines().next().unwrap_or_default().contains(NOTE), is_noted, "{line:?}");
        }
        imgtool(["convert", "-q", name, "--to", "raw", &format!("{name}.zst")]).within(dir.path()).ok();
        let packed = imgtool(["info", &format!("{name}.zst")]).within(dir.path()).ok();
        assert_eq!(packed.stderr.contains(NOTE), is_noted, "{name}.zst");
    }
    // A pipe does not show more than its beginning.
    let pipe = imgtool(["convert", "-", "piped.qcow2"]).within(dir.path());
    assert!(pipe.pipe_from(&dir.path().join("disk")).ok().stderr.contains(NOTE));
}

/// Disks with a partition table, a file system or nothing yet are what raw images are for.
#[test]
fn real_disks_need_no_note() {
    require!("mkfs.ext4", "mkswap");
    let dir = tempdir();
    let blank = |name: &str| Image::hole("x", 4 << 20).write_raw(&dir.path().join(name));
    ["zeros", "ext4.img", "swap", "iso", "boot"].into_iter().for_each(blank);
    oracles::run_in("mkfs.ext4", dir.path(), &["-q", "-F", "ext4.img"]);
    oracles::run_in("mkswap", dir.path(), &["swap"]);
    let put = |name: &str, at: u64, bytes: &[u8]| {
        let file = std::fs::File::options().write(true).open(dir.path().join(name)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
    };
    put("iso", 16 * 2048, b"\x01CD001\x01\0");
    put("iso", 0, b"an ISO may begin with anything");
    put("boot", 0, b"\xfa\x33\xc0\x8e\xd0");
    put("boot", 510, b"\x55\xaa");
    std::fs::write(dir.path().join("empty"), b"").unwrap();
    for name in ["zeros", "ext4.img", "swap", "iso", "boot", "empty"] {
        let run =
            imgtool(["convert", name, "--to", "qcow2", &format!("{name}.qcow2")]).within(dir.path()).ok();
        assert!(!run.stderr.contains("no known format"), "{name}: {}", run.stderr);
    }
}
