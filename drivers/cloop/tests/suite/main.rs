//! Tests of the cloop driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use imgtool_cloop::CloopDriver;
use imgtool_core::ErrorKind;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{
    expect_refusals, faults, mixed_disk, open, qemu_content, read, refusal, salvage,
};
use imgtool_testing::saved::{self, save};
use imgtool_testing::{require, tempdir};
use libdeflater::{CompressionLvl, Compressor};

const SCRIPT: &str = "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// Builds an image of a disk of whole blocks.
fn build(disk: &[u8], block: usize) -> Vec<u8> {
    let mut image = SCRIPT.as_bytes().to_vec();
    image.resize(128, 0);
    let blocks = disk.len() / block;
    image.extend((block as u32).to_be_bytes());
    image.extend((blocks as u32).to_be_bytes());
    let mut data: Vec<u8> = Vec::new();
    let start = image.len() + 8 * (blocks + 1);
    let mut compressor = Compressor::new(CompressionLvl::new(6).unwrap());
    for content in disk.chunks_exact(block) {
        image.extend(((start + data.len()) as u64).to_be_bytes());
        let mut stored = vec![0; compressor.zlib_compress_bound(block)];
        let len = compressor.zlib_compress(content, &mut stored).unwrap();
        data.extend(&stored[..len]);
    }
    image.extend(((start + data.len()) as u64).to_be_bytes());
    image.extend(data);
    image
}

#[test]
fn obeys_the_laws() {
    let disk = mixed_disk(64 << 10);
    let image = build(&disk, 4096);
    conformance::read_only(&CloopDriver, &[(&image, Image::from_bytes("built", &disk))]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = build(&mixed_disk(8 << 10), 1024);
    let hostile = Hostile { image: &image, places: vec![0..30, 128..208], repair: &|_: &mut [u8]| {} };
    conformance::hostile_bytes_do_not_panic(&CloopDriver, &hostile);
}

#[test]
fn qemu_reads_the_built_images_alike() {
    require!("qemu-img");
    let disk = mixed_disk(2 << 20);
    for block in [512, 65_536, 1 << 20] {
        let image = build(&disk, block);
        assert!(qemu_content(&image, "cloop") == disk, "{block}");
        assert!(read(&CloopDriver, &image).unwrap() == disk, "{block}");
        assert_eq!(faults(&CloopDriver, &image), (0, 0), "{block}");
    }
}

#[test]
fn refuses_other_versions_by_name() {
    let mut image = build(&[1; 512], 512);
    image[12] = b'4';
    let error = refusal(&CloopDriver, &image);
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("version 4.0"), "{error}");
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let (number, long) = (u32::to_be_bytes, u64::to_be_bytes);
    let image = build(&mixed_disk(4096), 1024);
    expect_refusals(
        &CloopDriver,
        &image,
        &[
            (0, b" ", "signature"),
            (128, &number(0), "blocks of 0 bytes"),
            (128, &number(1000), "blocks of 1000 bytes"),
            (128, &number(1 << 30), "blocks of 1073741824 bytes"),
            (132, &number(u32::MAX), "the table needs"),
            (136, &long(175), "block 0 is stored at 175"),
            (144, &long(175), "block 0 is stored at 176 to 175"),
            (168, &long(1 << 20), "block 3 is stored at"),
            (168, &long(5000), "the compressed block needs"),
            (176, &[0xff], "cannot decode block 0"),
        ],
    );
    // A block that decodes to more or less than its size.
    let mut short = image.clone();
    short[128..132].copy_from_slice(&number(512));
    assert!(refusal(&CloopDriver, &short).to_string().contains("cannot decode"));
    let mut long = image;
    long[128..132].copy_from_slice(&number(1536));
    assert!(refusal(&CloopDriver, &long).to_string().contains("1024 bytes, not 1536"));
}

#[test]
fn check_finds_damage_in_blocks() {
    let mut image = build(&mixed_disk(16 << 10), 1024);
    assert_eq!(faults(&CloopDriver, &image), (0, 0));
    let last = image.len() - 1;
    image[last] ^= 1;
    // The second block is that of the first.
    image.copy_within(136..144, 152);
    assert_eq!(faults(&CloopDriver, &image).0, 3);
    image.truncate(200);
    assert_eq!(faults(&CloopDriver, &image), (1, 0));
}

/// A table of 32 GiB of zeros in a file that takes no space.
#[test]
fn check_of_a_sparse_table_takes_bounded_time() {
    let directory = tempdir();
    let path = save(directory.path(), "x.cloop", &build(&[1; 512], 512)[..136]);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&u32::MAX.to_be_bytes(), 132).unwrap();
    file.set_len(136 + (8 << 32) + 4096).unwrap();
    let began = Instant::now();
    let report = saved::check(&CloopDriver, &path);
    assert!((1..100).contains(&report.corruptions), "{:?}", report.findings);
    assert!(report.findings[0].contains("stored in no bytes"), "{:?}", report.findings);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn salvage_restores_the_other_blocks() {
    let disk = mixed_disk(4096);
    let mut image = build(&disk, 1024);
    let last = image.len() - 1;
    image[last] ^= 1;
    let (restored, lost) = salvage(&CloopDriver, &image);
    assert!(restored[..3072] == disk[..3072] && restored[3072..] == [0; 1024]);
    assert_eq!(lost, [(3072, 4096)]);
}

/// Otherwise, a reader of small pieces would decode a long block for each of them.
#[test]
fn a_damaged_block_is_lost_with_the_first_read_of_it() {
    let mut image = build(&mixed_disk(4096), 1024);
    let last = image.len() - 1;
    image[last] ^= 1;
    let options = imgtool_core::OpenOptions { salvage: true, ..imgtool_core::OpenOptions::default() };
    let input = imgtool_testing::memory::as_file("x.cloop", &image);
    let source = imgtool_core::Driver::open(&CloopDriver, input, &options).unwrap();
    let disk = imgtool_core::Disk::only(std::sync::Arc::clone(&source), "the image").unwrap();
    for at in [3072, 3584] {
        let mut bytes = [7; 512];
        disk.read_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, [0; 512]);
        let lost: Vec<_> =
            source.losses().into_iter().map(|loss| (loss.guest.start, loss.guest.end)).collect();
        assert_eq!(lost, [(3072, 4096)]);
    }
}

#[test]
fn large_blocks_borrow_their_memory() {
    let image = build(&vec![7; 64 << 20], 64 << 20);
    assert_eq!(read(&CloopDriver, &image).unwrap().len(), 64 << 20);
    let options = imgtool_core::OpenOptions {
        memory: imgtool_core::Memory::new(64 << 20),
        ..imgtool_core::OpenOptions::default()
    };
    let input = imgtool_testing::memory::as_file("x.cloop", &image);
    let error = imgtool_core::Driver::open(&CloopDriver, input, &options).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(open(&CloopDriver, &image).is_ok());
}
