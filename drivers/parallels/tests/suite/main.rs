//! Tests of the Parallels driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

use imgtool_core::{Disk, Driver, ErrorKind, OpenOptions};
use imgtool_parallels::ParallelsDriver;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{
    self, expect_refusals, faults, mixed_disk, open, qemu_content, qemu_image, read, refusal, salvage,
};
use imgtool_testing::oracles::{dissect_disks, run};
use imgtool_testing::saved::{open_options, save};
use imgtool_testing::{require, sha256, tempdir, text};

/// Size of a cluster of the images that the tests build: seven sectors, since any number is legal.
const CLUSTER: usize = 7 * 512;

/// Builds an image with clusters of 7 sectors. Each byte of `clusters` fills a cluster; 0 leaves it out. The
/// clusters are stored in reverse order, from sector 14 on.
fn build(counts_clusters: bool, clusters: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2 * CLUSTER];
    let magic = if counts_clusters { b"WithouFreSpacExt" } else { b"WithoutFreeSpace" };
    image[..16].copy_from_slice(magic);
    let count = clusters.len() as u32;
    for (at, value) in [(16, 2), (20, 16), (24, 1), (28, 7), (32, count), (36, 7 * count), (48, 14)] {
        put(&mut image, at, value);
    }
    for (index, fill) in clusters.iter().enumerate().rev().filter(|(_, fill)| **fill != 0) {
        let sector = (image.len() / 512) as u32;
        put(&mut image, 64 + 4 * index, if counts_clusters { sector / 7 } else { sector });
        image.resize(image.len() + CLUSTER, *fill);
    }
    image
}

fn put(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn filled(clusters: &[u8]) -> Vec<u8> {
    clusters.iter().flat_map(|fill| [*fill; CLUSTER]).collect()
}

#[test]
fn obeys_the_laws() {
    let (old, new) = (build(false, &[1, 0, 3, 0, 5]), build(true, &[1, 0, 3, 0, 5]));
    let disk = || Image::from_bytes("built", &filled(&[1, 0, 3, 0, 5]));
    conformance::read_only(&ParallelsDriver, &[(&old, disk()), (&new, disk())]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = build(true, &[1, 0, 3, 0, 5]);
    let places = vec![0..64, 64..84];
    conformance::hostile_bytes_do_not_panic(
        &ParallelsDriver,
        &Hostile { image: &image, places, repair: &|_: &mut [u8]| {} },
    );
}

#[test]
fn reads_images_of_qemu() {
    require!("qemu-img");
    let disk = mixed_disk(3 << 20);
    for options in ["", "cluster_size=65536", "cluster_size=4096"] {
        let image = qemu_image(&disk, "parallels", options);
        assert!(read(&ParallelsDriver, &image).unwrap() == disk, "{options}");
        assert_eq!(faults(&ParallelsDriver, &image), (0, 0), "{options}");
    }
}

#[test]
fn reads_what_qemu_io_wrote() {
    require!("qemu-img", "qemu-io");
    let directory = tempdir();
    let path = directory.path().join("x.hds");
    run("qemu-img", &["create", "-q", "-f", "parallels", "-o", "cluster_size=64k", text(&path), "9M"]);
    let writes = ["write -P 7 8M 100k", "write -P 8 512 512", "write -P 9 4000k 70k"];
    for write in writes {
        run("qemu-io", &["-f", "parallels", "-c", write, text(&path)]);
    }
    let image = std::fs::read(&path).unwrap();
    let ours = read(&ParallelsDriver, &image).unwrap();
    assert!(ours == qemu_content(&image, "parallels"));
    assert_eq!((ours[512], ours[1024], ours[8 << 20], ours[4_096_000]), (8, 0, 7, 9));
}

#[test]
fn qemu_and_dissect_read_the_built_images_alike() {
    let clusters = [1, 0, 3, 0, 5, 6];
    for counts_clusters in [false, true] {
        let image = build(counts_clusters, &clusters);
        if imgtool_testing::oracles::have("qemu-img") {
            assert!(qemu_content(&image, "parallels") == filled(&clusters), "{counts_clusters}");
        }
        require!("dissect");
        let directory = tempdir();
        let path = directory.path().join("x.hds");
        std::fs::write(&path, &image).unwrap();
        let [seen] = &dissect_disks("hds", &[&path])[..] else { panic!("one disk") };
        assert_eq!(seen.sha256, sha256(&filled(&clusters)), "{counts_clusters}");
    }
}

#[test]
fn the_size_of_old_images_has_32_bits() {
    let mut image = build(false, &[1]);
    put(&mut image, 40, 0xffff_ffff);
    assert_eq!(read(&ParallelsDriver, &image).unwrap(), filled(&[1]));
    let mut image = build(true, &[1]);
    put(&mut image, 40, 0xffff_ffff);
    assert_eq!(refusal(&ParallelsDriver, &image).kind(), ErrorKind::LimitExceeded);
}

#[test]
fn notes_an_image_that_was_not_closed() {
    let mut image = build(true, &[1, 2]);
    for (value, is_open) in [(0x746f_6e59, true), (0x312e_3276, false)] {
        put(&mut image, 44, value);
        let source = open(&ParallelsDriver, &image).unwrap();
        assert_eq!(source.info().notes.len(), usize::from(is_open));
    }
    put(&mut image, 56, 100);
    assert!(open(&ParallelsDriver, &image).unwrap().info().notes[0].contains("extension"));
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let number = u32::to_le_bytes;
    expect_refusals(
        &ParallelsDriver,
        &build(true, &[1, 0, 3]),
        &[
            (0, b"w", "signature"),
            (16, &number(1), "version 1"),
            (28, &number(0), "clusters of 0 sectors"),
            (28, &number((1 << 21) + 1), "2097153 sectors"),
            (32, &number(2), "2 entries"),
            (32, &number(u32::MAX), "the table needs"),
            (64, &number(u32::MAX), "the file ends"),
        ],
    );
    let long = build(true, &[1; 1000]);
    expect_refusals(&ParallelsDriver, &long, &[(64, &number(1), "overlaps the table")]);
    assert!(ParallelsDriver.probe(&long, None).is_some());
}

#[test]
fn check_finds_damage() {
    let mut image = build(true, &[1, 0, 3, 4]);
    assert_eq!(faults(&ParallelsDriver, &image), (0, 0));
    // The first two clusters become one, the third is beyond the file.
    image.copy_within(64..68, 68);
    put(&mut image, 72, 1000);
    assert_eq!(faults(&ParallelsDriver, &image), (2, 0));
    let mut image = build(true, &[1, 2]);
    put(&mut image, 32, 3);
    put(&mut image, 72, 9);
    assert_eq!(faults(&ParallelsDriver, &image), (0, 1));
    assert_eq!(crafted::check(&ParallelsDriver, &image[..70]).corruptions, 1);
}

#[test]
fn salvage_restores_the_other_clusters() {
    let mut image = build(true, &[1, 2, 3]);
    // The last cluster of the file is the first of the disk.
    image.truncate(image.len() - 100);
    let error = refusal(&ParallelsDriver, &image);
    assert_eq!((error.kind(), error.guest_range()), (ErrorKind::Corrupt, Some(0..CLUSTER as u64)));
    let (restored, lost) = salvage(&ParallelsDriver, &image);
    assert!(restored == filled(&[0, 2, 3]));
    assert_eq!(lost, [(0, CLUSTER as u64)]);
}

#[test]
fn only_the_used_part_of_the_last_cluster_must_exist() {
    let mut image = build(true, &[2]);
    put(&mut image, 36, 6);
    image.truncate(image.len() - 512);
    let disk = Disk::only(open(&ParallelsDriver, &image).unwrap(), "the image").unwrap();
    assert_eq!(disk.size(), 6 * 512);
    assert_eq!(read(&ParallelsDriver, &image).unwrap(), [2; 6 * 512]);
    assert_eq!(faults(&ParallelsDriver, &image), (0, 0));
}

#[test]
fn refuses_a_part_of_a_bundle_but_describes_it() {
    let directory = tempdir();
    let path = save(directory.path(), "disk.hds", &build(true, &[0, 2]));
    let open = |options: &OpenOptions| conformance::open_with(&ParallelsDriver, &path, options);
    let options = open_options(ParallelsDriver, false);
    assert!(open(&options).is_ok(), "no descriptor");
    let descriptor = |storages: usize, shots: usize| {
        let xml = ["<Storage><End>14</End></Storage>".repeat(storages), "<Shot/>".repeat(shots)].concat();
        save(directory.path(), "DiskDescriptor.xml", format!("<disk>{xml}</disk>").as_bytes());
    };
    descriptor(1, 1);
    let whole = open(&options).unwrap();
    assert!(whole.info().notes.is_empty());
    for (storages, shots, text) in [(2, 1, "2 parts"), (1, 2, "2 snapshots")] {
        descriptor(storages, shots);
        let error = open(&options).map(|_| ()).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(text), "{error}");
        for described in [
            OpenOptions { info_only: true, ..options.clone() },
            OpenOptions { salvage: true, ..options.clone() },
        ] {
            let source = open(&described).unwrap();
            assert!(source.info().notes[0].contains(text), "{:?}", source.info().notes);
        }
    }
    // One that is cut may have listed more files, and so may one that is too long.
    let cut = b"<disk><Storage><End>14</End></Storage>".to_vec();
    for (bytes, text) in
        [(cut, "damaged"), (vec![b' '; (1 << 20) + 1], "can't be read"), (Vec::new(), "damaged")]
    {
        save(directory.path(), "DiskDescriptor.xml", &bytes);
        let error = open(&options).map(|_| ()).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(text), "{error}");
        let source = open(&OpenOptions { salvage: true, ..options.clone() }).unwrap();
        assert!(source.doubts()[0].reason.contains("unverified"), "{:?}", source.doubts());
    }
    // A link in the place of the descriptor may lead anywhere.
    std::fs::rename(directory.path().join("DiskDescriptor.xml"), directory.path().join("x.xml")).unwrap();
    std::os::unix::fs::symlink("x.xml", directory.path().join("DiskDescriptor.xml")).unwrap();
    assert!(open(&options).is_ok());
}
