//! Images of other programs read by the driver, and its images read by other programs.

use std::path::Path;

use imgtool_testing::conformance::{self, Image};
use imgtool_testing::oracles::{dissect_disks, qemu_img, run};
use imgtool_testing::{require, sha256_file, text};

use crate::support::{GIB, MIB, beyond_four_gib, check, content, make, open, small};

/// Options of our images that QEMU reads: it supports blocks of 1 MiB only.
const OURS: [&[(&str, &str)]; 2] = [&[], &[("static", "on")]];

fn assert_image(path: &Path, image: &Image) {
    let source = open(path).unwrap_or_else(|e| panic!("{e:#}"));
    conformance::assert_content(&source, image, 512);
}

#[test]
fn reads_qemu_images() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let (raw, vdi) = (directory.path().join("x.raw"), directory.path().join("x.vdi"));
    for (image, variants) in
        [(small(), &["static=off", "static=on"][..]), (beyond_four_gib(), &["static=off"])]
    {
        image.write_raw(&raw);
        for variant in variants {
            qemu_img(&["convert", "-f", "raw", "-O", "vdi", "-o", variant, text(&raw), text(&vdi)]);
            assert_image(&vdi, &image);
            let report = check(&vdi);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{variant}: {:?}", report.findings);
        }
    }
}

#[test]
fn qemu_reads_ours() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    for image in [small(), beyond_four_gib()] {
        image.write_raw(&raw);
        let few = if image.devices[0].0.size > GIB { 1 } else { OURS.len() };
        for pairs in &OURS[..few] {
            let path = make(&image, pairs, directory.path());
            qemu_img(&["check", "-f", "vdi", text(&path)]);
            qemu_img(&["compare", "-f", "vdi", "-F", "raw", text(&path), text(&raw)]);
            let info = qemu_img(&["info", "--output=json", text(&path)]);
            assert!(info.contains("\"format\": \"vdi\""), "{info}");
            assert!(info.contains(&format!("\"virtual-size\": {}", image.devices[0].0.size)), "{info}");
        }
    }
}

#[test]
fn qemu_writes_into_ours() {
    require!("qemu-img", "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let path = make(&small(), &[], directory.path());
    run("qemu-io", &["-f", "vdi", "-c", "write -P 7 9M 1M", "-c", "write -P 8 0 512", text(&path)]);
    qemu_img(&["check", "-f", "vdi", text(&path)]);
    let bytes = content(&open(&path).unwrap()).unwrap();
    for (at, expected) in [(9 * MIB, 7), (10 * MIB - 1, 7), (0, 8), (20 * MIB - 1, 1), (11 * MIB, 0)] {
        assert_eq!(bytes[at as usize], expected, "at {at}");
    }
}

#[test]
fn dissect_reads_ours() {
    require!("dissect");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    let digest = sha256_file(&raw);
    for pairs in OURS {
        let path = make(&small(), pairs, directory.path());
        let [seen] = &dissect_disks("vdi", &[&path])[..] else { panic!("one disk") };
        assert_eq!((seen.size, &seen.sha256), (20 * MIB, &digest), "{pairs:?}");
    }
}
