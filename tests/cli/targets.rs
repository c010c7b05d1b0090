//! Existing targets: the disk replaces old data up to its size, and data beyond it stays.

use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same_rounded, fixture, names, sha256_file, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Writes a file of `size` bytes of old data and returns them.
fn old(path: &Path, size: u64) -> Vec<u8> {
    let bytes = images::noise(77, size as usize);
    std::fs::write(path, &bytes).unwrap();
    bytes
}

/// Runs a shell line in `directory`, and returns its exit code and standard error.
fn shell(directory: &Path, line: &str) -> (Option<i32>, String) {
    let mut sh = Command::new("sh");
    sh.args(["-c", line]).env("IMGTOOL", PROGRAM).current_dir(directory);
    let output = sh.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The Rust runtime opens /dev/null in place of a closed standard output; an image written there is lost.
#[test]
fn notes_that_standard_output_is_closed() {
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536)).write_raw(&dir.path().join("disk.raw"));
    for to in ["raw", "vma"] {
        let (code, said) = shell(dir.path(), &format!("$IMGTOOL convert disk.raw --to {to} - >&-"));
        // Not an error: a program that wants no output may start the conversion like this.
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("note: standard output is closed"), "{said}");
        let (code, said) = shell(dir.path(), &format!("$IMGTOOL convert disk.raw --to {to} - >/dev/null"));
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("standard output"), "{said}");
    }
    let (code, said) = shell(dir.path(), "$IMGTOOL convert disk.raw --to raw - >>disk.raw");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("standard output: source and target are the same file"), "{said}");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

#[test]
fn reports_too_many_open_files_and_leaves_no_output() {
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536)).write_raw(&dir.path().join("disk.raw"));
    let (mut failed, mut finished) = (0, 0);
    for limit in 4..16 {
        let line = format!("ulimit -n {limit} && exec $IMGTOOL convert disk.raw --to qcow2 out.qcow2");
        let (code, said) = shell(dir.path(), &line);
        if code == Some(0) {
            finished += 1;
            std::fs::remove_file(dir.path().join("out.qcow2")).unwrap();
        } else {
            failed += 1;
            assert_eq!(code, Some(1), "{limit}: {said}");
            assert!(said.contains("Too many open files"), "{limit}: {said}");
        }
        assert_eq!(names(dir.path()), ["disk.raw"], "{limit}: {said}");
    }
    assert!(failed > 0 && finished > 0, "{failed} limits were too low, {finished} high enough");
}

#[test]
fn replaces_all_old_data_in_an_existing_target() {
    let dir = tempdir();
    for image in images::all().into_iter().filter(|image| image.size < 16 << 20) {
        let (raw, target) = (dir.path().join("x.raw"), dir.path().join("target"));
        image.write_raw(&raw);
        old(&target, image.size);
        imgtool(["convert", "-n", text(&raw), "--to", "raw", text(&target)]).ok();
        assert_same_rounded(&raw, &target, 1, image.name);
    }
}

#[test]
fn leaves_the_tail_of_a_larger_target_unchanged() {
    let dir = tempdir();
    let (raw, target) = (dir.path().join("x.raw"), dir.path().join("target"));
    let image = images::every_mask();
    image.write_raw(&raw);
    let before = old(&target, image.size + (4 << 20));
    imgtool(["convert", "-n", text(&raw), "--to", "raw", text(&target)]).ok();
    let after = std::fs::read(&target).unwrap();
    let size = image.size as usize;
    assert!(after[..size] == std::fs::read(&raw).unwrap(), "the content");
    assert!(after[size..] == before[size..], "the tail");
}

#[test]
fn refuses_a_target_of_the_wrong_size_and_names_both_sizes() {
    let dir = tempdir();
    let (raw, target) = (dir.path().join("x.raw"), dir.path().join("target"));
    let image = images::every_mask();
    image.write_raw(&raw);
    for size in [image.size - 512, image.size + (4 << 20) + 512, 0] {
        old(&target, size);
        let before = snapshot(dir.path());
        let run = imgtool(["convert", "-n", text(&raw), "--to", "raw", text(&target)]).go().exits(1);
        run.says(&image.size.to_string()).says(&size.to_string());
        assert_eq!(snapshot(dir.path()), before);
    }
}

#[test]
fn writes_each_device_to_its_own_target() {
    let dir = tempdir();
    let source = fixture("two-disks.vma.zst");
    let (scsi, efi) = (dir.path().join("scsi"), dir.path().join("efi.qcow2"));
    old(&scsi, 5_255_168);
    let scsi_target = format!("drive-scsi0={}", text(&scsi));
    let efi_target = format!("drive-efidisk0={},format=qcow2", text(&efi));
    imgtool(["convert", text(&source), "--target", &scsi_target, "--target", &efi_target]).ok();
    let entry = imgtool_testing::manifest::archives().remove(0);
    assert_eq!(sha256_file(&scsi), entry.devices[0].sha256);
    let back = dir.path().join("back.raw");
    imgtool(["convert", text(&efi), "--to", "raw", text(&back)]).ok();
    assert_eq!(sha256_file(&back), entry.devices[1].sha256);
}

/// Without DEST, the last path is a source if a target names its device.
#[test]
fn writes_each_source_to_its_own_target() {
    let dir = tempdir();
    images::every_mask().write_raw(&dir.path().join("x.raw"));
    Image::hole("y", 70_000).with(65_000, images::noise(1, 5000)).write_raw(&dir.path().join("y.raw"));
    let line = ["convert", "a=x.raw", "b=y.raw", "--target", "a=a.out", "--target", "b=b.out"];
    imgtool(line).within(dir.path()).ok();
    for (source, target) in [("x.raw", "a.out"), ("y.raw", "b.out")] {
        assert_eq!(sha256_file(&dir.path().join(source)), sha256_file(&dir.path().join(target)));
    }
}

#[test]
fn verify_does_not_change_the_output() {
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    Image::hole("x", 9 << 20).with(70_000, images::prose(1, 3 << 20)).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let (plain, verified) = (dir.path().join("plain"), dir.path().join("verified"));
        imgtool(["convert", "--force", text(&raw), "--to", format, text(&plain)]).ok();
        imgtool(["convert", "--force", "--verify", text(&raw), "--to", format, text(&verified)]).ok();
        assert_same_rounded(&plain, &verified, 1, format);
    }
    assert_eq!(names(dir.path()), ["plain", "verified", "x.raw"]);
}
