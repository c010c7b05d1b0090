//! Images built byte by byte: what no program at hand writes, and what none should.

use std::fs::File;
use std::time::{Duration, Instant};

use imgtool_core::{Disk, Driver, ErrorKind, Memory, OpenOptions, Registry};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_testing::{conformance, memory, saved};
use imgtool_vdi::VdiDriver;

use crate::support::{MIB, check, content, open, save};

const BLOCK: u64 = 4096;
const UUID: [u8; 16] = [7; 16];
const CONTENT: [u8; 16] = [8; 16];

/// A small image of version 1.1 with blocks of 4 KiB.
#[derive(Clone)]
struct Builder {
    bytes: Vec<u8>,
    extra: u32,
}

impl Builder {
    /// Creates an empty disk of `blocks` blocks, with `extra` bytes before each.
    fn new(blocks: u32, extra: u32) -> Self {
        let mut image = Self { bytes: vec![0; 4096], extra };
        image.u32(64, 0xbeda_107f).u32(68, 0x0001_0001).u32(72, 400).u32(76, 1);
        image.u32(340, 512).u32(344, 4096).u32(360, 512);
        image.bytes[368..376].copy_from_slice(&(u64::from(blocks) * BLOCK).to_le_bytes());
        image.u32(376, BLOCK as u32).u32(380, extra).u32(384, blocks);
        image.bytes[392..408].copy_from_slice(&UUID);
        image.bytes[408..424].copy_from_slice(&CONTENT);
        for block in 0..blocks {
            image.u32(512 + 4 * block as usize, u32::MAX);
        }
        image
    }

    fn u32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Stores a block filled with `byte` at the end of the file.
    fn block(&mut self, index: usize, byte: u8) -> &mut Self {
        let position = (self.bytes.len() as u64 - 4096) / (BLOCK + u64::from(self.extra));
        self.u32(512 + 4 * index, position as u32).u32(388, position as u32 + 1);
        self.bytes.extend(vec![0xee; self.extra as usize]);
        self.bytes.extend(vec![byte; BLOCK as usize]);
        self
    }

    /// Makes it a differencing image over the image with these UUIDs.
    fn child_of(&mut self, uuid: [u8; 16], content: [u8; 16]) -> &mut Self {
        self.u32(76, 4);
        self.bytes[392..424].fill(9);
        self.bytes[424..440].copy_from_slice(&uuid);
        self.bytes[440..456].copy_from_slice(&content);
        self
    }
}

fn filled(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; BLOCK as usize]).collect()
}

fn open_bytes(bytes: &[u8]) -> imgtool_core::Result<Vec<u8>> {
    content(&VdiDriver.open(memory::as_file("x.vdi", bytes), &OpenOptions::default())?)
}

#[test]
fn reads_blocks_in_any_order_after_extra_bytes() {
    for extra in [0, 512, 4096] {
        let mut image = Builder::new(5, extra);
        image.block(3, 3).block(0, 1).u32(512 + 4 * 4, 0xffff_fffe);
        assert_eq!(open_bytes(&image.bytes).unwrap(), filled(&[1, 0, 0, 3, 0]), "{extra}");
    }
}

#[test]
fn reads_version_0_1() {
    let mut bytes = vec![0; 420];
    bytes[64..68].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    for (at, value) in [(68, 1), (72, 1), (360, BLOCK as u32), (364, 3), (368, 2)] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes[352..360].copy_from_slice(&(3 * BLOCK).to_le_bytes());
    for entry in [1_u32, u32::MAX, 0] {
        bytes.extend(entry.to_le_bytes());
    }
    bytes.extend(filled(&[5, 6]));
    assert_eq!(open_bytes(&bytes).unwrap(), filled(&[6, 0, 5]));
}

#[test]
fn reads_a_child_over_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Builder::new(4, 0);
    parent.block(0, 1).block(1, 2).block(2, 3);
    save(directory.path(), "base.vdi", &parent.bytes);
    // Another image, and a file that is none, are not the parent.
    save(directory.path(), "a.vdi", &Builder::new(4, 0).child_of([1; 16], [1; 16]).bytes);
    save(directory.path(), "b.vdi", b"not an image");
    let mut child = Builder::new(6, 0);
    child.child_of(UUID, CONTENT).block(1, 0x22).u32(512 + 4 * 2, 0xffff_fffe);
    let path = save(directory.path(), "child.vdi", &child.bytes);
    assert_eq!(content(&open(&path).unwrap()).unwrap(), filled(&[1, 0x22, 0, 0, 0, 0]));
    assert_eq!(check(&path).corruptions, 0);
}

#[test]
fn refuses_parents_unless_allowed_or_if_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.vdi", &Builder::new(2, 0).child_of(UUID, [3; 16]).bytes);
    let error = conformance::open(&VdiDriver, &path).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("no allowed file is the parent"), "{error}");
    // An allowed file that can't be opened may be the parent.
    let paths = vec![directory.path().join("missing.vdi")];
    let policy = ExternalPolicy { paths, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(Registry::new(), policy).externals();
    let options = OpenOptions { externals, ..OpenOptions::default() };
    let error = conformance::open_with(&VdiDriver, &path, &options).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Io && error.to_string().contains("missing.vdi"), "{error}");
    save(directory.path(), "base.vdi", &Builder::new(2, 0).bytes);
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("has changed"), "{error}");
    // A salvage reads what is left, and says so.
    let options = OpenOptions { salvage: true, ..saved::open_options(VdiDriver, true) };
    let source = conformance::open_with(&VdiDriver, &path, &options).unwrap();
    assert!(
        source.doubts().iter().any(|doubt| doubt.reason.contains("has changed")),
        "{:?}",
        source.doubts()
    );
}

/// QEMU changes no UUID when it writes, so that copies with one UUID may differ.
#[test]
fn refuses_two_parents_of_one_uuid() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.vdi", &Builder::new(2, 0).child_of(UUID, CONTENT).bytes);
    let first = save(directory.path(), "a.vdi", &Builder::new(2, 0).block(0, 1).bytes);
    save(directory.path(), "b.vdi", &Builder::new(2, 0).block(0, 2).bytes);
    let error = open(&path).map(|_| ()).unwrap_err();
    let names = error.to_string().contains("'a.vdi' and 'b.vdi'");
    assert!(error.kind() == ErrorKind::Refused && names, "{error}");
    let options = OpenOptions { salvage: true, ..saved::open_options(VdiDriver, true) };
    let source = conformance::open_with(&VdiDriver, &path, &options).unwrap();
    assert!(source.doubts()[0].reason.contains("two allowed files"), "{:?}", source.doubts());
    // One that is allowed by its path and as a file of the directory is one file.
    std::fs::remove_file(directory.path().join("b.vdi")).unwrap();
    let mut registry = Registry::new();
    registry.register(VdiDriver);
    let policy = ExternalPolicy { paths: vec![first], chain: true, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(registry, policy).externals();
    let options = OpenOptions { externals, ..OpenOptions::default() };
    let source = conformance::open_with(&VdiDriver, &path, &options).unwrap();
    assert_eq!(content(&source).unwrap(), filled(&[1, 0]));
}

#[test]
fn a_check_compares_the_identifiers_and_the_size_of_an_allowed_parent() {
    let directory = tempfile::tempdir().unwrap();
    let child = Builder::new(2, 0).child_of(UUID, CONTENT).bytes.clone();
    let path = save(directory.path(), "child.vdi", &child);
    let check = |chain| {
        let options = saved::open_options(VdiDriver, chain);
        VdiDriver.check(conformance::input(&path).unwrap(), &options).unwrap()
    };
    for chain in [false, true] {
        let alone = check(chain);
        let note = alone.findings[0].contains("only this file was checked, not its parent");
        assert!(alone.corruptions == 0 && note, "{:?}", alone.findings);
    }
    save(directory.path(), "base.vdi", &Builder::new(2, 0).bytes);
    assert!(check(true).findings.is_empty(), "{:?}", check(true).findings);
    save(directory.path(), "base.vdi", &Builder::new(4, 0).bytes);
    let longer = check(true);
    let note = "note: the disk has 8192 bytes, but its parent has 16384";
    assert!(longer.corruptions == 0 && longer.findings == [note], "{:?}", longer.findings);
    save(directory.path(), "child.vdi", &Builder::new(2, 0).child_of(UUID, [3; 16]).bytes);
    let changed = check(true);
    assert!(
        changed.corruptions == 1 && changed.findings[0].contains("has changed"),
        "{:?}",
        changed.findings
    );
}

#[test]
fn refuses_headers_that_contradict_themselves() {
    let refusal = |at: usize, value: u32| {
        let mut image = Builder::new(2, 0);
        image.u32(at, value);
        open_bytes(&image.bytes).unwrap_err().to_string()
    };
    for (at, value, text) in [
        (64, 0, "signature"),
        (68, 0x0002_0000, "version 2.0"),
        (72, 100, "header of 100 bytes"),
        (76, 3, "undo log"),
        (76, 9, "unknown type"),
        (340, 100, "overlap"),
        (344, 512, "overlap"),
        (376, 3000, "blocks of 3000 bytes"),
        (376, 1 << 30, "blocks of 1073741824 bytes"),
        (380, 1 << 30, "before each block"),
        (384, 1, "1 entries"),
        (384, 1 << 30, "overlap"),
    ] {
        let message = refusal(at, value);
        assert!(message.contains(text), "{at} = {value:#x}: {message}");
    }
}

#[test]
fn damage_names_the_guest_range_and_check_finds_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut image = Builder::new(4, 0);
    image.block(0, 1).block(2, 3).u32(512 + 4, 900).u32(512 + 12, 0);
    let path = save(directory.path(), "x.vdi", &image.bytes);
    let disk = Disk::only(open(&path).unwrap(), "the image").unwrap();
    let error = disk.read_at(&mut [0; 10], BLOCK + 5).unwrap_err();
    assert_eq!((error.kind(), error.guest_range()), (ErrorKind::Corrupt, Some(BLOCK..2 * BLOCK)));
    let report = check(&path);
    // A block past the end of the file, one used twice, and a wrong count.
    assert_eq!(report.corruptions, 3, "{:?}", report.findings);
}

#[test]
fn check_reports_neighbours_that_share_a_block_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut image = Builder::new(6, 0);
    image.block(0, 1).block(1, 2);
    for entry in 2..5 {
        image.u32(512 + 4 * entry, 1);
    }
    let report = check(&save(directory.path(), "x.vdi", &image.bytes));
    assert_eq!((report.corruptions, report.leaks), (1, 0), "{:?}", report.findings);
    assert!(report.findings[0].contains("map entries 2 to 4"), "{:?}", report.findings);
}

/// A map of a billion zeros in a file that takes no space.
#[test]
fn check_of_a_sparse_map_takes_bounded_time_and_memory() {
    let directory = tempfile::tempdir().unwrap();
    for disk_blocks in [1, (1 << 30) - 2048] {
        let mut image = Builder::new(1, 0);
        image.u32(384, (1 << 30) - 2048).u32(344, u32::MAX - 4095);
        image.bytes[368..376].copy_from_slice(&(disk_blocks * BLOCK).to_le_bytes());
        image.bytes[512..516].fill(0);
        let path = save(directory.path(), "x.vdi", &image.bytes);
        File::options().write(true).open(&path).unwrap().set_len((4 << 30) + 4096).unwrap();
        let options = OpenOptions { memory: Memory::new(64 << 20), ..OpenOptions::default() };
        let began = Instant::now();
        let report = VdiDriver.check(conformance::input(&path).unwrap(), &options).unwrap();
        assert!((1..100).contains(&report.corruptions), "{:?}", report.findings);
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

#[test]
fn salvage_restores_the_other_blocks() {
    let mut image = Builder::new(3, 0);
    image.block(0, 1).block(1, 2).block(2, 3);
    image.bytes.truncate(image.bytes.len() - 1000);
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VdiDriver.open(memory::as_file("x.vdi", &image.bytes), &options).unwrap();
    assert_eq!(content(&source).unwrap(), filled(&[1, 2, 0]));
    let [loss] = &source.losses()[..] else { panic!("one loss") };
    assert_eq!(loss.guest, 2 * BLOCK..3 * BLOCK);
}

#[test]
fn a_huge_empty_map_takes_little_memory() {
    let mut image = Builder::new(2, 0);
    image.u32(384, (MIB / 4) as u32).u32(344, 4 << 20);
    image.bytes.resize(512 + MIB as usize, 0xff);
    assert!(open_bytes(&image.bytes).is_ok());
}
