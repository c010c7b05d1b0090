//! Images of other programs read by the driver, and its images read by other programs.

use std::path::Path;

use imgtool_testing::conformance::{self, Image};
use imgtool_testing::oracles::{VhdiMount, dissect_disks, qemu_img, vhdi_info};
use imgtool_testing::{require, sha256_file, text};

use crate::support::{GIB, MIB, beyond_four_gib, check, make, open, small};

/// Options of our images.
const OURS: [&[(&str, &str)]; 3] =
    [&[], &[("subformat", "fixed"), ("align", "512")], &[("subformat", "fixed")]];

fn assert_image(path: &Path, image: &Image) {
    let source = open(path).unwrap_or_else(|e| panic!("{e:#}"));
    conformance::assert_content(&source, image, 512);
}

#[test]
fn reads_qemu_images() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let (raw, vhd) = (directory.path().join("x.raw"), directory.path().join("x.vhd"));
    let dynamic = "subformat=dynamic,force_size=on";
    for (image, variants) in
        [(small(), &[dynamic, "subformat=fixed,force_size=on"][..]), (beyond_four_gib(), &[dynamic])]
    {
        image.write_raw(&raw);
        for variant in variants {
            qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", variant, text(&raw), text(&vhd)]);
            assert_image(&vhd, &image);
            let report = check(&vhd);
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{variant}: {:?}", report.findings);
        }
    }
}

#[test]
fn reads_images_that_qemu_rounded_to_a_geometry() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let (raw, vhd) = (directory.path().join("x.raw"), directory.path().join("x.vhd"));
    small().write_raw(&raw);
    qemu_img(&["convert", "-f", "raw", "-O", "vpc", text(&raw), text(&vhd)]);
    let source = open(&vhd).unwrap();
    let info = qemu_img(&["info", "--output=json", "-f", "vpc", text(&vhd)]);
    assert!(info.contains(&format!("\"virtual-size\": {}", source.info().devices[0].size)), "{info}");
    assert!(source.info().notes.is_empty(), "{:?}", source.info().notes);
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
            qemu_img(&["compare", "-f", "vpc", "-F", "raw", text(&path), text(&raw)]);
            let info = qemu_img(&["info", "--output=json", "-f", "vpc", text(&path)]);
            let size = image.devices[0].0.size.next_multiple_of(512);
            assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
        }
    }
}

#[test]
fn dissect_reads_ours() {
    require!("dissect");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    for pairs in OURS {
        let path = make(&small(), pairs, directory.path());
        let [seen] = &dissect_disks("vhd", &[&path])[..] else { panic!("one disk") };
        assert_eq!((seen.size, &seen.sha256), (20 * MIB, &sha256_file(&raw)), "{pairs:?}");
    }
}

#[test]
fn libvhdi_identifies_and_reads_ours() {
    require!("vhdiinfo", "vhdimount", "fusermount");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    for (number, (pairs, kind)) in OURS.iter().zip(["Dynamic", "Fixed", "Fixed"]).enumerate() {
        let path = make(&small(), pairs, directory.path());
        let info = vhdi_info(&path);
        assert!(info.contains(kind) && info.contains(&format!("({} bytes)", 20 * MIB)), "{info}");
        // Without FUSE, vhdiinfo alone sees the other variants.
        let Some(mount) = VhdiMount::of(&path, &directory.path().join(format!("mount{number}"))) else {
            continue;
        };
        let found = std::fs::read(mount.raw()).unwrap();
        assert!(found == std::fs::read(&raw).unwrap(), "{pairs:?}: libvhdi reads other content");
    }
}

#[test]
fn fixed_images_meet_the_rules_of_azure() {
    let directory = tempfile::tempdir().unwrap();
    let path = make(&beyond_four_gib(), &[("subformat", "fixed")], directory.path());
    let len = std::fs::metadata(&path).unwrap().len();
    assert_eq!((len - 512) % MIB, 0);
    let source = open(&path).unwrap();
    assert_eq!(source.info().devices[0].size, len - 512);
}
