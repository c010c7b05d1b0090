//! Tests of the QED driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use imgtool_core::{Driver, ErrorKind, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_qed::QedDriver;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{
    content, expect_refusals, faults, mixed_disk, open, qemu_content, qemu_image, read, refusal, salvage,
};
use imgtool_testing::oracles::run;
use imgtool_testing::{require, tempdir, text};

const CLUSTER: usize = 4096;
/// File offsets of both tables of the images that the tests build.
const L1: usize = CLUSTER;
const L2: usize = 3 * CLUSTER;

/// Builds an image with clusters of 4 KiB and tables of two clusters. Each byte of `clusters` fills a cluster; 0 leaves it out,
/// 255 makes it explicit zeros.
fn build(clusters: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 5 * CLUSTER];
    image[..4].copy_from_slice(b"QED\0");
    for (at, value) in [(4, CLUSTER as u32), (8, 2), (12, 1)] {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    put(&mut image, 40, L1);
    put(&mut image, 48, clusters.len() * CLUSTER);
    put(&mut image, L1, L2);
    for (index, fill) in clusters.iter().enumerate() {
        let end = image.len();
        match fill {
            0 => {}
            255 => put(&mut image, L2 + 8 * index, 1),
            fill => {
                put(&mut image, L2 + 8 * index, end);
                image.resize(end + CLUSTER, *fill);
            }
        }
    }
    image
}

fn put(image: &mut [u8], at: usize, value: usize) {
    image[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
}

fn filled(clusters: &[u8]) -> Vec<u8> {
    clusters.iter().flat_map(|fill| [if *fill == 255 { 0 } else { *fill }; CLUSTER]).collect()
}

/// Opens an image file, and allows the files of its directory.
fn open_chain(path: &Path) -> Result<Arc<dyn ImageSource>> {
    let mut registry = Registry::new();
    imgtool_qed::register(&mut registry);
    imgtool_raw::register(&mut registry);
    let policy = ExternalPolicy { chain: true, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(registry, policy).externals();
    QedDriver.open(conformance::input(path)?, &OpenOptions { externals, ..OpenOptions::default() })
}

#[test]
fn obeys_the_laws() {
    let clusters = [1, 0, 3, 255, 255, 5];
    let disk = || Image::from_bytes("built", &filled(&clusters));
    let image = build(&clusters);
    // QEMU refuses tables of one cluster, although its specification allows them.
    let mut small_tables = image.clone();
    small_tables[8] = 1;
    conformance::read_only(&QedDriver, &[(&image, disk()), (&small_tables, disk())]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = build(&[1, 0, 3, 255]);
    let places = vec![0..64, L1..L1 + 16, L2..L2 + 32];
    let hostile = Hostile { image: &image, places, repair: &|_: &mut [u8]| {} };
    conformance::hostile_bytes_do_not_panic(&QedDriver, &hostile);
}

#[test]
fn reads_images_of_qemu() {
    require!("qemu-img");
    let disk = mixed_disk(5 << 20);
    for options in ["", "cluster_size=4096,table_size=2", "cluster_size=1M,table_size=16"] {
        let image = qemu_image(&disk, "qed", options);
        assert!(read(&QedDriver, &image).unwrap() == disk, "{options}");
        assert_eq!(faults(&QedDriver, &image), (0, 0), "{options}");
    }
}

#[test]
fn reads_what_qemu_io_wrote() {
    require!("qemu-img", "qemu-io");
    let directory = tempdir();
    let path = directory.path().join("x.qed");
    // Three tables of the second level.
    run(
        "qemu-img",
        &["create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", text(&path), "9M"],
    );
    for write in ["write -P 7 4M 100k", "write -P 8 512 512", "write -P 9 2000k 170k", "write -z 2048k 64k"] {
        run("qemu-io", &["-f", "qed", "-c", write, text(&path)]);
    }
    let image = std::fs::read(&path).unwrap();
    let ours = read(&QedDriver, &image).unwrap();
    assert!(ours == qemu_content(&image, "qed"));
    assert_eq!((ours[512], ours[1024], ours[4 << 20], ours[2 << 20]), (8, 0, 7, 0));
    assert_eq!(faults(&QedDriver, &image), (0, 0));
}

#[test]
fn qemu_reads_the_built_images_alike() {
    require!("qemu-img");
    let clusters = [1, 0, 3, 255, 5];
    assert!(qemu_content(&build(&clusters), "qed") == filled(&clusters));
}

#[test]
fn reads_over_a_backing_file() {
    require!("qemu-img", "qemu-io");
    let directory = tempdir();
    let (base, top) = (directory.path().join("base"), directory.path().join("top.qed"));
    // The content looks like an image, but the child says that it is raw.
    let mut disk = mixed_disk(1 << 20);
    disk[..4].copy_from_slice(b"QED\0");
    for (format, bytes) in [("raw", disk.clone()), ("qed", qemu_image(&disk, "qed", ""))] {
        std::fs::write(&base, bytes).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qed", "-b", "base", "-F", format, text(&top), "2M"]);
        run("qemu-io", &["-f", "qed", "-c", "write -P 5 100k 1k", "-c", "write -z 128k 64k", text(&top)]);
        let mut expected = disk.clone();
        expected.resize(2 << 20, 0);
        expected[100 << 10..101 << 10].fill(5);
        expected[128 << 10..192 << 10].fill(0);
        let source = open_chain(&top).unwrap();
        assert!(content(&source).unwrap() == expected, "{format}");
        let [reference] = &source.info().references[..] else { panic!("one reference") };
        assert_eq!((reference.role, reference.name.as_str()), ("backing file", "base"));
        assert_eq!(reference.format.as_deref(), (format == "raw").then_some("raw"));
        let refused = conformance::open(&QedDriver, &top).map(|_| ()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
    }
}

#[test]
fn notes_an_image_that_was_not_closed() {
    let mut image = build(&[1]);
    assert!(open(&QedDriver, &image).unwrap().info().notes.is_empty());
    put(&mut image, 16, 2);
    assert!(open(&QedDriver, &image).unwrap().info().notes[0].contains("was not closed"));
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let (number, long) = (u32::to_le_bytes, u64::to_le_bytes);
    let image = build(&[1, 0, 3]);
    expect_refusals(
        &QedDriver,
        &image,
        &[
            (0, b"q", "signature"),
            (4, &number(2048), "clusters of 2048 bytes"),
            (4, &number(5000), "clusters of 5000 bytes"),
            (4, &number(128 << 20), "clusters of 134217728 bytes"),
            (8, &number(0), "tables of 0 clusters"),
            (8, &number(32), "tables of 32 clusters"),
            (16, &long(8), "unknown features 0x8"),
            (16, &long(1), "the backing file's name"),
            (40, &long(0), "the first table is at 0"),
            (40, &long(4097), "the first table is at 4097"),
            (40, &long(1 << 40), "the first table needs"),
            (48, &long(u64::MAX), "but the tables reach"),
            (L1, &long(1), "entry 0 of the first table is no table"),
            (L1, &long(4100), "a table is at 4100"),
            (L1, &long(1 << 40), "the table needs"),
            (L2, &long(4100), "a cluster is at 4100"),
            (L2, &long(1 << 40), "the cluster needs"),
        ],
    );
}

#[test]
fn refuses_a_small_file_that_repeats_a_table() {
    let mut image = build(&[1]);
    put(&mut image, 48, 512 * 1024 * CLUSTER);
    for entry in 0..512 {
        put(&mut image, L1 + 8 * entry, L2);
    }
    let error = refusal_of_open(&image);
    assert!(error.contains("more than 128 tables are used several times"), "{error}");
}

fn refusal_of_open(image: &[u8]) -> String {
    open(&QedDriver, image).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn check_finds_damage() {
    let mut image = build(&[1, 2, 3, 0, 5]);
    assert_eq!(faults(&QedDriver, &image), (0, 0));
    image.copy_within(L2..L2 + 8, L2 + 8);
    put(&mut image, L2 + 16, 77);
    put(&mut image, L2 + 24, 1 << 40);
    assert_eq!(faults(&QedDriver, &image), (3, 0));
    put(&mut image, L1, L1);
    assert_eq!(faults(&QedDriver, &image), (1, 0));
    assert_eq!(faults(&QedDriver, &image[..100]), (1, 0));
}

#[test]
fn salvage_restores_the_other_clusters() {
    let mut image = build(&[1, 2, 3]);
    image.truncate(image.len() - 100);
    assert_eq!(refusal(&QedDriver, &image).guest_range(), Some(2 * 4096..3 * 4096));
    let (restored, lost) = salvage(&QedDriver, &image);
    assert!(restored == filled(&[1, 2, 0]));
    assert_eq!(lost, [(2 * 4096, 3 * 4096)]);
}
