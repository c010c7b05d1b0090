//! Tests of the Bochs driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

use imgtool_bochs::BochsDriver;
use imgtool_core::ErrorKind;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{
    expect_refusals, faults, mixed_disk, open, qemu_content, read, refusal, salvage,
};
use imgtool_testing::oracles::run_in;
use imgtool_testing::{require, tempdir};

/// Size of an extent of the images that the tests build: 20 sectors, with a bitmap of 3 bytes.
const EXTENT: usize = 20 * 512;
const CATALOG: usize = 512;

/// Builds an image of version 1 or 2. Each extent is a bitmap of 20 sectors; 0 leaves the extent out. The
/// sector `index` is filled with the number `index + 1`, also if its bit is clear.
fn build(version: u32, extents: &[u32]) -> Vec<u8> {
    let mut image = vec![0; 512];
    for (at, word) in [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing")] {
        image[at..at + word.len()].copy_from_slice(word.as_bytes());
    }
    let entries = extents.len() as u32;
    for (at, value) in [(64, version << 16), (68, 512), (72, entries), (76, 3), (80, EXTENT as u32)] {
        put(&mut image, at, value);
    }
    put(&mut image, if version == 1 { 84 } else { 88 }, (extents.len() * EXTENT) as u32);
    image.resize(512 + 4 * extents.len(), 0xff);
    let stored = extents.iter().filter(|bits| **bits != 0).count() as u32;
    for (position, (index, bits)) in extents.iter().enumerate().filter(|(_, bits)| **bits != 0).enumerate() {
        // Stored in reverse order.
        put(&mut image, CATALOG + 4 * index, stored - 1 - position as u32);
        let at = 512 + 4 * extents.len() + (stored as usize - 1 - position) * (512 + EXTENT);
        image.resize(image.len().max(at + 512 + EXTENT), 0);
        put(&mut image, at, *bits);
        for sector in 0..20 {
            let from = at + 512 + 512 * sector;
            image[from..from + 512].fill((20 * index + sector + 1) as u8);
        }
    }
    image
}

fn put(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn filled(extents: &[u32]) -> Vec<u8> {
    let mut disk = Vec::new();
    for (index, bits) in extents.iter().enumerate() {
        for sector in 0..20 {
            let fill = if bits >> sector & 1 == 1 { (20 * index + sector + 1) as u8 } else { 0 };
            disk.extend([fill; 512]);
        }
    }
    disk
}

const EXTENTS: [u32; 6] = [0xfffff, 0, 0x00001, 0x5a5f0, 0, 0x80100];

#[test]
fn obeys_the_laws() {
    let disk = || Image::from_bytes("built", &filled(&EXTENTS));
    conformance::read_only(&BochsDriver, &[(&build(1, &EXTENTS), disk()), (&build(2, &EXTENTS), disk())]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = build(2, &EXTENTS);
    let hostile = Hostile { image: &image, places: vec![64..96, 512..544], repair: &|_: &mut [u8]| {} };
    conformance::hostile_bytes_do_not_panic(&BochsDriver, &hostile);
}

#[test]
fn qemu_reads_the_built_images_alike() {
    require!("qemu-img");
    // QEMU reads only extents of a power of two: here 16 sectors.
    for version in [1, 2] {
        let mut image = build(version, &EXTENTS);
        put(&mut image, 80, 16 * 512);
        put(&mut image, if version == 1 { 84 } else { 88 }, 6 * 16 * 512);
        image.resize(512 + 24 + 6 * (512 + EXTENT), 0);
        let ours = read(&BochsDriver, &image).unwrap();
        assert!(ours == qemu_content(&image, "bochs"), "version {version}");
        assert!(ours.iter().any(|byte| *byte != 0));
    }
}

#[test]
fn reads_images_of_bximage() {
    require!("bximage", "qemu-img");
    let directory = tempdir();
    // A flat image of ten cylinders with 16 heads of 63 sectors, the geometry that bximage requires.
    let disk = mixed_disk(10 * 16 * 63 * 512);
    std::fs::write(directory.path().join("flat.img"), &disk).unwrap();
    let convert = ["-q", "-func=convert", "-imgmode=growing", "flat.img", "growing.img"];
    run_in("bximage", directory.path(), &convert);
    let image = std::fs::read(directory.path().join("growing.img")).unwrap();
    assert!(qemu_content(&image, "bochs") == disk, "bximage stores what it read");
    assert!(read(&BochsDriver, &image).unwrap() == disk);
    assert_eq!(faults(&BochsDriver, &image), (0, 0));
    assert!(image.len() < disk.len());
}

#[test]
fn refuses_redo_logs_of_other_images_by_name() {
    for subtype in ["Undoable", "Volatile"] {
        let mut image = build(2, &[1]);
        image[48..56].copy_from_slice(subtype.as_bytes());
        let error = refusal(&BochsDriver, &image);
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(subtype), "{error}");
    }
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let number = u32::to_le_bytes;
    expect_refusals(
        &BochsDriver,
        &build(2, &[0xfffff, 1]),
        &[
            (0, b"b", "signature"),
            (32, b"Vmdk", "unknown type 'Vmdklog'"),
            (64, &number(0x0003_0000), "unknown version 0x30000"),
            (68, &number(100), "header has 100 bytes"),
            (68, &number(1 << 30), "the table needs"),
            (72, &number(1), "catalog has 1 entries"),
            (76, &number(2), "bitmap of an extent has 2 bytes"),
            (76, &number(u32::MAX), "bitmap of an extent"),
            (80, &number(0), "extents of 0 bytes"),
            (80, &number(1000), "extents of 1000 bytes"),
            (80, &number(1 << 30), "extents of 1073741824 bytes"),
            (92, &number(u32::MAX), "but the catalog has 2 entries"),
            (CATALOG, &number(1000), "the extent needs"),
        ],
    );
}

#[test]
fn refuses_a_small_file_that_repeats_an_extent() {
    let mut image = build(2, &[0x55555; 3000]);
    image.truncate(512 + 4 * 3000 + 512 + EXTENT);
    image[CATALOG..CATALOG + 4 * 3000].fill(0);
    let error = open(&BochsDriver, &image).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("more than 2048 tables are used several times"), "{error}");
}

#[test]
fn check_finds_damage() {
    let mut image = build(2, &EXTENTS);
    assert_eq!(faults(&BochsDriver, &image), (0, 0));
    image.copy_within(CATALOG..CATALOG + 4, CATALOG + 4);
    put(&mut image, CATALOG + 16, 1000);
    assert_eq!(faults(&BochsDriver, &image), (2, 0));
    let mut image = build(2, &[1, 1, 1]);
    put(&mut image, 88, 2 * EXTENT as u32);
    assert_eq!(faults(&BochsDriver, &image), (0, 1));
}

#[test]
fn salvage_restores_the_other_extents() {
    let mut image = build(2, &[1, 0xfffff]);
    image.truncate(image.len() - 100);
    // The last extent of the file is the first of the disk.
    let (restored, lost) = salvage(&BochsDriver, &image);
    let mut expected = filled(&[1, 0xfffff]);
    expected[..EXTENT].fill(0);
    assert!(restored == expected);
    assert_eq!(lost, [(0, EXTENT as u64)]);
    assert!(open(&BochsDriver, &image).unwrap().info().notes.is_empty());
}
