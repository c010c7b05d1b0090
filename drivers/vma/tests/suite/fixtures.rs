//! Archives made by the reference program, compared with digests of their content.

use imgtool_core::sync::lock;
use imgtool_core::{Access, BufferPool, DeviceKind, Driver, Extent, ExtentKind, ImageSource, OpenOptions};
use imgtool_testing::manifest::{self, Entry};
use imgtool_testing::{fixture, sha256};
use imgtool_vma::{ArchiveHeader, VmaDriver, VmaSource};

use crate::support::{self, Content, open_file, read, read_both};

fn assert_content(archive: &Entry, content: &Content) {
    for device in &archive.devices {
        assert_eq!(content[&device.id].len() as u64, device.size, "{archive:?}");
        assert_eq!(sha256(&content[&device.id]), device.sha256, "{archive:?}");
    }
}

/// Returns the decompressed bytes of an archive.
fn decompressed(name: &str) -> Vec<u8> {
    let mut stream = open_file(&fixture(name)).into_stream().unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut bytes).unwrap();
    bytes
}

/// Returns the archives whose content fits into memory several times.
fn small_archives() -> Vec<Entry> {
    let mut archives = manifest::archives();
    archives.retain(|archive| archive.devices.iter().all(|device| device.size < 600 << 20));
    archives
}

#[test]
fn reads_every_archive_from_files_and_pipes() {
    for archive in small_archives() {
        let name = &archive.file;
        let header = ArchiveHeader::read(open_file(&fixture(name))).unwrap();
        for (device, expected) in header.devices.iter().zip(&archive.devices) {
            assert_eq!(device.name, expected.name);
            assert_eq!(device.id.0, expected.id);
        }
        // As stored: a stream if the archive is compressed.
        let content = read(open_file(&fixture(name)), &OpenOptions::default()).unwrap();
        assert_content(&archive, &content);
        // As a file and as a pipe.
        assert!(read_both(&decompressed(name), &OpenOptions::default()).unwrap() == content);
    }
}

#[test]
fn salvage_and_check_accept_intact_archives() {
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    for archive in small_archives() {
        let name = &archive.file;
        let source = VmaSource::open(open_file(&fixture(name)), &salvage).unwrap();
        assert_content(&archive, &support::read_source(&source).unwrap());
        assert_eq!(source.losses(), []);
        let report = VmaDriver.check(open_file(&fixture(name)), &OpenOptions::default()).unwrap();
        assert_eq!((report.corruptions, report.check_errors, report.findings.len()), (0, 0, 0), "{name}");
    }
}

/// The fixture stores a gigabyte of zeros in 18 KB.
#[test]
fn an_archive_of_zeros_yields_no_data() {
    let bytes = decompressed("zero.vma.zst");
    let size = 1 << 30;
    let source = VmaSource::open(support::as_stream(&bytes), &OpenOptions::default()).unwrap();
    let Access::Stream(stream) = source.access() else { panic!("a stream is sequential") };
    let mut next = 0;
    while let Some(piece) = lock(stream).next_piece(&BufferPool::new()).unwrap() {
        assert!(piece.data.is_none());
        assert_eq!(piece.start, next);
        next = piece.end();
    }
    assert_eq!(next, size);
    let source = VmaSource::open(support::as_file(&bytes), &OpenOptions::default()).unwrap();
    let device = source.info().devices[0].id;
    let extents = source.access().random().unwrap().extents(device, 0..size).unwrap();
    assert_eq!(extents, [Extent { start: 0, len: size, kind: ExtentKind::Zero }]);
}

#[test]
fn info_has_configurations_and_facts() {
    let bytes = decompressed("two-disks.vma.zst");
    let source = VmaSource::open(support::as_file(&bytes), &OpenOptions::default()).unwrap();
    let info = source.info();
    let names: Vec<&str> = info.attachments.iter().map(|config| config.name.as_str()).collect();
    assert_eq!(names, ["qemu-server.conf", "qemu-server.fw"]);
    for config in &info.attachments {
        assert_eq!(config.data, std::fs::read(fixture(&config.name)).unwrap());
    }
    let fact = |key: &str| info.facts.iter().find(|fact| fact.key == key).unwrap().value.clone();
    // The reference program prints "Sun Nov 22 10:03:58 2026" for this archive.
    assert_eq!(fact("creation-time"), "2026-11-22 10:03:58 UTC");
    let stored: u64 = fact("devices")
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["stored-bytes"].as_u64().unwrap())
        .sum();
    let zero: u64 =
        fact("devices").as_array().unwrap().iter().map(|device| device["zero-bytes"].as_u64().unwrap()).sum();
    assert_eq!(stored + zero, 5_255_168 + 540_672);
    assert!(stored < 3_000_000 && stored > 2_000_000, "{stored}");
}

#[test]
fn guest_state_is_not_a_disk() {
    let header = ArchiveHeader::read(open_file(&fixture("vmstate.vma.zst"))).unwrap();
    let kinds: Vec<DeviceKind> = header.devices.iter().map(|device| device.kind).collect();
    assert_eq!(kinds, [DeviceKind::VmState, DeviceKind::Disk]);
}

/// The reference program prints "short vma extent (87200 < 1192448)" for an archive cut at byte 100,000.
#[test]
fn truncated_archive_gets_the_reference_message() {
    let mut bytes = decompressed("two-disks.vma.zst");
    bytes.truncate(100_000);
    let error = read_both(&bytes, &OpenOptions::default()).unwrap_err();
    assert_eq!(imgtool_vma::reference::message(&error), "short vma extent (87200 < 1192448)");
    assert_eq!(error.file_offset(), Some(12_800));
}
