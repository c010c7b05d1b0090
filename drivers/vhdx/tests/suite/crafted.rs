//! Files built byte by byte: valid ones, damaged ones that can be read, and refusals.

use imgtool_core::{CheckReport, Driver, ErrorKind, OpenOptions};
use imgtool_testing::memory::unreadable_at;
use imgtool_vhdx::VhdxDriver;

use crate::support::builder::{
    BAT_AT, BAT_GUID, BLOCKS_AT, DISK_ID, DISK_SIZE, FILE_PARAMETERS, HEADERS_AT, LOGICAL, METADATA_AT,
    METADATA_GUID, PHYSICAL, REGIONS_AT, VhdxBuilder, guid,
};
use crate::support::{GIB, MIB, TIB, content, disk_of, input, open_bytes};

/// Returns a disk of four blocks of 1 MiB; each byte of the second is 1.
fn four_blocks() -> VhdxBuilder {
    VhdxBuilder::new(4 * MIB, MIB, 512).bat(1, BLOCKS_AT, 6).fill(BLOCKS_AT, MIB, 1)
}

/// Returns the content of [`four_blocks`].
fn expected() -> Vec<u8> {
    [vec![0; MIB as usize], vec![1; MIB as usize], vec![0; 2 * MIB as usize]].concat()
}

#[track_caller]
fn assert_reads(vhdx: &VhdxBuilder, expected: &[u8]) {
    let source = vhdx.open().unwrap_or_else(|e| panic!("{e}"));
    assert!(content(&source).unwrap() == expected);
}

/// Asserts that opening fails with an error of this kind that contains `words`.
#[track_caller]
fn assert_refused(vhdx: &VhdxBuilder, kind: ErrorKind, words: &str) {
    match vhdx.open() {
        Ok(_) => panic!("opened"),
        Err(error) => {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}

fn check(vhdx: &VhdxBuilder) -> CheckReport {
    VhdxDriver.check(input(&vhdx.bytes), &OpenOptions::default()).unwrap()
}

/// Asserts that `check` reports corruption with these words.
#[track_caller]
fn assert_finding(vhdx: &VhdxBuilder, words: &str) {
    let report = check(vhdx);
    assert!(report.corruptions > 0, "nothing found");
    assert!(report.findings.iter().any(|line| line.contains(words)), "{:?}", report.findings);
}

#[test]
fn reads_a_sound_image() {
    assert_reads(&four_blocks(), &expected());
    let report = check(&four_blocks());
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    assert_eq!((report.total_clusters, report.allocated_clusters), (Some(4), Some(1)));
    assert_eq!(report.image_end_offset, Some(BLOCKS_AT + MIB));
}

#[test]
fn info_lists_the_facts() {
    let source = four_blocks().open().unwrap();
    let info = source.info();
    let fact = |key: &str| info.facts.iter().find(|fact| fact.key == key).map(|fact| fact.value.to_string());
    assert_eq!(fact("subformat").as_deref(), Some("\"dynamic\""));
    assert_eq!(fact("block-size").as_deref(), Some("1048576"));
    assert_eq!(fact("logical-sector-size").as_deref(), Some("512"));
    assert_eq!(fact("physical-sector-size").as_deref(), Some("4096"));
    assert_eq!(fact("header-sequence-numbers").as_deref(), Some("[7,8]"));
    assert_eq!(fact("log").as_deref(), Some("\"empty\""));
    assert_eq!(fact("creator").as_deref(), Some("\"test\""));
    assert_eq!(fact("disk-id").as_deref(), Some("\"12345678-1234-1234-1234-123456789abc\""));
    assert_eq!(fact("data-write-guid").as_deref(), Some("\"dddddddd-0000-4000-8000-000000000001\""));
    assert_eq!(info.cluster_size, Some(MIB));
}

#[test]
fn reads_zeros_in_blocks_without_content() {
    // 5 is "unmapped" in version 0.95. The entry's offset points to data, which must not be read.
    for state in [0, 1, 2, 3, 5] {
        let vhdx = four_blocks().bat(2, BLOCKS_AT, state);
        assert_reads(&vhdx, &expected());
    }
}

#[test]
fn refuses_reserved_states() {
    let vhdx = four_blocks().bat(2, BLOCKS_AT, 4);
    let error = content(&vhdx.open().unwrap()).unwrap_err();
    assert!(error.to_string().contains("reserved state 4"), "{error}");
    assert_eq!(error.guest_range(), Some(2 * MIB..3 * MIB));
    assert_eq!(error.file_offset(), Some(BAT_AT + 16));
    assert_finding(&vhdx, "reserved state 4");
}

#[test]
fn refuses_partially_present_blocks_without_a_parent() {
    let vhdx = four_blocks().bat(2, BLOCKS_AT, 7);
    let error = content(&vhdx.open().unwrap()).unwrap_err();
    assert!(error.to_string().contains("no parent"), "{error}");
    assert_finding(&vhdx, "no parent");
}

#[test]
fn refuses_blocks_past_the_end_of_the_file() {
    let vhdx = four_blocks().bat(2, 900 * MIB, 6);
    let error = content(&vhdx.open().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!((error.guest_range(), error.file_offset()), (Some(2 * MIB..3 * MIB), Some(900 * MIB)));
    assert!(error.hint_text().is_some());
    assert_finding(&vhdx, "but the file ends at");
    let huge = four_blocks().bat(2, !(MIB - 1), 6);
    assert!(content(&huge.open().unwrap()).is_err());
}

#[test]
fn salvage_reads_sound_blocks_and_lists_losses() {
    let vhdx = four_blocks().bat(2, 900 * MIB, 6).bat(3, 0, 4);
    let source = vhdx.salvage().unwrap();
    assert!(content(&source).unwrap() == expected());
    let losses = source.losses();
    assert!(losses.iter().any(|loss| loss.guest == (2 * MIB..3 * MIB)), "{losses:?}");
    assert!(losses.iter().all(|loss| loss.guest.start >= 2 * MIB), "{losses:?}");
}

#[test]
fn reads_a_truncated_last_block_that_covers_the_disk() {
    let size = 3 * MIB + 4096;
    let mut vhdx = VhdxBuilder::new(size, 2 * MIB, 512).bat(1, BLOCKS_AT, 6).fill(BLOCKS_AT, 2 * MIB, 3);
    vhdx.bytes.truncate((BLOCKS_AT + MIB + 4096) as usize);
    let expected = [vec![0; 2 * MIB as usize], vec![3; MIB as usize + 4096]].concat();
    assert_reads(&vhdx, &expected);
    assert_eq!(check(&vhdx).corruptions, 0);
    vhdx.bytes.truncate((BLOCKS_AT + MIB + 4095) as usize);
    assert!(content(&vhdx.open().unwrap()).is_err());
    assert_finding(&vhdx, "but the file ends at");
}

#[test]
fn refuses_blocks_inside_the_tables() {
    for (at, name) in [(0, "header section"), (MIB, "log"), (METADATA_AT, "metadata"), (BAT_AT, "BAT")] {
        let vhdx = four_blocks().bat(2, at, 6);
        let error = content(&vhdx.open().unwrap()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_finding(&vhdx, name);
    }
}

#[test]
fn check_finds_overlapping_blocks() {
    assert_finding(&four_blocks().bat(3, BLOCKS_AT, 6), "another block uses");
    assert_finding(&VhdxBuilder::new(4 * GIB + MIB, MIB, 512).bat(4096, BLOCKS_AT, 6), "sector bitmap");
}

#[test]
fn interleaves_bitmap_entries() {
    // 1 MiB blocks, 512-byte sectors: entry 4096 is for a bitmap, block 4096 (at 4 GiB) has entry 4097.
    let vhdx = VhdxBuilder::new(4 * GIB + 2 * MIB, MIB, 512)
        .bat(4095, BLOCKS_AT, 6)
        .fill(BLOCKS_AT, MIB, 5)
        .bat(4097, BLOCKS_AT + MIB, 6)
        .fill(BLOCKS_AT + MIB, MIB, 6)
        .bat(4098, BLOCKS_AT + 2 * MIB, 6)
        .fill(BLOCKS_AT + 2 * MIB, MIB, 7);
    let disk = disk_of(&vhdx.open().unwrap());
    let mut byte = [0];
    for (at, expected) in
        [(4 * GIB - MIB - 1, 0), (4 * GIB - MIB, 5), (4 * GIB - 1, 5), (4 * GIB, 6), (4 * GIB + MIB, 7)]
    {
        disk.read_at(&mut byte, at).unwrap();
        assert_eq!(byte[0], expected, "at {at}");
    }
    // With 4096-byte sectors a chunk is eight times as long.
    let vhdx = VhdxBuilder::new(4 * GIB + 2 * MIB, MIB, 4096).bat(4096, BLOCKS_AT, 6).fill(BLOCKS_AT, MIB, 6);
    disk_of(&vhdx.open().unwrap()).read_at(&mut byte, 4 * GIB).unwrap();
    assert_eq!(byte[0], 6);
}

#[test]
fn survives_one_torn_header() {
    for (at, ordinal) in HEADERS_AT.into_iter().zip(["first", "second"]) {
        for damage in [at, at + 5, at + 100, at + 4095] {
            let mut vhdx = four_blocks();
            vhdx.bytes[damage] ^= 0x55;
            assert_reads(&vhdx, &expected());
            assert!(vhdx.open().unwrap().info().notes[0].contains(ordinal));
            assert_finding(&vhdx, ordinal);
        }
    }
}

#[test]
fn uses_the_header_with_the_higher_sequence_number() {
    for newer in HEADERS_AT {
        let mut vhdx = four_blocks();
        vhdx.put(newer as u64 + 8, &100u64.to_le_bytes());
        vhdx.put(newer as u64 + 32, &guid("eeeeeeee-0000-4000-8000-000000000001"));
        vhdx.seal(newer, 4096);
        let source = vhdx.open().unwrap();
        let fact = source.info().facts.iter().find(|fact| fact.key == "data-write-guid").unwrap();
        assert_eq!(fact.value, "eeeeeeee-0000-4000-8000-000000000001");
    }
}

#[test]
fn refuses_images_without_a_current_header() {
    let mut vhdx = four_blocks();
    vhdx.bytes[HEADERS_AT[0] + 9] ^= 1;
    vhdx.bytes[HEADERS_AT[1]] = 0;
    assert_refused(&vhdx, ErrorKind::Corrupt, "neither header is valid");
    assert_finding(&vhdx, "neither header is valid");
    let equal = four_blocks().header_field(8, &9u64.to_le_bytes());
    assert_reads(&equal, &expected());
    let mut differing = equal;
    differing.put(HEADERS_AT[0] as u64 + 16, &[9]);
    differing.seal(HEADERS_AT[0], 4096);
    assert_refused(&differing, ErrorKind::Corrupt, "sequence number 9 but differ");
}

#[test]
fn enforces_header_rules() {
    assert_refused(&four_blocks().header_field(66, &2u16.to_le_bytes()), ErrorKind::Malformed, "version 2");
    let unaligned = four_blocks().header_field(72, &4096u64.to_le_bytes());
    assert_refused(&unaligned, ErrorKind::Malformed, "log at 4096");
    assert_refused(&four_blocks().header_field(72, &BAT_AT.to_le_bytes()), ErrorKind::Malformed, "overlap");
    let mut foreign = four_blocks();
    foreign.bytes[0] = b'x';
    assert_refused(&foreign, ErrorKind::WrongFormat, "signature");
    assert!(VhdxDriver.probe(&foreign.bytes[..4096], None).is_none());
}

#[test]
fn survives_one_damaged_region_table() {
    for (at, ordinal) in REGIONS_AT.into_iter().zip(["first", "second"]) {
        for damage in [at, at + 5, at + 17, at + 65_535] {
            let mut vhdx = four_blocks();
            vhdx.bytes[damage] ^= 0x55;
            assert_reads(&vhdx, &expected());
            assert_finding(&vhdx, ordinal);
        }
    }
    let mut both = four_blocks();
    both.bytes[REGIONS_AT[0]] = 0;
    both.bytes[REGIONS_AT[1]] = 0;
    assert_refused(&both, ErrorKind::Corrupt, "neither region table");
    let mut differing = four_blocks();
    differing.put(REGIONS_AT[1] as u64 + 16 + 16, &(900 * MIB).to_le_bytes());
    differing.seal(REGIONS_AT[1], 65_536);
    assert_reads(&differing, &expected());
    assert_finding(&differing, "differ");
}

#[test]
fn refuses_unknown_required_regions() {
    let unknown = "99999999-aaaa-bbbb-cccc-dddddddddddd";
    assert_reads(&four_blocks().region(unknown, 100 * MIB, MIB as u32, 0), &expected());
    let required = four_blocks().region(unknown, 100 * MIB, MIB as u32, 1);
    assert_refused(&required, ErrorKind::Unsupported, unknown);
    // QEMU marks neither BAT nor metadata as required.
    let lax = four_blocks().region(BAT_GUID, BAT_AT, MIB as u32, 0);
    assert_reads(&lax.region(METADATA_GUID, METADATA_AT, MIB as u32, 0), &expected());
}

#[test]
fn enforces_region_rules() {
    let place = |at: u64, len: u32| four_blocks().region(BAT_GUID, at, len, 1);
    assert_refused(&place(BAT_AT + 512, MIB as u32), ErrorKind::Corrupt, "multiples of 1 MiB");
    assert_refused(&place(0, MIB as u32), ErrorKind::Corrupt, "at least 1 MiB");
    assert_refused(&place(!(MIB - 1), MIB as u32), ErrorKind::Corrupt, "multiples of 1 MiB");
    assert_refused(&place(METADATA_AT, MIB as u32), ErrorKind::Corrupt, "overlap");
    assert_refused(&place(MIB, MIB as u32), ErrorKind::Malformed, "log at");
    assert_refused(&place(900 * MIB, MIB as u32), ErrorKind::Corrupt, "within its BAT");
    let small = VhdxBuilder::new(TIB, MIB, 512);
    assert_refused(&small, ErrorKind::Malformed, "needs 8390");
    let mut many = four_blocks();
    for at in REGIONS_AT {
        many.put(at as u64 + 8, &2048u32.to_le_bytes());
        many.seal(at, 65_536);
    }
    assert_refused(&many, ErrorKind::Corrupt, "2048 entries");
}

#[test]
fn refuses_unknown_required_metadata_items() {
    let unknown = "99999999-aaaa-bbbb-cccc-dddddddddddd";
    assert_reads(&four_blocks().item(unknown, 0, &[1, 2, 3]), &expected());
    // A user item does not describe the disk.
    assert_reads(&four_blocks().item(unknown, 1, &[]), &expected());
    for flags in [4, 5, 6] {
        assert_refused(&four_blocks().item(unknown, flags, &[1]), ErrorKind::Unsupported, unknown);
    }
}

#[test]
fn enforces_metadata_rules() {
    let malformed = |vhdx: &VhdxBuilder, words: &str| assert_refused(vhdx, ErrorKind::Malformed, words);
    let parameters = |block_size: u32| {
        four_blocks().item(FILE_PARAMETERS, 4, &[block_size.to_le_bytes(), [0; 4]].concat())
    };
    for block_size in [0, 1, 512 << 10, 3 << 20, 512 << 20, u32::MAX] {
        malformed(&parameters(block_size), "block size");
    }
    let size = |size: u64| four_blocks().item(DISK_SIZE, 6, &size.to_le_bytes());
    malformed(&size(64 * TIB + 512), "64 TiB");
    malformed(&size(u64::MAX), "64 TiB");
    malformed(&size(MIB + 100), "not a multiple");
    for bad in [0u32, 1, 1024, 8192] {
        malformed(&four_blocks().item(LOGICAL, 6, &bad.to_le_bytes()), "logical sector size");
    }
    malformed(&four_blocks().item(PHYSICAL, 6, &1024u32.to_le_bytes()), "physical sector size");
    malformed(&four_blocks().without_item(FILE_PARAMETERS), "no file parameters");
    malformed(&four_blocks().without_item(DISK_SIZE), "no virtual disk size");
    malformed(&four_blocks().without_item(LOGICAL), "no logical sector size");
    malformed(&four_blocks().item(DISK_SIZE, 6, &[0; 4]), "4 bytes instead of 8");
    assert_reads(&four_blocks().without_item(PHYSICAL).without_item(DISK_ID), &expected());
    let field = |at: u64, bytes: &[u8]| {
        let mut vhdx = four_blocks();
        vhdx.put(METADATA_AT + at, bytes);
        vhdx
    };
    malformed(&field(0, b"metadatb"), "no signature");
    malformed(&field(10, &2048u16.to_le_bytes()), "2048 entries");
    malformed(&field(32 + 16, &100u32.to_le_bytes()), "outside");
    malformed(&field(32 + 16, &u32::MAX.to_le_bytes()), "outside");
    malformed(&field(32 + 20, &u32::MAX.to_le_bytes()), "outside");
    malformed(&field(64, &guid(FILE_PARAMETERS)), "twice");
}

#[test]
fn reads_an_empty_disk() {
    let source = VhdxBuilder::new(0, MIB, 512).open().unwrap();
    assert_eq!(source.info().devices[0].size, 0);
}

#[test]
fn refuses_files_truncated_within_the_structures() {
    for len in [0, 7, 8, 520, 70_000, 200_000, MIB as usize, 3 * MIB as usize] {
        assert!(open_bytes(&four_blocks().bytes[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn refuses_an_unreadable_header_except_in_salvage() {
    // The second header is current; the first is older and may be out of date.
    let vhdx = four_blocks();
    let open = |at: usize, salvage: bool| {
        let options = OpenOptions { salvage, ..OpenOptions::default() };
        VhdxDriver.open(unreadable_at("memory.vhdx", &vhdx.bytes, at as u64), &options)
    };
    for at in HEADERS_AT {
        let error = open(at, false).expect_err("refused");
        assert_eq!((error.kind(), error.file_offset()), (ErrorKind::Io, Some(at as u64)), "{error}");
        let source = open(at, true).unwrap();
        assert!(source.info().notes.iter().any(|note| note.contains("can't be read")));
        assert!(content(&source).unwrap() == expected());
    }
    // One copy of the region table is enough, since both have the same content.
    for at in REGIONS_AT {
        let source = open(at, false).unwrap();
        assert!(source.info().notes.iter().any(|note| note.contains("can't be read")));
        assert!(content(&source).unwrap() == expected());
    }
}
