//! Hosted sparse files built byte by byte: what no program at hand writes, and what none should.

use imgtool_core::{Driver, ErrorKind, OpenOptions, Result};
use imgtool_testing::memory;
use imgtool_vmdk::VmdkDriver;

use crate::support::{check, content, save};

/// Size of a grain in these files.
pub const GRAIN: usize = 4096;
/// Sector of the first grain.
const DATA: u32 = 32;

/// A small hosted sparse file: header, descriptor at 1, directory at 4, tables from 8 on, grains from 32 on.
pub struct Sparse {
    pub header: Vec<u8>,
    pub descriptor: String,
    pub directory: Vec<u32>,
    /// Entries of the only table.
    pub table: Vec<u32>,
    pub grains: Vec<u8>,
}

impl Sparse {
    /// Creates an empty disk of `grains` grains, with tables of 512 entries.
    pub fn new(grains: u64) -> Self {
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(b"KDMV");
        header[4] = 1;
        header[8] = 1;
        header[12..20].copy_from_slice(&(grains * GRAIN as u64 / 512).to_le_bytes());
        header[20..28].copy_from_slice(&(GRAIN as u64 / 512).to_le_bytes());
        header[28..36].copy_from_slice(&1u64.to_le_bytes());
        header[36..44].copy_from_slice(&3u64.to_le_bytes());
        header[44..48].copy_from_slice(&512u32.to_le_bytes());
        header[56..64].copy_from_slice(&4u64.to_le_bytes());
        header[64..72].copy_from_slice(&u64::from(DATA).to_le_bytes());
        header[73..77].copy_from_slice(b"\n \r\n");
        let mut directory = vec![0; grains.div_ceil(512) as usize];
        directory[0] = 8;
        Self {
            header,
            descriptor: descriptor(1, u32::MAX),
            directory,
            table: vec![0; 512],
            grains: Vec::new(),
        }
    }

    /// Sets bytes of the header.
    pub fn with(mut self, at: usize, bytes: &[u8]) -> Self {
        self.header[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Sets an entry of the table.
    pub fn entry(mut self, grain: usize, sector: u32) -> Self {
        self.table[grain] = sector;
        self
    }

    /// Stores a grain filled with `byte`.
    pub fn grain(mut self, grain: usize, byte: u8) -> Self {
        self.table[grain] = DATA + (self.grains.len() / 512) as u32;
        self.grains.extend(vec![byte; GRAIN]);
        self
    }

    /// Returns the file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header.clone();
        let capacity = self.header[12..20].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let descriptor = self.descriptor.replace("CAPACITY", &capacity.to_string());
        bytes.extend_from_slice(descriptor.as_bytes());
        bytes.resize(4 * 512, 0);
        bytes.extend(self.directory.iter().flat_map(|entry| entry.to_le_bytes()));
        assert!(bytes.len() <= 8 * 512);
        bytes.resize(8 * 512, 0);
        bytes.extend(self.table.iter().flat_map(|entry| entry.to_le_bytes()));
        bytes.resize(DATA as usize * 512, 0);
        bytes.extend_from_slice(&self.grains);
        bytes
    }
}

/// Returns the text of a descriptor of one sparse extent, whose size is that of the header.
pub fn descriptor(cid: u32, parent: u32) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent:08x}\n\
         createType=\"monolithicSparse\"\nRW CAPACITY SPARSE \"any name\"\n"
    )
}

/// Returns grains filled with these bytes.
pub fn filled(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; GRAIN]).collect()
}

pub fn open_bytes(bytes: &[u8]) -> Result<Vec<u8>> {
    content(&VmdkDriver.open(memory::as_file("x.vmdk", bytes), &OpenOptions::default())?)
}

#[track_caller]
fn assert_fault(bytes: &[u8], kind: ErrorKind, text: &str) {
    let error = open_bytes(bytes).map(|_| ()).unwrap_err();
    assert!(error.kind() == kind && format!("{error:#}").contains(text), "{error:#}, not {text}");
}

#[test]
fn reads_grains_zeros_and_holes() {
    let file = Sparse::new(5).grain(0, 1).grain(3, 2).grain(1, 3).with(8, &[5]).with(4, &[2]).entry(2, 1);
    assert!(open_bytes(&file.bytes()).unwrap() == filled(&[1, 3, 0, 2, 0]));
    // Without its flag, entry 1 is the sector of a grain, in the descriptor.
    assert_fault(&file.with(8, &[1]).bytes(), ErrorKind::Malformed, "overlaps the structures");
}

#[test]
fn the_last_grain_may_be_cut() {
    let file = Sparse::new(2).with(12, &[9]).grain(0, 1).grain(1, 2);
    let mut bytes = file.bytes();
    let expected = [filled(&[1]), vec![2; 512]].concat();
    assert!(open_bytes(&bytes).unwrap() == expected);
    bytes.truncate(bytes.len() - GRAIN + 512);
    assert!(open_bytes(&bytes).unwrap() == expected);
    bytes.truncate(bytes.len() - 1);
    assert_fault(&bytes, ErrorKind::Corrupt, "ends at");
}

#[test]
fn refuses_numbers_out_of_bounds() {
    let file = || Sparse::new(3).grain(0, 1);
    assert_fault(&file().with(56, &[0xff; 7]).bytes(), ErrorKind::Malformed, "out of bounds");
    assert_fault(&file().with(56, &[0xff, 0xff]).bytes(), ErrorKind::Corrupt, "ends at");
    assert_fault(&file().with(12, &[0, 0, 0, 0, 0, 0, 0x3f]).bytes(), ErrorKind::LimitExceeded, "directory");
    assert_fault(&file().with(12, &[0, 0, 0, 0, 1]).bytes(), ErrorKind::Corrupt, "ends at");
    assert_fault(&file().entry(1, 0xffff_ffff).bytes(), ErrorKind::Corrupt, "ends at");
    assert_fault(&file().entry(1, 4).bytes(), ErrorKind::Malformed, "overlaps");
    let mut outside = file();
    outside.directory[0] = 0xffff_fff0;
    assert_fault(&outside.bytes(), ErrorKind::Corrupt, "ends at");
    assert_fault(&file().with(4, &[4]).bytes(), ErrorKind::Unsupported, "version 4");
    assert_fault(&file().with(74, b"\n").bytes(), ErrorKind::Malformed, "text mode");
    // A capacity of 0 is no descriptor's if there is none.
    assert_fault(&file().with(12, &[0; 32]).bytes(), ErrorKind::Malformed, "grains of 0 sectors");
    assert_fault(&file().bytes()[..300], ErrorKind::Malformed, "cut short");
}

#[test]
fn refuses_a_directory_that_repeats_one_table() {
    let mut file = Sparse::new(512).grain(0, 1).grain(200, 2);
    let empty = Sparse::new(512);
    for (file, is_refused) in [(&mut file, true), (&mut { empty }, false)] {
        // 2000 entries behind everything else.
        file.header[12..20].copy_from_slice(&(2000u64 * 512 * 8).to_le_bytes());
        let mut bytes = file.bytes();
        let sector = bytes.len() as u64 / 512;
        bytes[56..64].copy_from_slice(&sector.to_le_bytes());
        bytes.extend(std::iter::repeat_n(8u32.to_le_bytes(), 2000).flatten());
        let opened = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &OpenOptions::default());
        assert_eq!(opened.is_err(), is_refused);
        // Shared by pairs, too.
        for (index, entry) in bytes[sector as usize * 512..].chunks_mut(4).enumerate() {
            entry[0] = [8, 9][index % 2];
        }
        let opened = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &OpenOptions::default());
        assert_eq!(opened.is_err(), is_refused);
    }
}

#[test]
fn check_reports_overlaps_and_differing_copies() {
    let directory = tempfile::tempdir().unwrap();
    let findings = |file: &Sparse| {
        let path = save(directory.path(), "x.vmdk", &file.bytes());
        let report = check(&path);
        (report.corruptions, report.findings.join("; "))
    };
    let file = || Sparse::new(5).grain(0, 1).grain(3, 2);
    assert_eq!(findings(&file()), (0, String::new()));
    let (count, text) = findings(&file().entry(1, DATA + 4));
    assert!(count == 2 && text.contains("overlap"), "{count}: {text}");
    // A long range over several others counts with each of them.
    let (count, text) = findings(&file().grain(1, 3).grain(2, 4).with(36, &[48]));
    assert!(count > 2, "{count}: {text}");
    let (count, text) = findings(&file().entry(1, 8));
    assert!(count == 1 && text.contains("overlap"), "{count}: {text}");
    let (count, text) = findings(&file().entry(1, 5000));
    assert!(count == 1 && text.contains("ends at"), "{count}: {text}");
    // A redundant directory whose only entry is 0, and one whose only table is another.
    let (count, text) = findings(&file().with(8, &[3]).with(48, &[5]));
    assert!(count == 1 && text.contains("redundant copy disagree"), "{count}: {text}");
    let path = save(directory.path(), "x.vmdk", &with_copy(8, 16));
    let report = check(&path);
    assert!(report.corruptions == 1 && report.findings[0].contains("redundant copies"), "{report:?}");
}

#[test]
fn salvage_fills_lost_grains_with_zeros() {
    let bytes = Sparse::new(3).grain(0, 1).entry(1, 9999).grain(2, 3).bytes();
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &options).unwrap();
    assert!(content(&source).unwrap() == filled(&[1, 0, 3]));
    let losses = source.losses();
    assert!(losses.len() == 1 && losses[0].guest == (4096..8192), "{losses:?}");
}

#[test]
fn a_file_without_a_descriptor_is_refused_unless_forced() {
    let file = Sparse::new(1).with(28, &[0; 16]).grain(0, 1);
    assert_fault(&file.bytes(), ErrorKind::Unsupported, "no descriptor");
    for (force, salvage) in [(true, false), (false, true)] {
        let options = OpenOptions { force, salvage, ..OpenOptions::default() };
        let source = VmdkDriver.open(memory::as_file("x.vmdk", &file.bytes()), &options).unwrap();
        assert!(source.info().notes[0].contains("no descriptor"), "{:?}", source.info().notes);
        // Nothing proves that a salvage has all of the disk.
        assert_eq!(source.doubts().len(), usize::from(salvage));
    }
}

/// Returns a file whose header names a redundant directory at sector 5, in which the only table is at `copy`.
fn with_copy(main: u32, copy: u32) -> Vec<u8> {
    let mut file = Sparse::new(3).grain(0, 1).grain(2, 3).with(8, &[3]).with(48, &[5]);
    file.directory[0] = main;
    let mut bytes = file.bytes();
    bytes[5 * 512..][..4].copy_from_slice(&copy.to_le_bytes());
    bytes
}

#[test]
fn a_lost_directory_entry_is_no_hole() {
    assert!(open_bytes(&with_copy(8, 8)).unwrap() == filled(&[1, 0, 3]));
    assert!(open_bytes(&with_copy(0, 0)).unwrap() == filled(&[0, 0, 0]));
    for (main, copy) in [(0, 8), (8, 0)] {
        assert_fault(&with_copy(main, copy), ErrorKind::Malformed, "redundant");
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let source = VmdkDriver.open(memory::as_file("x.vmdk", &with_copy(main, copy)), &options).unwrap();
        assert!(content(&source).unwrap() == filled(&[1, 0, 3]), "{main} {copy}");
    }
}

/// Returns a file whose table at sector 8 has the grains 0 and 2, and whose redundant copy at sector 12 has `copy`.
fn with_copied_table(table: [u32; 3], copy: [u32; 3]) -> Vec<u8> {
    let mut bytes = with_copy(8, 12);
    for (sector, entries) in [(8, table), (12, copy)] {
        for (index, entry) in entries.iter().enumerate() {
            bytes[sector * 512 + index * 4..][..4].copy_from_slice(&entry.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn a_lost_table_entry_is_no_hole() {
    let (first, third) = (DATA, DATA + 8);
    let whole = [first, 0, third];
    assert!(open_bytes(&with_copied_table(whole, whole)).unwrap() == filled(&[1, 0, 3]));
    for (table, copy) in [([first, 0, 0], whole), (whole, [0, 0, third])] {
        let bytes = with_copied_table(table, copy);
        assert_fault(&bytes, ErrorKind::Malformed, "and its redundant copy disagree about grain");
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let source = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &options).unwrap();
        assert!(content(&source).unwrap() == filled(&[1, 0, 3]));
        assert!(
            source.doubts().iter().any(|doubt| doubt.reason.contains("redundant")),
            "{:?}",
            source.doubts()
        );
    }
}

#[test]
fn a_descriptor_without_extents_hides_no_parent() {
    // A torn rewrite: the descriptor of a snapshot is zeros.
    let mut torn = Sparse::new(1).grain(0, 1);
    torn.descriptor = String::new();
    assert_fault(&torn.bytes(), ErrorKind::Malformed, "no extent");
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VmdkDriver.open(memory::as_file("x.vmdk", &torn.bytes()), &options).unwrap();
    assert!(content(&source).unwrap() == filled(&[1]));
    // A parent without the content identifier that it must have.
    let mut hint = Sparse::new(1).grain(0, 1);
    hint.descriptor =
        "# Disk DescriptorFile\nCID=7\nparentFileNameHint=\"base.vmdk\"\nRW 8 SPARSE \"x\"\n".into();
    assert_fault(&hint.bytes(), ErrorKind::Malformed, "names a parent");
}

#[test]
fn a_descriptor_may_not_contradict_its_file() {
    for (line, text) in [
        ("RW 9 SPARSE \"x\"", "9 sectors"),
        ("RW 8 FLAT \"x\" 0", "SPARSE"),
        ("RW 8 ZERO", "SPARSE"),
        ("NOACCESS 8 SPARSE \"x\"", "SPARSE"),
        ("RW 4 SPARSE \"x\"\nRW 4 SPARSE \"y\"", "more than one extent"),
    ] {
        let mut file = Sparse::new(1).grain(0, 1);
        file.descriptor = format!("# Disk DescriptorFile\nCID=7\nparentCID=ffffffff\n{line}\n");
        let error = open_bytes(&file.bytes()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(text), "{line}: {error}");
    }
}

/// VirtualBox rounds the capacity of the header up to 64 KiB. The disk has the size of the descriptor.
#[test]
fn the_descriptor_decides_the_size_of_a_rounded_disk() {
    let of_line = |grains: u64, sectors: u64| {
        let mut file = Sparse::new(grains).grain(0, 1);
        file.descriptor = format!("CID=7\ncreateType=\"x\"\nRW {sectors} SPARSE \"x\"\n");
        file.bytes()
    };
    let bytes = of_line(1, 7);
    assert!(open_bytes(&bytes).unwrap() == filled(&[1])[..7 * 512]);
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "x.vmdk", &bytes);
    assert_eq!(check(&path).findings, [""; 0]);
    let source = crate::support::open_plainly(&path).unwrap();
    assert!(source.info().notes[0].contains("4096 bytes of the header"), "{:?}", source.info().notes);
    // 128 sectors for 1 to 128 of them, not for 0, nor 136 for 8 or less.
    assert_eq!(open_bytes(&of_line(16, 1)).unwrap().len(), 512);
    for (grains, sectors) in [(16, 0), (17, 8), (17, 128), (1000, 8)] {
        let bytes = of_line(grains, sectors);
        assert_fault(&bytes, ErrorKind::Malformed, &format!("{sectors} sectors, but the header"));
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let source = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &options).unwrap();
        assert_eq!(source.info().devices[0].size, grains * GRAIN as u64);
        assert!(source.doubts()[0].reason.contains("but the header"), "{:?}", source.doubts());
    }
}

#[test]
fn unknown_flags_without_duties_get_a_note() {
    let note = |file: &Sparse| {
        let source = VmdkDriver.open(memory::as_file("x.vmdk", &file.bytes()), &OpenOptions::default());
        source.unwrap().info().notes.join("; ")
    };
    assert_eq!(note(&Sparse::new(1).grain(0, 1)), "");
    assert!(note(&Sparse::new(1).grain(0, 1).with(9, &[1])).contains("unknown flags (0x100)"));
    assert_fault(&Sparse::new(1).grain(0, 1).with(11, &[1]).bytes(), ErrorKind::Unsupported, "unknown flags");
}
