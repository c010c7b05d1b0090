//! The sparse extents of ESX: COWD redo logs and SE sparse files, built byte by byte.

use imgtool_core::{Driver, ErrorKind, OpenOptions, Result};
use imgtool_testing::{conformance, memory};
use imgtool_vmdk::VmdkDriver;

use crate::crafted::open_bytes;
use crate::support::{assert_clean, check, content, open, open_options, open_plainly, save};

/// Returns a COWD file with grains of `grain` sectors: header, directory at sector 4, table at 5, grains at 37.
fn cowd(capacity: u32, grain: u32, grains: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = vec![0; 37 * 512];
    bytes[..4].copy_from_slice(b"COWD");
    for (at, value) in [(4, 1), (8, 3), (12, capacity), (16, grain), (20, 4), (24, 1), (2048, 5)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    for (index, byte) in grains {
        let sector = (bytes.len() / 512) as u32;
        bytes[5 * 512 + index * 4..][..4].copy_from_slice(&sector.to_le_bytes());
        bytes.extend(vec![*byte; grain as usize * 512]);
    }
    bytes
}

/// Returns an SE sparse file of `capacity` sectors, with entries of its table: headers and areas of 8 sectors
/// each, directory at 32, tables at 40 (two), grains at 168.
fn se_sparse(capacity: u64, entries: &[u64], grains: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 168 * 512];
    let words: Vec<u64> = [0xcafe_babe, 0x2_0000_0001, capacity, 8, 64, 0, 0, 0, 0, 0]
        .into_iter()
        .chain([8, 8, 16, 8, 24, 8, 32, 8, 40, 128, 0, 0, 0, 0, 168, 8 * grains.len() as u64])
        .collect();
    for (index, word) in words.iter().enumerate() {
        bytes[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
    bytes[8 * 512..][..8].copy_from_slice(&0xcafe_cafe_u64.to_le_bytes());
    // The disk's first table is the file's second.
    bytes[32 * 512..][..8].copy_from_slice(&0x1000_0000_0000_0001_u64.to_le_bytes());
    for (index, entry) in entries.iter().enumerate() {
        bytes[(40 + 64) * 512 + index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    for byte in grains {
        bytes.extend(vec![*byte; 4096]);
    }
    bytes
}

fn sectors(bytes: &[u8], len: usize) -> Vec<u8> {
    bytes.iter().flat_map(|byte| vec![*byte; len * 512]).collect()
}

#[test]
fn reads_cowd_files() {
    let bare = cowd(5, 1, &[(0, 1), (3, 2)]);
    assert!(open_anyway(&bare).unwrap() == sectors(&[1, 0, 0, 2, 0], 1));
    // Its descriptor may name a disk below it.
    let error = open_bytes(&bare).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("COWD"), "{error}");
    let mut child = cowd(5, 1, &[(0, 1)]);
    child[32..41].copy_from_slice(b"base.vmdk");
    let error = open_bytes(&child).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("redo log"), "{error}");
    let mut geometry = cowd(5, 1, &[(0, 1)]);
    geometry[32..34].copy_from_slice(&[65, 66]);
    assert!(open_bytes(&geometry).is_ok());
    for (at, byte, expected) in [(4, 2, "version 2"), (16, 3, "grains of 3"), (24, 0, "directory entries")] {
        let mut bytes = cowd(5, 1, &[]);
        bytes[at] = byte;
        let error = open_bytes(&bytes).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}, not {expected}");
    }
}

#[test]
fn reads_redo_logs_over_their_disks() {
    let directory = tempfile::tempdir().unwrap();
    let lines = |cid: &str, extent: &str| format!("# Disk DescriptorFile\nCID={cid}\n{extent}\n");
    save(directory.path(), "d-flat.vmdk", &sectors(&[1, 1, 1, 1, 1, 1, 1, 1, 1], 2));
    save(directory.path(), "d.vmdk", lines("a", "RW 18 VMFS \"d-flat.vmdk\"").as_bytes());
    save(directory.path(), "d-1-delta.vmdk", &cowd(18, 1, &[(1, 2), (17, 3)]));
    let one = lines("b\nparentCID=a\nparentFileNameHint=\"d.vmdk\"", "RW 18 VMFSSPARSE \"d-1-delta.vmdk\"");
    save(directory.path(), "d-1.vmdk", one.as_bytes());
    let grains = se_sparse(18, &[0, 0x3000_0000_0000_0000], &[7]);
    save(directory.path(), "d-2-sesparse.vmdk", &grains);
    let two =
        lines("c\nparentCID=b\nparentFileNameHint=\"d-1.vmdk\"", "RW 18 SESPARSE \"d-2-sesparse.vmdk\"");
    let path = save(directory.path(), "d-2.vmdk", two.as_bytes());
    let expected = sectors(&[1, 2, 1, 1, 1, 1, 1, 1, 7, 7, 7, 7, 7, 7, 7, 7, 1, 3], 1);
    assert!(content(&open(&path).unwrap()).unwrap() == expected);
    assert_clean(&path);
    assert_eq!(open_plainly(&path).map(|_| ()).unwrap_err().kind(), ErrorKind::Refused);
}

/// Read alone, a redo log would have zeros in place of the content of the disk below it.
#[test]
fn refuses_a_redo_log_whose_descriptor_denies_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = cowd(18, 1, &[(1, 2)]);
    log[32..41].copy_from_slice(b"base.vmdk");
    save(directory.path(), "d-delta.vmdk", &log);
    let text = "# Disk DescriptorFile\nCID=b\nparentCID=ffffffff\nRW 18 VMFSSPARSE \"d-delta.vmdk\"\n";
    let path = save(directory.path(), "d.vmdk", text.as_bytes());
    let error = open_plainly(&path).map(|_| ()).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Malformed && error.to_string().contains("a redo log over 'base.vmdk'"),
        "{error}"
    );
    let options = OpenOptions { salvage: true, ..open_options(false) };
    let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    assert!(content(&source).unwrap()[512..1024] == [2; 512]);
    assert!(source.doubts()[0].reason.contains("a redo log over"), "{:?}", source.doubts());
    assert_eq!(check(&path).corruptions, 1);
}

fn open_anyway(bytes: &[u8]) -> Result<Vec<u8>> {
    let options = OpenOptions { force: true, ..OpenOptions::default() };
    content(&VmdkDriver.open(memory::as_file("x.vmdk", bytes), &options)?)
}

#[test]
fn reads_se_sparse_files() {
    let entries = [0x3001_0000_0000_0000, 0x1000_0000_0000_0000, 2 << 60, 0, 0x3000_0000_0000_0000];
    // Grain 1 of the file has its number in the upper bits.
    let bytes = se_sparse(40, &entries, &[5, 6]);
    assert!(open_anyway(&bytes).unwrap() == sectors(&[6, 0, 0, 0, 5], 8));
    let error = open_bytes(&bytes).unwrap_err();
    assert!(error.to_string().contains("SE sparse"), "{error}");
}

#[test]
fn refuses_damaged_se_sparse_files() {
    let bytes = || se_sparse(40, &[0x3000_0000_0000_0000], &[5]);
    // Neighbouring entries of the largest number.
    let largest = 0x3fff_ffff_ffff_ffff;
    let error = open_anyway(&se_sparse(40, &[largest; 3], &[5])).unwrap_err();
    assert!(error.to_string().contains("ends at"), "{error}");
    let faults: [(usize, u8, &str); 8] = [
        (8, 2, "version"),
        (24, 16, "grains of 16"),
        (40, 1, "flags"),
        (32 * 512, 9, "names table 9"),
        (32 * 512 + 7, 0x20, "directory entry"),
        (104 * 512 + 7, 0x40, "grain table entry"),
        (8 * 512 + 24, 1, "journal"),
        (104 * 512 + 1, 1, "ends at"),
    ];
    for (at, byte, expected) in faults {
        let mut bytes = bytes();
        bytes[at] = byte;
        let error = open_anyway(&bytes).unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}, not {expected}");
    }
}

#[test]
fn refuses_a_directory_of_many_shared_tables() {
    // Pairs of entries that share an empty table each: every table would be read.
    let tables: u64 = 20_000;
    let mut bytes = se_sparse(tables * 2 * 4096 * 8, &[], &[]);
    let directory = bytes.len() as u64 / 512;
    for table in 0..tables {
        bytes.extend([(0x1000_0000_0000_0000 | table).to_le_bytes(); 2].concat());
    }
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let area = bytes.len() as u64 / 512;
    for (at, word) in [(128, directory), (136, area - directory), (144, area), (152, tables * 64)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(word));
    }
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "x.vmdk", &bytes);
    std::fs::File::options().write(true).open(&path).unwrap().set_len((area + tables * 64) * 512).unwrap();
    let options = OpenOptions { force: true, ..OpenOptions::default() };
    let error = VmdkDriver.open(imgtool_testing::conformance::input(&path).unwrap(), &options).map(|_| ());
    assert_eq!(error.unwrap_err().kind(), ErrorKind::LimitExceeded);
}
