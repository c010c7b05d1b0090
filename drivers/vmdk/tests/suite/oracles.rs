//! Images of other programs read by the driver, and its images read by other programs.

use std::path::Path;

use imgtool_testing::conformance::{self, Image};
use imgtool_testing::oracles::{
    VmdkMount, dissect_disks, qemu_check, qemu_compare, qemu_img, qemu_make, seven_zip,
};
use imgtool_testing::{require, sha256, sha256_file, text};

use crate::support::{GIB, MIB, SUBFORMATS, assert_clean, beyond_four_gib, make, open_plainly, small};

fn assert_image(path: &Path, image: &Image) {
    let source = open_plainly(path).unwrap_or_else(|e| panic!("{e:#}"));
    conformance::assert_content(&source, image, 512);
}

#[test]
fn reads_qemu_images() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let (raw, vmdk) = (directory.path().join("x.raw"), directory.path().join("x.vmdk"));
    for image in [small(), beyond_four_gib()] {
        image.write_raw(&raw);
        for subformat in SUBFORMATS.iter().filter(|subformat| **subformat != "vmfs") {
            for options in ["", ",zeroed_grain=on,compat6=on"] {
                if subformat.contains("Flat") && !options.is_empty() {
                    continue;
                }
                qemu_make(&raw, "vmdk", &format!("subformat={subformat}{options}"), &vmdk);
                assert_image(&vmdk, &image);
                assert_clean(&vmdk);
            }
        }
    }
}

#[test]
fn reads_qemu_snapshots() {
    require!("qemu-img", "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    let path = |name: &str| directory.path().join(name);
    qemu_make(&raw, "vmdk", "", &path("base.vmdk"));
    qemu_img(&[
        "create",
        "-f",
        "vmdk",
        "-F",
        "vmdk",
        "-b",
        text(&path("base.vmdk")),
        text(&path("top.vmdk")),
    ]);
    let top = path("top.vmdk");
    imgtool_testing::oracles::run("qemu-io", &["-f", "vmdk", "-c", "write -P 7 1000k 200k", text(&top)]);
    qemu_img(&["convert", "-f", "vmdk", "-O", "raw", text(&path("top.vmdk")), text(&path("merged.raw"))]);
    let source = crate::support::open(&path("top.vmdk")).unwrap_or_else(|e| panic!("{e:#}"));
    let content = crate::support::content(&source).unwrap();
    assert_eq!(sha256(&content), sha256_file(&path("merged.raw")));
}

#[test]
fn qemu_reads_ours() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    for image in [small(), beyond_four_gib()] {
        image.write_raw(&raw);
        for subformat in SUBFORMATS {
            let path = make(&image, &[("subformat", subformat)], directory.path());
            qemu_compare(&path, "vmdk", &raw, "raw");
            if !subformat.contains("Flat") && subformat != "vmfs" {
                qemu_check(&path, "vmdk");
            }
            assert_image(&path, &image);
            assert_clean(&path);
        }
    }
}

#[test]
fn dissect_reads_ours() {
    require!("dissect");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    for subformat in SUBFORMATS {
        let path = make(&small(), &[("subformat", subformat)], directory.path());
        let [seen] = &dissect_disks("vmdk", &[&path])[..] else { panic!("one disk") };
        assert_eq!((seen.size, &seen.sha256), (20 * MIB, &sha256_file(&raw)), "{subformat}");
    }
}

#[test]
fn seven_zip_reads_ours() {
    require!("7zz");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    for subformat in SUBFORMATS {
        let path = make(&small(), &[("subformat", subformat)], directory.path());
        assert_eq!(sha256(&seven_zip(&path, "vmdk")), sha256_file(&raw), "{subformat}");
    }
}

#[test]
fn libvmdk_reads_ours() {
    require!("vmdkmount", "fusermount");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    small().write_raw(&raw);
    // vmdkmount knows no images of the type monolithicFlat, whose extents are those of vmfs.
    for subformat in SUBFORMATS.into_iter().filter(|subformat| *subformat != "monolithicFlat") {
        let path = make(&small(), &[("subformat", subformat)], directory.path());
        let Some(mount) = VmdkMount::of(&path, &directory.path().join(format!("mount-{subformat}"))) else {
            return;
        };
        assert_eq!(sha256_file(&mount.raw()), sha256_file(&raw), "{subformat}: libvmdk reads other content");
    }
}

#[test]
fn qemu_names_the_same_facts() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let path = make(&small(), &[("subformat", "monolithicSparse")], directory.path());
    let theirs = imgtool_testing::oracles::qemu_info(&path, "vmdk");
    let theirs = &theirs["format-specific"]["data"];
    let source = open_plainly(&path).unwrap();
    for key in ["cid", "parent-cid", "create-type"] {
        let ours = source.info().facts.iter().find(|fact| fact.key == key).map(|fact| &fact.value);
        assert_eq!(ours, Some(&theirs[key]), "{key}");
    }
    assert_eq!(source.info().cluster_size, Some(65_536));
    assert!(source.info().devices[0].size < GIB);
}
