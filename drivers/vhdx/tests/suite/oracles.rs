//! Files of other programs read by the driver, and its files read by other programs.

use std::fs::File;
use std::path::Path;

use imgtool_core::CreateOptions;
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_testing::oracles::{VhdiMount, dissect_compare_vhdx, qemu_img, run, vhdi_info};
use imgtool_testing::{require, text};
use imgtool_vhdx::VhdxDriver;

use crate::support::{GIB, MIB, check_file, disk_of, open_file, options};

/// Returns an image with mixed content that reaches past the first chunk of 1 MiB blocks (4 GiB), and with a
/// ragged size.
fn beyond_four_gib() -> Image {
    let content = Content::zero()
        .with(0..300_000, Fill::Random)
        .with(5 * MIB + 512..5 * MIB + 1024, Fill::Byte(9))
        .with(4 * GIB - 70_000..4 * GIB + 70_000, Fill::Random)
        .with(4 * GIB + 9 * MIB..4 * GIB + 9 * MIB + 4096, Fill::Text)
        .with(4 * GIB + 99 * MIB..4 * GIB + 100 * MIB, Fill::Random);
    Image::disk("beyond 4 GiB", 4 * GIB + 100 * MIB + 512, content)
}

fn small() -> Image {
    let content = Content::zero()
        .with(0..1000, Fill::Random)
        .with(MIB..3 * MIB, Fill::Checker(65_536))
        .with(20 * MIB - 512..20 * MIB, Fill::Byte(1));
    Image::disk("20 MiB", 20 * MIB, content)
}

/// Compares a file's content and extents with the image.
fn assert_image(path: &Path, image: &Image) {
    let source = open_file(path).unwrap_or_else(|e| panic!("{e}"));
    conformance::assert_content(&source, image, 512);
}

#[test]
fn reads_qemu_files() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let (raw, vhdx) = (directory.path().join("x.raw"), directory.path().join("x.vhdx"));
    let cases: [(&Image, &[&str]); 2] = [
        (
            &small(),
            &[
                "subformat=dynamic",
                "subformat=fixed",
                "subformat=dynamic,block_size=1M",
                "subformat=fixed,block_size=2M,log_size=3M",
                "subformat=dynamic,block_size=256M",
                "subformat=dynamic,block_size=4M,block_state_zero=off,log_size=16M",
            ],
        ),
        (&beyond_four_gib(), &["block_size=1M", "block_size=1M,block_state_zero=off"]),
    ];
    for (image, variants) in cases {
        image.write_raw(&raw);
        for variant in variants {
            qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-o", variant, text(&raw), text(&vhdx)]);
            assert_image(&vhdx, image);
            let report = check_file(&vhdx);
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{variant}: {:?}", report.findings);
            std::fs::remove_file(&vhdx).unwrap();
        }
    }
}

/// Options of our files; true if QEMU supports them.
const OURS: [(&[(&str, &str)], bool); 7] = [
    (&[], true),
    (&[("block_size", "1M")], true),
    (&[("block_size", "256M")], true),
    (&[("subformat", "fixed")], true),
    (&[("subformat", "fixed"), ("block_size", "1M"), ("log_size", "5M")], true),
    (&[("physical_sector_size", "512"), ("block_size", "2M")], true),
    (&[("logical_sector_size", "4096"), ("block_size", "1M")], false),
];

fn make(image: &Image, options: &CreateOptions, directory: &Path) -> std::path::PathBuf {
    let path = directory.join("ours.vhdx");
    let _ = std::fs::remove_file(&path);
    conformance::write(&VhdxDriver, options, image, &conformance::new_file(&path), 2).unwrap();
    path
}

#[test]
fn qemu_reads_ours() {
    require!("qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    for image in [small(), beyond_four_gib()] {
        image.write_raw(&raw);
        // QEMU compares gigabytes slowly: two variants of the large disk, all of the small one.
        let few = if image.devices[0].0.size > GIB { 2 } else { OURS.len() };
        for (pairs, _) in OURS.iter().take(few).filter(|(_, qemu_supports)| *qemu_supports) {
            let path = make(&image, &options(pairs), directory.path());
            qemu_img(&["check", "-f", "vhdx", text(&path)]);
            qemu_img(&["compare", "-f", "vhdx", "-F", "raw", text(&path), text(&raw)]);
            let info = qemu_img(&["info", "--output=json", text(&path)]);
            assert!(info.contains("\"format\": \"vhdx\""), "{info}");
            assert!(info.contains(&format!("\"virtual-size\": {}", image.devices[0].0.size)), "{info}");
        }
    }
}

#[test]
fn qemu_writes_into_ours() {
    require!("qemu-img", "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let path = make(&small(), &options(&[("block_size", "1M")]), directory.path());
    run("qemu-io", &["-f", "vhdx", "-c", "write -P 7 9M 1M", "-c", "write -P 8 0 512", text(&path)]);
    qemu_img(&["check", "-f", "vhdx", text(&path)]);
    let disk = disk_of(&open_file(&path).unwrap());
    for (at, expected) in [(9 * MIB, 7), (10 * MIB - 1, 7), (0, 8), (20 * MIB - 1, 1), (11 * MIB, 0)] {
        let mut byte = [0xee];
        disk.read_at(&mut byte, at).unwrap();
        assert_eq!(byte[0], expected, "at {at}");
    }
}

#[test]
fn dissect_reads_ours() {
    require!("dissect");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("x.raw");
    for image in [small(), beyond_four_gib()] {
        image.write_raw(&raw);
        for (pairs, _) in OURS {
            dissect_compare_vhdx(&make(&image, &options(pairs), directory.path()), &raw);
        }
    }
}

#[test]
fn libvhdi_identifies_ours() {
    require!("vhdiinfo");
    let directory = tempfile::tempdir().unwrap();
    for (pairs, kind) in [(&[][..], "Dynamic"), (&[("subformat", "fixed")][..], "Fixed")] {
        let path = make(&small(), &options(pairs), directory.path());
        let info = vhdi_info(&path);
        assert!(info.contains("VHDX"), "{info}");
        assert!(info.contains(kind), "{info}");
        assert!(info.contains(&format!("({} bytes)", 20 * MIB)), "{info}");
    }
}

#[test]
fn libvhdi_reads_ours() {
    require!("vhdimount", "fusermount");
    let directory = tempfile::tempdir().unwrap();
    let image = small();
    let raw = directory.path().join("x.raw");
    image.write_raw(&raw);
    for (number, (pairs, _)) in OURS.iter().enumerate() {
        let path = make(&image, &options(pairs), directory.path());
        let Some(mount) = VhdiMount::of(&path, &directory.path().join(format!("mount{number}"))) else {
            return;
        };
        let found = std::fs::read(mount.raw()).unwrap();
        assert!(found == std::fs::read(&raw).unwrap(), "{pairs:?}: libvhdi reads other content");
    }
}

#[test]
fn reading_never_changes_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = make(&small(), &CreateOptions::default(), directory.path());
    let mut permissions = std::fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).unwrap();
    let before =
        (std::fs::read(&path).unwrap(), File::open(&path).unwrap().metadata().unwrap().modified().unwrap());
    assert_image(&path, &small());
    let after =
        (std::fs::read(&path).unwrap(), File::open(&path).unwrap().metadata().unwrap().modified().unwrap());
    assert!(before == after);
}
