//! The commands `compare`, `checksum`, `check`, `measure` and `create`, end to end.

use std::path::{Path, PathBuf};

use imgtool_testing::manifest::archives;
use imgtool_testing::{fixture, images, names, oracles, require, sha256_file, tempdir, text};

use crate::support::imgtool;

const FORMATS: [&str; 4] = ["raw", "qcow2", "vhdx", "vma"];

/// Writes one disk in every format and returns the paths, raw first.
fn in_every_format(directory: &Path) -> Vec<PathBuf> {
    let raw = directory.join("disk.raw");
    images::every_mask().write_raw(&raw);
    let mut made = vec![raw.clone()];
    for format in &FORMATS[1..] {
        let path = directory.join(format!("disk.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&path)]).ok();
        made.push(path);
    }
    made
}

#[test]
fn compare_reports_equal_content_across_formats() {
    let dir = tempdir();
    let made = in_every_format(dir.path());
    for a in &made {
        for b in &made {
            imgtool(["compare", text(a), text(b)]).ok();
        }
    }
}

#[test]
fn compare_finds_one_flipped_bit() {
    let dir = tempdir();
    let made = in_every_format(dir.path());
    let mut bytes = std::fs::read(&made[0]).unwrap();
    let place = bytes.len() - 70_000;
    bytes[place] ^= 1;
    let other = dir.path().join("other.raw");
    std::fs::write(&other, bytes).unwrap();
    for path in &made {
        let run = imgtool(["compare", text(path), text(&other)]).go().exits(1);
        let said = run.text() + &run.stderr;
        assert!(said.contains(&place.to_string()), "not at {place}: {said}");
    }
    imgtool(["compare", text(&other), "/nonexistent"]).go().exits(2);
}

#[test]
fn checksum_is_the_digest_of_the_guest_content() {
    let dir = tempdir();
    let made = in_every_format(dir.path());
    let digest = sha256_file(&made[0]);
    for path in &made {
        let run = imgtool(["checksum", text(path)]).ok();
        assert!(run.text().contains(&digest), "{}: {}", path.display(), run.text());
    }
    for entry in archives() {
        let run = imgtool(["checksum", "--output", "json", text(&fixture(&entry.file))]).ok();
        let said = run.json().to_string();
        for device in &entry.devices {
            assert!(said.contains(&device.sha256), "{} {}: {said}", entry.file, device.name);
        }
    }
}

#[test]
fn check_passes_intact_images() {
    let dir = tempdir();
    for path in in_every_format(dir.path()).iter().skip(1) {
        imgtool(["check", text(path)]).ok();
    }
    for entry in archives() {
        imgtool(["check", text(&fixture(&entry.file))]).ok();
    }
}

#[test]
fn check_distinguishes_corrupt_leaking_and_unreadable() {
    require!("qemu-img");
    let dir = tempdir();
    let made = in_every_format(dir.path());
    // A cluster appended to the file has a refcount, but nothing refers to it.
    let mut bytes = std::fs::read(&made[1]).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let refcounts = word(&bytes, word(&bytes, 48));
    let cluster = bytes.len().div_ceil(64 << 10);
    bytes.resize((cluster + 1) * (64 << 10), 0);
    bytes[refcounts + 2 * cluster + 1] = 1;
    let leaking = dir.path().join("leak.qcow2");
    std::fs::write(&leaking, bytes).unwrap();
    imgtool(["check", text(&leaking)]).go().exits(3);
    // The first L1 entry points beyond the file.
    let mut bytes = std::fs::read(&made[1]).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes[l1 + 3] ^= 1;
    let corrupt = dir.path().join("corrupt.qcow2");
    std::fs::write(&corrupt, bytes).unwrap();
    imgtool(["check", text(&corrupt)]).go().exits(2);
    imgtool(["check", "/nonexistent"]).go().exits(1);
}

#[test]
fn measure_predicts_the_output_length() {
    let dir = tempdir();
    let made = in_every_format(dir.path());
    for format in ["raw", "qcow2", "vma"] {
        let info = imgtool(["measure", "-O", format, "--output", "json", text(&made[0])]).ok().json();
        let required = info["required"].as_u64().unwrap();
        let path = dir.path().join(format!("disk.{format}"));
        let len = std::fs::metadata(&path).unwrap().len();
        assert_eq!(required, len, "{format}");
    }
}

#[test]
fn created_images_are_empty_and_valid() {
    require!("qemu-img");
    let dir = tempdir();
    for format in ["raw", "qcow2", "vhdx"] {
        let path = dir.path().join(format!("new.{format}"));
        imgtool(["create", "-f", format, text(&path), "3G"]).ok();
        assert_eq!(oracles::qemu_info(&path, format)["virtual-size"], 3u64 << 30);
        if format != "raw" {
            oracles::qemu_check(&path, format);
        }
        let before = sha256_file(&path);
        imgtool(["create", "-f", format, text(&path), "1M"]).go().exits(1);
        assert_eq!(sha256_file(&path), before);
    }
    assert_eq!(names(dir.path()), ["new.qcow2", "new.raw", "new.vhdx"]);
}
