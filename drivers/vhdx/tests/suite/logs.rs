//! Logs made byte by byte, replayed in memory, and compared with QEMU's replay.

use imgtool_core::{Driver, ErrorKind, OpenOptions};
use imgtool_testing::memory::unreadable_at;
use imgtool_testing::oracles::{self, qemu_img};
use imgtool_testing::text;
use imgtool_vhdx::VhdxDriver;

use crate::support::builder::{
    BAT_AT, BLOCKS_AT, Change, HEADERS_AT, LOG_GUID, LogEntry, METADATA_AT, VhdxBuilder, guid, seal_entry,
};
use crate::support::{MIB, content, input, open_file};

/// File offset of payload block 1, whose content the logs change.
const DATA_AT: u64 = BLOCKS_AT;

/// Returns a disk of four blocks of 1 MiB; each byte of the second is 1.
fn disk() -> VhdxBuilder {
    VhdxBuilder::new(4 * MIB, MIB, 512).bat(1, DATA_AT, 6).fill(DATA_AT, MIB, 1)
}

fn page(at: u64, byte: u8) -> Change {
    Change::Page { at, bytes: vec![byte; 4096] }
}

fn zero(at: u64, len: u64) -> Change {
    Change::Zero { at, len }
}

/// Returns an entry whose file lengths fit [`disk`].
fn entry(number: u64, tail: u64, changes: Vec<Change>) -> Vec<u8> {
    LogEntry { flushed: 5 * MIB, last: 5 * MIB, ..LogEntry::new(number, tail, changes) }.bytes()
}

/// Returns the content of [`disk`] with some pages of block 1 replaced: (page index, byte).
fn with_pages(pages: &[(usize, u8)]) -> Vec<u8> {
    let mut expected = [vec![0; MIB as usize], vec![1; MIB as usize], vec![0; 2 * MIB as usize]].concat();
    for (number, byte) in pages {
        expected[MIB as usize + 4096 * number..][..4096].fill(*byte);
    }
    expected
}

/// Asserts that the driver replays the log and reads `expected`.
#[track_caller]
fn assert_replayed_by_us(vhdx: &VhdxBuilder, expected: &[u8]) {
    let source = vhdx.open().unwrap_or_else(|e| panic!("{e}"));
    let found = content(&source).unwrap();
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("byte {at}: {} instead of {}", found[at], expected[at]);
    }
    assert_eq!(found.len(), expected.len());
    assert!(source.info().notes.iter().any(|note| note.contains("replayed in memory")));
    let report = VhdxDriver.check(input(&vhdx.bytes), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    assert!(report.findings[0].contains("log is not empty"));
}

/// Asserts that the driver reads `expected`, and that QEMU's replay of a copy gives the same content.
#[track_caller]
fn assert_replays(vhdx: &VhdxBuilder, expected: &[u8]) {
    assert_replayed_by_us(vhdx, expected);
    if !oracles::have("qemu-img") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (dirty, raw) = (directory.path().join("dirty.vhdx"), directory.path().join("x.raw"));
    std::fs::write(&dirty, &vhdx.bytes).unwrap();
    assert!(content(&open_file(&dirty).unwrap()).unwrap() == expected);
    assert!(std::fs::read(&dirty).unwrap() == vhdx.bytes, "the source was changed");
    qemu_img(&["check", "-r", "all", "-f", "vhdx", text(&dirty)]);
    let clean = open_file(&dirty).unwrap();
    assert!(clean.info().notes.is_empty(), "QEMU left a log: {:?}", clean.info().notes);
    assert!(content(&clean).unwrap() == expected, "QEMU's replay gives other content");
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&dirty), text(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == expected, "QEMU reads other content");
}

#[track_caller]
fn assert_refused(vhdx: &VhdxBuilder, kind: ErrorKind, words: &str) {
    let Err(error) = vhdx.open() else { panic!("opened") };
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

/// Salvage keeps the pages that the log replaces, although the file can't be read there.
#[test]
fn salvage_loses_only_the_page_that_cannot_be_read() {
    let changes = vec![page(DATA_AT + 4096, 2), zero(DATA_AT + 8192, 4096)];
    let vhdx = disk().log_entry(0, &entry(1, 0, changes));
    for (number, is_lost) in [(0, true), (1, false), (2, false), (3, true)] {
        let input = unreadable_at("memory.vhdx", &vhdx.bytes, DATA_AT + 4096 * number + 100);
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let source = VhdxDriver.open(input, &options).unwrap();
        let mut pages = vec![(1, 2), (2, 0)];
        pages.extend(is_lost.then_some((number as usize, 0)));
        // The second read knows what is lost.
        for _ in 0..2 {
            assert!(content(&source).unwrap() == with_pages(&pages), "page {number}");
        }
        let lost: Vec<_> = source.losses().into_iter().map(|loss| loss.guest).collect();
        let page = MIB + 4096 * number..MIB + 4096 * (number + 1);
        assert_eq!(lost, if is_lost { vec![page] } else { vec![] });
    }
}

#[test]
fn replays_data_and_zeros() {
    let changes = vec![page(DATA_AT, 2), zero(DATA_AT + 8192, 8192), page(DATA_AT + 40_960, 3)];
    let vhdx = disk().log_entry(0, &entry(1, 0, changes));
    assert_replays(&vhdx, &with_pages(&[(0, 2), (2, 0), (3, 0), (10, 3)]));
}

#[test]
fn restores_leading_and_trailing_bytes() {
    let bytes: Vec<u8> = (0..4096u32).map(|index| (index % 251) as u8 + 1).collect();
    let vhdx = disk().log_entry(0, &entry(1, 0, vec![Change::Page { at: DATA_AT, bytes: bytes.clone() }]));
    let mut expected = with_pages(&[]);
    expected[MIB as usize..][..4096].copy_from_slice(&bytes);
    assert_replays(&vhdx, &expected);
}

#[test]
fn replays_the_bat() {
    // The BAT in the file is empty; its first page is in the log.
    let mut bat = vec![0; 4096];
    bat[8..16].copy_from_slice(&(DATA_AT | 6).to_le_bytes());
    bat[24..32].copy_from_slice(&((DATA_AT + MIB) | 6).to_le_bytes());
    let vhdx = disk().bat(1, 0, 0).fill(DATA_AT + MIB, MIB, 9);
    let changes = vec![Change::Page { at: BAT_AT, bytes: bat }];
    let log = LogEntry { flushed: 6 * MIB, last: 6 * MIB, ..LogEntry::new(3, 0, changes) };
    let mut expected = with_pages(&[]);
    expected[3 * MIB as usize..].fill(9);
    assert_replays(&vhdx.log_entry(0, &log.bytes()), &expected);
}

#[test]
fn replays_metadata() {
    let vhdx = disk();
    let items_at = METADATA_AT + 65_536;
    let mut items = vhdx.bytes[items_at as usize..][..4096].to_vec();
    let old = items.windows(8).position(|window| window == (4 * MIB).to_le_bytes()).unwrap();
    items[old..old + 8].copy_from_slice(&(2 * MIB).to_le_bytes());
    let vhdx = vhdx.log_entry(0, &entry(1, 0, vec![Change::Page { at: items_at, bytes: items }]));
    assert_replays(&vhdx, &with_pages(&[])[..2 * MIB as usize]);
}

#[test]
fn replays_entries_in_order() {
    let first = entry(10, 0, vec![page(DATA_AT, 2), page(DATA_AT + 4096, 2), page(DATA_AT + 8192, 2)]);
    let second_at = first.len() as u64;
    let second = entry(11, 0, vec![zero(DATA_AT, 8192)]);
    let third_at = second_at + second.len() as u64;
    let third = entry(12, 0, vec![page(DATA_AT + 4096, 4)]);
    let vhdx = disk().log_entry(0, &first).log_entry(second_at, &second).log_entry(third_at, &third);
    assert_replays(&vhdx, &with_pages(&[(0, 0), (1, 4), (2, 2)]));
}

#[test]
fn skips_entries_before_the_tail() {
    let first = entry(10, 0, vec![page(DATA_AT, 2)]);
    let second_at = first.len() as u64;
    let second = entry(11, second_at, vec![page(DATA_AT + 4096, 3)]);
    let third = entry(12, second_at, vec![page(DATA_AT + 8192, 4)]);
    let vhdx = disk()
        .log_entry(0, &first)
        .log_entry(second_at, &second)
        .log_entry(second_at + second.len() as u64, &third);
    // QEMU 10.0 also applies the first entry, which is harmless: the writer must have flushed it.
    assert_replayed_by_us(&vhdx, &with_pages(&[(1, 3), (2, 4)]));
}

#[test]
fn replays_an_entry_that_wraps_around() {
    // Header sector at the very end, data sectors at the start.
    let at = MIB - 4096;
    let changes = vec![page(DATA_AT, 2), page(DATA_AT + 4096, 3), zero(DATA_AT + 8192, 4096)];
    assert_replays(&disk().log_entry(at, &entry(7, at, changes)), &with_pages(&[(0, 2), (1, 3), (2, 0)]));
}

#[test]
fn replays_a_sequence_that_wraps_around() {
    let first = entry(20, MIB - 8192, vec![page(DATA_AT, 2)]);
    assert_eq!(first.len(), 8192);
    let second = entry(21, MIB - 8192, vec![page(DATA_AT + 4096, 3)]);
    let third = entry(22, MIB - 8192, vec![page(DATA_AT, 5)]);
    let vhdx =
        disk().log_entry(MIB - 8192, &first).log_entry(0, &second).log_entry(second.len() as u64, &third);
    assert_replays(&vhdx, &with_pages(&[(0, 5), (1, 3)]));
}

#[test]
fn replays_the_sequence_with_the_highest_number() {
    for (old_at, new_at) in [(0, 512 << 10), (512 << 10, 0)] {
        let vhdx = disk()
            .log_entry(old_at, &entry(30, old_at, vec![page(DATA_AT, 2)]))
            .log_entry(new_at, &entry(90, new_at, vec![page(DATA_AT + 4096, 3)]));
        assert_replays(&vhdx, &with_pages(&[(1, 3)]));
    }
}

#[test]
fn skips_a_torn_last_entry() {
    let first = entry(10, 0, vec![page(DATA_AT, 2)]);
    let second_at = first.len() as u64;
    let mut second = entry(11, 0, vec![page(DATA_AT + 4096, 3), page(DATA_AT + 8192, 3)]);
    *second.last_mut().unwrap() ^= 1;
    let vhdx = disk().log_entry(0, &first).log_entry(second_at, &second);
    assert_replays(&vhdx, &with_pages(&[(0, 2)]));
}

#[test]
fn skips_entries_of_another_log() {
    let first = entry(10, 0, vec![page(DATA_AT, 2)]);
    let stale =
        LogEntry::new(11, 0, vec![page(DATA_AT + 4096, 3)]).bytes_for("99999999-2222-3333-4444-555555555555");
    let vhdx = disk().log_entry(0, &first).log_entry(first.len() as u64, &stale);
    assert_replays(&vhdx, &with_pages(&[(0, 2)]));
}

#[test]
fn a_gap_in_sequence_numbers_starts_a_new_sequence() {
    let first = entry(10, 0, vec![page(DATA_AT, 2)]);
    let second_at = first.len() as u64;
    // A separate sequence, and the active one.
    let second = entry(12, second_at, vec![page(DATA_AT + 4096, 3)]);
    let vhdx = disk().log_entry(0, &first).log_entry(second_at, &second);
    // QEMU 10.0 replays the sequence with the lower number; no writer leaves such a log.
    assert_replayed_by_us(&vhdx, &with_pages(&[(1, 3)]));
}

#[test]
fn skips_a_sequence_without_its_tail() {
    let old = entry(10, 0, vec![page(DATA_AT, 2)]);
    // Its tail points to 512 KiB, where there is no entry.
    let headless = entry(50, 512 << 10, vec![page(DATA_AT + 4096, 3)]);
    let vhdx = disk().log_entry(0, &old).log_entry(256 << 10, &headless);
    let source = vhdx.open().unwrap();
    assert!(content(&source).unwrap() == with_pages(&[(0, 2)]));
    assert_refused(
        &disk().log_entry(256 << 10, &headless),
        ErrorKind::Corrupt,
        "no valid sequence (1 valid entries)",
    );
}

/// Returns an entry with `count` descriptors, both zeros and data, and the disk's content after replay.
fn many_descriptors(count: usize) -> (Vec<u8>, Vec<u8>) {
    let byte = |page: usize| if page.is_multiple_of(3) { 0 } else { (page % 250) as u8 + 2 };
    let changes = (0..count)
        .map(|index| {
            let at = DATA_AT + 4096 * index as u64;
            if byte(index) == 0 { zero(at, 4096) } else { page(at, byte(index)) }
        })
        .collect();
    let pages: Vec<(usize, u8)> = (0..count).map(|index| (index, byte(index))).collect();
    (entry(1, 4096, changes), with_pages(&pages))
}

#[test]
fn replays_entries_with_several_descriptor_sectors() {
    // 126 descriptors fit into the sector of the entry's header; QEMU 10.0 replays no more.
    let (entry, expected) = many_descriptors(126);
    assert_replays(&disk().log_entry(4096, &entry), &expected);
    for count in [127, 200, 254, 255] {
        let (entry, expected) = many_descriptors(count);
        assert_replayed_by_us(&disk().log_entry(4096, &entry), &expected);
    }
}

#[test]
fn replay_extends_the_file() {
    // Block 3 is beyond the end of the file: the log extends the file and writes one page.
    let mut bat = vec![0; 4096];
    bat[8..16].copy_from_slice(&(DATA_AT | 6).to_le_bytes());
    bat[24..32].copy_from_slice(&((DATA_AT + MIB) | 6).to_le_bytes());
    let table = Change::Page { at: BAT_AT, bytes: bat };
    let grown = |at: u64| {
        let changes = vec![table.clone(), page(DATA_AT + MIB + at, 8)];
        let log = LogEntry { flushed: 5 * MIB, last: 6 * MIB, ..LogEntry::new(3, 0, changes) };
        let mut expected = with_pages(&[]);
        expected[(3 * MIB + at) as usize..][..4096].fill(8);
        (disk().log_entry(0, &log.bytes()), expected)
    };
    let (vhdx, expected) = grown(MIB - 4096);
    assert_replays(&vhdx, &expected);
    // QEMU 10.0 does not extend the file to the entry's length, and then lacks the block's end.
    let (vhdx, expected) = grown(4096);
    assert_replayed_by_us(&vhdx, &expected);
}

#[test]
fn refuses_logs_without_a_valid_sequence() {
    let marked = || disk().header_field(48, &guid(LOG_GUID));
    assert_refused(&marked(), ErrorKind::Corrupt, "no valid sequence (0 valid entries)");
    assert_refused(&marked().header_field(64, &1u16.to_le_bytes()), ErrorKind::Unsupported, "version 1");
    assert_refused(&marked().header_field(68, &0u32.to_le_bytes()), ErrorKind::Corrupt, "0 bytes do not lie");
    assert_refused(&marked().header_field(72, &(900 * MIB).to_le_bytes()), ErrorKind::Corrupt, "do not lie");
    let long = LogEntry { flushed: 50 * MIB, ..LogEntry::new(1, 0, vec![page(DATA_AT, 1)]) };
    assert_refused(&disk().log_entry(0, &long.bytes()), ErrorKind::Corrupt, "had 52428800");
    let endless = LogEntry { last: u64::MAX, ..LogEntry::new(1, 0, vec![page(DATA_AT, 1)]) };
    assert_refused(&disk().log_entry(0, &endless.bytes()), ErrorKind::Malformed, "bytes long");
    let report = VhdxDriver.check(input(&marked().bytes), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 1);
}

#[test]
fn refuses_inconsistent_entries() {
    let damage = |at: usize, bytes: &[u8]| {
        let mut entry = entry(9, 0, vec![page(DATA_AT, 2), zero(DATA_AT, 4096)]);
        entry[at..at + bytes.len()].copy_from_slice(bytes);
        seal_entry(&mut entry);
        disk().log_entry(0, &entry)
    };
    let malformed = |vhdx: &VhdxBuilder, words: &str| assert_refused(vhdx, ErrorKind::Malformed, words);
    malformed(&damage(64, b"dead"), "descriptor 0 of log entry 9");
    malformed(&damage(64 + 24, &8u64.to_le_bytes()), "descriptor 0");
    malformed(&damage(64 + 16, &100u64.to_le_bytes()), "descriptor 0");
    malformed(&damage(64 + 16, &(u64::MAX - 4095).to_le_bytes()), "descriptor 0");
    malformed(&damage(96 + 8, &100u64.to_le_bytes()), "descriptor 1");
    malformed(&damage(96 + 8, &(u64::MAX - 4095).to_le_bytes()), "descriptor 1");
    malformed(&damage(96, b"desc"), "too short");
    malformed(&damage(4096, b"dada"), "data sector");
    malformed(&damage(4096 + 4, &[1]), "data sector");
    malformed(&damage(8188, &[1]), "data sector");
    // Entries with an impossible header are not valid entries.
    for (at, bytes) in [
        (8, 0u32.to_le_bytes()),
        (8, 100u32.to_le_bytes()),
        (8, u32::MAX.to_le_bytes()),
        (12, 100u32.to_le_bytes()),
        (12, (2 * MIB as u32).to_le_bytes()),
        (24, 10_000u32.to_le_bytes()),
        (24, u32::MAX.to_le_bytes()),
    ] {
        assert_refused(&damage(at, &bytes), ErrorKind::Corrupt, "no valid sequence");
    }
    assert_refused(&damage(16, &0u64.to_le_bytes()), ErrorKind::Corrupt, "no valid sequence");
}

#[test]
fn huge_zero_descriptors_take_no_memory() {
    // A valid descriptor of 2^62 bytes beyond the image's structures.
    let changes = vec![zero(DATA_AT, 1 << 62)];
    let vhdx = disk().log_entry(0, &entry(1, 0, changes));
    assert!(content(&vhdx.open().unwrap()).unwrap() == vec![0; 4 * MIB as usize]);
}

#[test]
fn replays_the_log_of_the_current_header() {
    // The older header still has the log's GUID; the newer one has none.
    let mut vhdx = disk().log_entry(0, &entry(1, 0, vec![page(DATA_AT, 2)]));
    vhdx.put(HEADERS_AT[1] as u64 + 8, &50u64.to_le_bytes());
    vhdx.put(HEADERS_AT[1] as u64 + 48, &[0; 16]);
    vhdx.seal(HEADERS_AT[1], 4096);
    let source = vhdx.open().unwrap();
    assert!(content(&source).unwrap() == with_pages(&[]));
    assert!(source.info().notes.is_empty());
}
