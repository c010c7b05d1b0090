//! Formats of disks in `imgtool vma create` and of targets in maps: found by content, never taken for raw.

use std::path::Path;

use imgtool_testing::images::{Image, noise};
use imgtool_testing::{oracles, require, sha256_file, text};

use super::{scene, vma};
use crate::support::imgtool;

/// Writes a disk of 3 MiB, `disk.raw`, and the same in another format, `x`.
fn image(directory: &Path, format: &str) {
    Image::hole("d", 3 << 20).with(4096, noise(7, 900_000)).write_raw(&directory.join("disk.raw"));
    let (from, to) = (directory.join("disk.raw"), directory.join("x"));
    oracles::run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&from), text(&to)]);
}

/// Asserts that the only disk of an archive has the content of `disk.raw`.
fn check_content(directory: &Path, archive: &str) {
    imgtool(["compare", archive, "disk.raw"]).within(directory).ok();
}

#[test]
fn create_reads_images_of_every_format_without_being_told() {
    require!("qemu-img");
    let dir = scene();
    for format in ["vmdk", "vdi", "vpc", "vhdx", "qcow2", "qed", "parallels"] {
        image(dir.path(), format);
        let run = vma(dir.path(), &format!("create {format}.vma a=x")).exits(0);
        assert!(!run.stderr.contains("raw"), "{format}: {}", run.stderr);
        check_content(dir.path(), &format!("{format}.vma"));
    }
}

#[test]
fn create_notes_what_it_takes_for_raw() {
    let dir = scene();
    std::fs::copy(dir.path().join("d.raw"), dir.path().join("disk")).unwrap();
    let note = "vma: note: 'disk' is read as raw, since no other format fits";
    vma(dir.path(), "create a2.vma disk").exits(0).says(note);
    // The user, or the name, has said so.
    for line in ["create a3.vma -d format=raw:disk", "create a4.vma d.raw"] {
        let run = vma(dir.path(), line).exits(0);
        assert!(!run.stderr.contains("read as raw"), "{line}: {}", run.stderr);
    }
}

#[test]
fn create_reads_compressed_images_like_convert() {
    require!("gzip");
    let dir = scene();
    Image::hole("d", 3 << 20).with(4096, noise(7, 900_000)).write_raw(&dir.path().join("disk.raw"));
    oracles::run("gzip", &["-k", text(&dir.path().join("disk.raw"))]);
    let run = vma(dir.path(), "create z.vma a=disk.raw.gz").exits(0);
    assert_eq!(run.stderr, "");
    check_content(dir.path(), "z.vma");
    // As raw, the compressed file itself is the disk.
    vma(dir.path(), "create r.vma -d format=raw:a=disk.raw.gz").exits(0);
    let len = std::fs::metadata(dir.path().join("disk.raw.gz")).unwrap().len().next_multiple_of(512);
    assert!(vma(dir.path(), "list r.vma").text().contains(&format!("size: {len} devname: a")));
    std::fs::write(dir.path().join("bad.raw.gz"), noise(1, 5000)).unwrap();
    vma(dir.path(), "create x.vma bad.raw.gz")
        .exits(1)
        .says("vma: bdrv_open 'bad.raw.gz' failed - the name says gzip");
}

#[test]
fn create_opens_backing_files_only_if_allowed() {
    require!("qemu-img");
    let dir = scene();
    image(dir.path(), "qcow2");
    let overlay = dir.path().join("top.qcow2");
    oracles::run_in(
        "qemu-img",
        dir.path(),
        &["create", "-q", "-f", "qcow2", "-b", "x", "-F", "qcow2", text(&overlay)],
    );
    vma(dir.path(), "create no.vma a=top.qcow2")
        .exits(1)
        .says("vma: bdrv_open 'top.qcow2' failed")
        .says("hint: if you trust the image: --allow-external PATH");
    for (archive, allowed) in [("c.vma", "chain"), ("p.vma", "x")] {
        vma(dir.path(), &format!("create {archive} --allow-external {allowed} a=top.qcow2")).exits(0);
        check_content(dir.path(), archive);
    }
    vma(dir.path(), "create no.vma --allow-external disk.raw a=top.qcow2").exits(1);
}

#[test]
fn maps_refuse_images_that_cannot_be_written_into() {
    require!("qemu-img", "gzip");
    let dir = scene();
    std::fs::write(dir.path().join("map"), "1:drive-efidisk0=t\n").unwrap();
    let extract = || vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out");
    for (format, name) in [("vdi", "vdi"), ("vpc", "vhd"), ("vmdk", "vmdk"), ("qed", "qed")] {
        let target = dir.path().join("t");
        oracles::run("qemu-img", &["create", "-q", "-f", format, "-o", "size=540672", text(&target)]);
        let before = sha256_file(&target);
        extract().exits(1).says("vma: ");
        assert_eq!(sha256_file(&target), before, "{name}");
        std::fs::remove_file(&target).unwrap();
    }
    let disk = dir.path().join("t0");
    std::fs::write(&disk, noise(2, 530_000)).unwrap();
    oracles::run("gzip", &[text(&disk)]);
    std::fs::rename(dir.path().join("t0.gz"), dir.path().join("t")).unwrap();
    let before = sha256_file(&dir.path().join("t"));
    std::fs::OpenOptions::new().append(true).open(dir.path().join("t")).unwrap().set_len(540_672).unwrap();
    let padded = sha256_file(&dir.path().join("t"));
    assert_ne!(before, padded);
    extract().exits(1).says("vma: a gzip file that exists can't be written into");
    assert_eq!(sha256_file(&dir.path().join("t")), padded);
}

/// Without `format=`, the name of a target does not make an image of another format a raw disk.
#[test]
fn maps_probe_targets_called_raw() {
    require!("qemu-img");
    let dir = scene();
    let extract = |line: &str| {
        std::fs::write(dir.path().join("map"), line).unwrap();
        vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out")
    };
    let target = dir.path().join("t.raw");
    for (format, options) in [
        ("vdi", "static=on"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "subformat=fixed"),
        ("qcow2", "preallocation=full"),
    ] {
        let line = ["create", "-q", "-f", format, "-o", options, text(&target), "540672"];
        oracles::run("qemu-img", &line);
        let before = sha256_file(&target);
        extract("1:drive-efidisk0=t.raw\n").exits(1).says("vma: ").says("hint: ").says("format=raw:");
        assert_eq!(sha256_file(&target), before, "{format}");
    }
    std::fs::write(&target, noise(2, 540_672)).unwrap();
    extract("1:drive-efidisk0=t.raw\n").ends_with(0);
}
