//! Tests of the driver for version 1 of QCOW: conformance laws, independent programs, and files built byte by
//! byte.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use imgtool_core::{Disk, Driver, ErrorKind, ImageSource, OpenOptions, Registry, Result, Secret};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_qcow1::Qcow1Driver;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{
    check, content, expect_refusals, faults, mixed_disk, open, qemu_content, qemu_image, read, refusal,
    salvage,
};
use imgtool_testing::oracles::{run, try_run};
use imgtool_testing::{memory, require, tempdir, text};

const CLUSTER: usize = 512;
/// File offsets of both tables of the images that the tests build.
const L1: usize = 512;
const L2: usize = 1024;
const COMPRESSED: u64 = 1 << 63;

/// Builds an image with clusters of 512 bytes and tables of 64 entries. Each byte of `clusters` fills a
/// cluster; 0 leaves it out.
fn build(clusters: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1536];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
    put(&mut image, 24, (clusters.len() * CLUSTER) as u64);
    (image[32], image[33]) = (9, 6);
    put(&mut image, 40, L1 as u64);
    put(&mut image, L1, L2 as u64);
    for (index, fill) in clusters.iter().enumerate().filter(|(_, fill)| **fill != 0) {
        let end = image.len();
        put(&mut image, L2 + 8 * index, end as u64);
        image.resize(end + CLUSTER, *fill);
    }
    image
}

fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn filled(clusters: &[u8]) -> Vec<u8> {
    clusters.iter().flat_map(|fill| [*fill; CLUSTER]).collect()
}

/// Opens an image file, and allows the files of its directory.
fn open_chain(path: &Path) -> Result<Arc<dyn ImageSource>> {
    let mut registry = Registry::new();
    imgtool_qcow1::register(&mut registry);
    imgtool_raw::register(&mut registry);
    let policy = ExternalPolicy { chain: true, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(registry, policy).externals();
    Qcow1Driver.open(conformance::input(path)?, &OpenOptions { externals, ..OpenOptions::default() })
}

/// Returns an image of `disk` with compressed clusters that qemu-img makes.
fn compressed_image(disk: &[u8]) -> Vec<u8> {
    let directory = tempdir();
    let (raw, image) = (directory.path().join("raw"), directory.path().join("image"));
    std::fs::write(&raw, disk).unwrap();
    // qemu-img 10.0 writes the whole image, and fails nevertheless.
    try_run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow", text(&raw), text(&image)]);
    let image = std::fs::read(image).unwrap();
    assert!(qemu_content(&image, "qcow") == disk);
    image
}

/// Stores the deflate stream `stored` at the end of the file as the cluster `index`.
fn compress(image: &mut Vec<u8>, index: usize, stored: &[u8]) {
    let entry = COMPRESSED | (stored.len() as u64) << (63 - 9) | image.len() as u64;
    put(image, L2 + 8 * index, entry);
    image.extend(stored);
}

#[test]
fn obeys_the_laws() {
    let disk = Image::from_bytes("built", &filled(&[1, 0, 3, 0, 5]));
    conformance::read_only(&Qcow1Driver, &[(&build(&[1, 0, 3, 0, 5]), disk)]);
}

#[test]
fn obeys_the_laws_with_compressed_clusters() {
    require!("qemu-img");
    let disk = mixed_disk(64 << 10);
    let image = compressed_image(&disk);
    conformance::read_only(&Qcow1Driver, &[(&image, Image::from_bytes("compressed", &disk))]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let mut image = build(&[1, 0, 3]);
    compress(&mut image, 1, &flate_text());
    let places = vec![0..48, L1..L1 + 16, L2..L2 + 32];
    let hostile = Hostile { image: &image, places, repair: &|_: &mut [u8]| {} };
    conformance::hostile_bytes_do_not_panic(&Qcow1Driver, &hostile);
}

#[test]
fn reads_images_of_qemu() {
    require!("qemu-img");
    let disk = mixed_disk(5 << 20);
    for (is_compressed, image) in [(false, qemu_image(&disk, "qcow", "")), (true, compressed_image(&disk))] {
        assert!(read(&Qcow1Driver, &image).unwrap() == disk, "{is_compressed}");
        assert_eq!(faults(&Qcow1Driver, &image), (0, 0), "{is_compressed}");
        let compressed = check(&Qcow1Driver, &image).compressed_clusters;
        assert_eq!(compressed.is_some(), is_compressed, "{compressed:?}");
    }
}

#[test]
fn reads_what_qemu_io_wrote() {
    require!("qemu-img", "qemu-io");
    let directory = tempdir();
    let path = directory.path().join("x.qcow");
    run("qemu-img", &["create", "-q", "-f", "qcow", text(&path), "9M"]);
    for write in ["write -P 7 4M 100k", "write -P 8 512 512", "write -P 9 2000k 170k"] {
        run("qemu-io", &["-f", "qcow", "-c", write, text(&path)]);
    }
    let image = std::fs::read(&path).unwrap();
    let ours = read(&Qcow1Driver, &image).unwrap();
    assert!(ours == qemu_content(&image, "qcow"));
    assert_eq!((ours[512], ours[1024], ours[4 << 20], ours[2 << 20]), (8, 0, 7, 9));
    assert_eq!(faults(&Qcow1Driver, &image), (0, 0));
}

#[test]
fn qemu_reads_the_built_images_alike() {
    require!("qemu-img");
    let mut image = build(&[1, 0, 3, 0, 5]);
    // The stream continues after the end of the cluster: the reader stops there.
    compress(&mut image, 3, &flate_text());
    image.resize(image.len().next_multiple_of(512), 0);
    assert_eq!(read(&Qcow1Driver, &image).unwrap(), qemu_content(&image, "qcow"));
    assert_eq!(read(&Qcow1Driver, &image).unwrap()[3 * CLUSTER..4 * CLUSTER], [b'a'; CLUSTER]);
}

/// A deflate stream of 518 letters, more than a cluster: a literal, two copies of 258 bytes, another literal.
fn flate_text() -> Vec<u8> {
    // Fixed codes, least significant bit first: block header 3 bits; 'a' is 0x91; length 258 is 0xc5, its
    // distance 1 is 0; the end is 0.
    let mut bits: Vec<bool> = vec![true, true, false];
    let code = |bits: &mut Vec<bool>, code: u32, len: u32| {
        (0..len).rev().for_each(|bit| bits.push(code >> bit & 1 == 1));
    };
    code(&mut bits, 0x91, 8);
    for _ in 0..2 {
        code(&mut bits, 0xc5, 8);
        code(&mut bits, 0, 5);
    }
    code(&mut bits, 0x91, 8);
    code(&mut bits, 0, 7);
    bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |all, bit| all << 1 | u8::from(*bit))).collect()
}

#[test]
fn reads_over_a_backing_file() {
    require!("qemu-img", "qemu-io");
    let directory = tempdir();
    let (base, top) = (directory.path().join("base.raw"), directory.path().join("top.qcow"));
    let disk = mixed_disk(1 << 20);
    std::fs::write(&base, &disk).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow", "-b", "base.raw", "-F", "raw", text(&top), "2M"]);
    // With a backing file, QEMU makes clusters of 512 bytes.
    run("qemu-io", &["-f", "qcow", "-c", "write -P 5 100k 1k", "-c", "write -P 6 1536k 1k", text(&top)]);
    let mut expected = disk;
    expected.resize(2 << 20, 0);
    expected[100 << 10..101 << 10].fill(5);
    expected[1536 << 10..1537 << 10].fill(6);
    let source = open_chain(&top).unwrap();
    assert!(content(&source).unwrap() == expected);
    assert_eq!(source.info().cluster_size, Some(512));
    assert_eq!(source.info().references[0].name, "base.raw");
    let refused = conformance::open(&Qcow1Driver, &top).map(|_| ()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
}

#[test]
fn encrypted_images_need_a_passphrase_for_their_content() {
    let mut image = build(&[1, 0, 3]);
    image[39] = 1;
    let error = refusal(&Qcow1Driver, &image);
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("AES"), "{error}");
    let open = |options: OpenOptions| Qcow1Driver.open(memory::as_file("x.qcow", &image), &options).unwrap();
    let source = open(OpenOptions { info_only: true, ..OpenOptions::default() });
    assert!(source.info().facts.iter().any(|fact| fact.key == "encrypted"));
    let source = open(OpenOptions { layout_only: true, ..OpenOptions::default() });
    let map = Disk::only(source, "the image").unwrap().map(0..1536).unwrap();
    let seen: Vec<_> = map.iter().map(|run| (run.data, run.compressed, run.place.is_some())).collect();
    assert_eq!(seen, [(true, false, false), (false, false, false), (true, false, false)]);
    assert_eq!(faults(&Qcow1Driver, &image), (0, 0));
}

/// A sector of zeros that is decrypted with a key of 16 zeros and the sector's number.
#[test]
fn sectors_are_numbered_by_their_place_in_the_disk() {
    let mut image = build(&[7, 0, 7]);
    image[39] = 1;
    let secrets = Secret::new(b"a".to_vec()).into();
    let options = OpenOptions { secrets, salvage: true, ..OpenOptions::default() };
    let source = Qcow1Driver.open(memory::as_file("x.qcow", &image), &options).unwrap();
    let read = content(&source).unwrap();
    let (first, third) = (&read[..512], &read[1024..]);
    // The vectors are 0 and 2, and apply to the first block alone.
    assert_eq!((first[0] ^ 2, &first[1..]), (third[0], &third[1..]));
    assert!(read[512..1024].iter().all(|byte| *byte == 0) && source.losses().is_empty());
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let (number, long) = (u32::to_be_bytes, u64::to_be_bytes);
    let mut image = build(&[1, 0, 3]);
    compress(&mut image, 1, &flate_text());
    expect_refusals(
        &Qcow1Driver,
        &image,
        &[
            (0, b"q", "signature"),
            (7, &[2], "signature"),
            (8, &long(u64::MAX), "the file ends"),
            (24, &long(u64::MAX), "more than 9223372036854775808"),
            (24, &long(1 << 60), "the first table needs"),
            (32, &[8], "clusters of 2^8"),
            (32, &[17], "clusters of 2^17"),
            (33, &[5], "tables of 2^5"),
            (33, &[14], "tables of 2^14"),
            (36, &number(2), "unknown encryption 2"),
            (40, &long(0), "the first table is at 0"),
            (40, &long(513), "the first table is at 513"),
            (L1, &long(1025), "a table is at 1025"),
            (L1, &long(8), "a table is at 8"),
            (L1, &long(1 << 40), "the table needs"),
            (L2, &long(1025), "a cluster is at 1025"),
            (L2, &long(1 << 40), "the cluster needs"),
            (L2, &long(COMPRESSED | 9 << 54 | 1 << 40), "the compressed cluster needs"),
            (L2, &long(COMPRESSED | 9 << 54), "cannot decode"),
            (L2, &long(COMPRESSED | 1024), "cannot decode"),
        ],
    );
    put(&mut image, 8, 100);
    image[16..20].copy_from_slice(&number(1024));
    assert!(refusal(&Qcow1Driver, &image).to_string().contains("name has 1024 bytes"));
}

#[test]
fn refuses_a_small_file_that_repeats_a_table() {
    let mut image = build(&[1]);
    image.resize(L1 + 3000 * 8 + 512, 0);
    let (l1, l2) = (1024, L1 as u64 + 3000 * 8);
    put(&mut image, 24, 3000 * 64 * 512);
    put(&mut image, 40, l1);
    image.resize(l2 as usize + 1024, 0);
    for entry in 0..3000 {
        // Tables that overlap count as one.
        put(&mut image, l1 as usize + 8 * entry, l2.next_multiple_of(512) + 8 * (entry as u64 % 60));
    }
    let error = open(&Qcow1Driver, &image).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("more than 2048 tables are used several times"), "{error}");
}

#[test]
fn check_finds_damage() {
    let mut image = build(&[1, 2, 3, 0, 5]);
    assert_eq!(faults(&Qcow1Driver, &image), (0, 0));
    image.copy_within(L2..L2 + 8, L2 + 8);
    put(&mut image, L2 + 16, 77);
    put(&mut image, L2 + 24, COMPRESSED | 1 << 54 | 1 << 40);
    assert_eq!(faults(&Qcow1Driver, &image), (3, 0));
    put(&mut image, L1, 1 << 40);
    assert_eq!(faults(&Qcow1Driver, &image), (1, 0));
    assert_eq!(faults(&Qcow1Driver, &image[..40]), (1, 0));
}

#[test]
fn salvage_restores_the_other_clusters() {
    let mut image = build(&[1, 2, 0, 4]);
    compress(&mut image, 2, b"damage");
    let (restored, lost) = salvage(&Qcow1Driver, &image);
    assert!(restored == filled(&[1, 2, 0, 4]));
    assert_eq!(lost, [(1024, 1536)]);
}
