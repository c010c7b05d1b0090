//! Input on which the reference program (7.2 to 11.0) crashes, writes outside its directory, or misses a
//! fault. Each test describes the program's behaviour ("Reference") and asserts the driver's ("Ours").

use imgtool_core::error::escape_control;
use imgtool_core::sync::lock;
use imgtool_core::{Access, BufferPool, Driver, ErrorKind, ImageSource, OpenOptions};
use imgtool_testing::fixture;
use imgtool_testing::vma::{ArchiveBuilder, block_content, extent, guest_content, slot};
use imgtool_vma::{ArchiveHeader, VmaDriver, VmaSource, reference};

use crate::support::{self, as_file, as_stream, open_file, piped, read_both};

const CLUSTER: u64 = 65_536;

fn header(builder: &ArchiveBuilder) -> ArchiveHeader {
    ArchiveHeader::read(as_file(&builder.build())).unwrap()
}

fn open(builder: &ArchiveBuilder) -> VmaSource {
    VmaSource::open(as_file(&builder.build()), &OpenOptions::default()).unwrap()
}

fn error_of(builder: &ArchiveBuilder) -> imgtool_core::Error {
    read_both(&builder.build(), &OpenOptions::default()).unwrap_err()
}

/// Returns the error of an archive whose devices exceed memory. Asserts that file and stream agree.
fn error_of_huge(builder: &ArchiveBuilder) -> imgtool_core::Error {
    let archive = builder.build();
    let from_file = VmaSource::open(as_file(&archive), &OpenOptions::default()).err().unwrap();
    let from_stream = VmaSource::open(as_stream(&archive), &OpenOptions::default()).and_then(|source| {
        let Access::Stream(stream) = source.access() else { panic!("a stream is sequential") };
        while lock(stream).next_piece(&BufferPool::new())?.is_some() {}
        Ok(())
    });
    assert_eq!(from_file.to_string(), from_stream.unwrap_err().to_string());
    from_file
}

/// Returns a builder of an archive with one disk of one cluster.
fn one_cluster() -> ArchiveBuilder {
    ArchiveBuilder::new().device(1, "a", CLUSTER).extent(extent(&[slot(1, 0, 1)]))
}

/// Reference: writes a configuration called `../evil.conf` outside the directory; fails on absolute
/// and empty names and `.` with "unable to write file".
/// Ours: returns names unchanged and never uses them as paths; the writer refuses or reduces them.
#[test]
fn returns_configuration_names_unchanged() {
    for name in ["../evil.conf", "/etc/passwd", "", ".", "a/b", "disk-a.raw", "vmstate.bin"] {
        let source = open(&one_cluster().config(name, b"x"));
        assert_eq!(source.info().attachments[0].name, name);
    }
}

/// Reference: a device called `../../x` fails only because its file name has a prefix; `\n` and
/// terminal codes forge lines of `list`.
/// Ours: returns the name unchanged; errors escape it.
#[test]
fn escapes_device_names_in_errors() {
    let name = "x\nDEV: dev_id=9\x1b[2J";
    let builder =
        ArchiveBuilder::new().device(1, name, CLUSTER).extent(extent(&[slot(1, 0, 1), slot(1, 0, 1)]));
    let error = error_of(&builder);
    assert_eq!(error.device_name(), Some(name));
    assert!(!error.to_string().chars().any(char::is_control));
    assert!(!escape_control(name).contains('\n'));
}

/// Reference: writes two devices of the same name to one file, then fails to rename it.
/// Ours: distinguishes them by id and adds a note.
#[test]
fn distinguishes_devices_with_equal_names_by_id() {
    let builder = ArchiveBuilder::new()
        .device(1, "a", 4096)
        .device(2, "a", 4096)
        .extent(extent(&[slot(2, 0, 1), slot(1, 0, 1)]));
    let content = read_both(&builder.build(), &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], block_content(1, 0, 0));
    assert_eq!(content[&2], block_content(2, 0, 0));
    assert!(open(&builder).info().notes.contains(&"devices 1 and 2 have the same name".to_owned()));
}

/// Reference: overwrites the first of two configurations of the same name with the second.
/// Ours: returns both and adds a note.
#[test]
fn keeps_both_configurations_with_equal_names() {
    let header = header(&one_cluster().config("c", b"1").config("c", b"2"));
    assert_eq!(
        (header.configs[0].data.as_slice(), header.configs[1].data.as_slice()),
        (&b"1"[..], &b"2"[..])
    );
    assert_eq!(header.notes, ["configuration entry 1 has the name of an earlier one"]);
}

/// Reference: reads 4 GiB out of bounds for a name blob of zero length (SIGSEGV).
/// Ours: ignores such a device and refuses such a configuration.
#[test]
fn rejects_name_blobs_of_zero_length() {
    let builder = one_cluster().with(|archive| {
        let empty = archive.blob(b"");
        archive.devices.push((2, empty, 4096));
    });
    assert_eq!(open(&builder).info().notes, ["device entry 2 is ignored: its name can't be found"]);
    let builder = one_cluster().with(|archive| {
        let empty = archive.blob(b"");
        archive.configs.push((0, empty, empty));
    });
    assert_eq!(error_of(&builder).message(), "vma contains invalid data pointers");
}

/// Reference: adds offset and size of the blob area in 32 bits, which wraps (SIGSEGV, or an empty list).
/// Ours: adds in 64 bits.
#[test]
fn blob_bounds_do_not_wrap() {
    for (offset, size) in
        [(12_288, u32::MAX), (u32::MAX, 2), (u32::MAX, u32::MAX), (0x8000_0000, 0x8000_0200)]
    {
        let builder = one_cluster().with(|archive| {
            archive.blob_buffer_offset = offset;
            archive.blob_buffer_size = Some(size);
        });
        assert_eq!(error_of(&builder).kind(), ErrorKind::Malformed);
    }
}

/// Reference: allocates up to 2 GiB for a header before it checks anything.
/// Ours: reads at most 16 MiB, and allocates little more than the length of the file.
#[test]
fn header_sizes_are_bounded() {
    for size in [(16 << 20) + 1, i32::MAX as u32, u32::MAX] {
        let error = error_of(&one_cluster().with(|archive| archive.header_size = Some(size)));
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    }
    let error = error_of(&one_cluster().with(|archive| archive.header_size = Some(16 << 20)));
    assert_eq!(error.message(), "can't read vma header data - got EOF");
}

/// Reference: tries to allocate terabytes for 2^62 bytes, and prints sizes from 2^63 on as negative.
/// Ours: refuses more than 2^32 clusters; memory grows with the clusters in the archive.
#[test]
fn device_sizes_are_bounded() {
    for size in [(1 << 48) + 1, 1 << 62, 1 << 63, u64::MAX] {
        let error = error_of_huge(&ArchiveBuilder::new().device(1, "a", size));
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    }
    let error =
        error_of_huge(&ArchiveBuilder::new().device(1, "a", 1 << 48).extent(extent(&[slot(1, 0, 0)])));
    assert_eq!(error.message(), "detected missing cluster 1 for stream a");
    assert!(error.hint_text().unwrap().starts_with("4294967295 of 4294967296 clusters are missing"));
}

/// Reference: aborts (exit code 134) on a cluster far past the end, and in `verify` on unknown devices and on
/// device 255.
/// Ours: fails with the file offset of the extent.
#[test]
fn refuses_wrong_slots_with_the_extent_offset() {
    for (bad, message) in [
        (slot(1, 100_000, 0), "got wrong block address - write beyond end"),
        (slot(2, 0, 0), "got wrong dev id 2"),
        (slot(255, 0, 1), "got wrong dev id 255"),
    ] {
        let builder =
            ArchiveBuilder::new().device(1, "a", CLUSTER).device(255, "b", 512).extent(extent(&[bad]));
        let error = error_of(&builder);
        assert_eq!((error.message(), error.file_offset()), (message, Some(12_800)));
        let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
        assert!(report.findings.iter().any(|finding| finding.contains(message)));
    }
}

/// Reference: `verify` does not detect missing clusters.
/// Ours: reading fails on them, and `check` reports them.
#[test]
fn read_and_check_report_missing_clusters() {
    let builder =
        ArchiveBuilder::new().device(1, "a", 3 * CLUSTER).extent(extent(&[slot(1, 0, 1), slot(1, 2, 0)]));
    assert_eq!(error_of(&builder).message(), "detected missing cluster 1 for stream a");
    let report = VmaDriver.check(as_stream(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.findings, ["cluster 1 of 3 is missing (device a)"]);
}

/// Reference: silently ignores devices of size 0 or without a name.
/// Ours: adds a note for each.
#[test]
fn notes_every_ignored_table_entry() {
    let builder = one_cluster().with(|archive| {
        let name = archive.blob(b"x\0");
        let no_nul = archive.blob(b"x");
        archive.devices.push((2, name, 0));
        archive.devices.push((3, 0, 512));
        archive.devices.push((4, no_nul, 512));
        archive.devices.push((5, name + 1, 512));
        archive.devices.push((255, name, 512));
        archive.devices.push((0, name, 512));
        archive.configs.push((7, name, 0));
    });
    assert_eq!(header(&builder).devices.len(), 1);
    let mut notes = header(&builder).notes;
    notes.sort();
    assert_eq!(
        notes,
        [
            "configuration entry 7 is ignored: it is incomplete",
            "device entry 0 is ignored: id 0 marks empty slots",
            "device entry 2 is ignored: its size is 0",
            "device entry 255 is ignored: id 255 is reserved",
            "device entry 3 is ignored: its name can't be found",
            "device entry 4 is ignored: its name can't be found",
            "device entry 5 is ignored: its name can't be found",
        ]
    );
}

/// Reference: loses the last `size % 512` bytes, or aborts if a size is just above a multiple of 4 MiB.
/// Ours: reads every byte.
#[test]
fn reads_sizes_not_divisible_by_512() {
    for size in [1, 100, 511, 513, 4 << 20, (4 << 20) + 1, (4 << 20) + 511] {
        let count = u64::div_ceil(size, CLUSTER) as u32;
        let slots: Vec<_> = (0..count).map(|cluster| slot(1, cluster, 0xffff)).collect();
        let archive = ArchiveBuilder::new().device(1, "a", size).extents(&slots, 59).build();
        let content = read_both(&archive, &OpenOptions::default()).unwrap();
        assert!(content[&1] == imgtool_testing::vma::guest_content(1, size, &slots), "{size}");
    }
}

/// Reference: ignores reserved bytes.
/// Ours: ignores them, and `check` adds a note.
#[test]
fn check_notes_non_zero_reserved_bytes() {
    let mut odd = slot(1, 0, 1);
    odd.reserved = 1;
    let builder = ArchiveBuilder::new().device(1, "a", CLUSTER).extent(extent(&[odd]));
    read_both(&builder.build(), &OpenOptions::default()).unwrap();
    let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 0);
    assert_eq!(report.findings, ["note: 1 extents have non-zero reserved bytes, which readers ignore"]);
}

/// Reference: drops unstored sub-blocks of guest state, which shifts the rest to the front.
/// Ours: reads them as zeros.
#[test]
fn keeps_zero_sub_blocks_of_guest_state() {
    let builder = ArchiveBuilder::new()
        .device(1, "vmstate", 2 * CLUSTER)
        .extent(extent(&[slot(1, 0, 0b1010), slot(1, 1, 0x8000)]));
    let state = &read_both(&builder.build(), &OpenOptions::default()).unwrap()[&1];
    assert_eq!(state[4096..8192], block_content(1, 0, 1));
    assert_eq!(state[3 * 4096..4 * 4096], block_content(1, 0, 3));
    assert_eq!(state[31 * 4096..], block_content(1, 1, 15));
    assert!(state[..4096].iter().all(|&byte| byte == 0));
}

/// Reference: accepts guest state whose end is missing, since its size is an estimate.
/// Ours: reads the end as zeros, with a note.
#[test]
fn guest_state_may_be_shorter_than_its_size() {
    for stored in [0u32, 1, 3] {
        let slots: Vec<_> =
            (0..stored).map(|cluster| slot(1, cluster, 0xffff)).chain([slot(2, 1, 1)]).collect();
        let builder = ArchiveBuilder::new()
            .device(1, "vmstate", 5 * CLUSTER + 1000)
            .device(2, "d", 2 * CLUSTER)
            .extents(&slots, 59)
            .extent(extent(&[slot(2, 0, 1)]));
        let content = read_both(&builder.build(), &OpenOptions::default()).unwrap();
        let state = guest_content(1, 5 * CLUSTER + 1000, &slots);
        assert!(content[&1] == state, "{stored}");
        let note = format!(
            "device vmstate ends at {} of 328680 bytes, and the rest is zeros: the size of a guest's state is an estimate",
            u64::from(stored) * CLUSTER
        );
        let source = VmaDriver.open(as_file(&builder.build()), &OpenOptions::default()).unwrap();
        assert_eq!(source.notes(), [note.as_str()]);
        assert_eq!(source.info().notes, [note.as_str()]);
        let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
        assert_eq!((report.corruptions, report.findings), (0, vec![format!("note: {note}")]));
    }
}

/// Reference: silently accepts zero clusters slightly past the end.
/// Ours: accepts them with a note; `check` counts them.
#[test]
fn notes_zero_clusters_slightly_past_the_end() {
    let builder = ArchiveBuilder::new().device(1, "a", CLUSTER).extent(extent(&[
        slot(1, 0, 1),
        slot(1, 1, 0),
        slot(1, 63, 0),
    ]));
    assert_eq!(
        open(&builder).info().notes,
        ["2 zero clusters of device a lie past its end and are left out"]
    );
    let report = VmaDriver.check(as_stream(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 0);
    assert_eq!(report.findings, ["note: 2 clusters lie past the end of their device and are left out"]);
}

/// Reference: refuses sub-blocks stored past the end unless the mask is full; its first version wrote
/// such archives.
/// Ours: drops them with a note.
#[test]
fn drops_sub_blocks_past_the_end() {
    let builder = ArchiveBuilder::new().device(1, "a", 4096).extent(extent(&[slot(1, 0, 0x8001)]));
    let content = read_both(&builder.build(), &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], block_content(1, 0, 0));
    let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.findings, ["note: 1 sub-blocks lie past the end of their device and are left out"]);
}

/// Reference: refuses a `block_count` that does not match the masks.
/// Ours: refuses it with the same message.
#[test]
fn refuses_wrong_block_counts_with_the_reference_message() {
    for (count, trailing, message) in [
        (0, 0, "short vma extent - too many blocks"),
        (2, 4096, "vma extent error - missing blocks"),
        (2, 0, "short vma extent (4608 < 8704)"),
        (944, 0, "short vma extent (4608 < 3867136)"),
        (945, 4_000_000, "short vma extent (3867136 < 3871232)"),
        (u16::MAX, 0, "short vma extent (4608 < 268431872)"),
    ] {
        let mut wrong = extent(&[slot(1, 0, 1)]);
        wrong.block_count = Some(count);
        let builder = ArchiveBuilder::new().device(1, "a", CLUSTER).extent(wrong);
        let error = error_of(&builder.with(|archive| archive.trailing = vec![0; trailing]));
        assert_eq!((error.message(), error.file_offset()), (message, Some(12_800)), "{count}");
    }
}

/// Reference: refuses invalid fields of an extent header.
/// Ours: gives the same message ("checksum" spelled correctly); salvage continues after such a header.
#[test]
fn refuses_invalid_extent_headers_with_the_reference_message() {
    type Change = fn(&mut imgtool_testing::vma::Extent);
    let changes: [(&str, Change); 4] = [
        ("wrong vma extent header magic", |extent| extent.reserved1 = 1),
        ("wrong vma extent uuid", |extent| extent.uuid[0] ^= 1),
        ("wrong vma extent header checksum", |extent| extent.flip = Some((24, 1))),
        ("wrong vma extent header magic", |extent| extent.magic = *b"vmae"),
    ];
    for (message, change) in changes {
        let mut wrong = extent(&[slot(1, 0, 1)]);
        change(&mut wrong);
        let builder = ArchiveBuilder::new()
            .device(1, "a", 2 * CLUSTER)
            .extent(wrong)
            .extent(extent(&[slot(1, 1, 0xffff)]));
        let error = error_of(&builder);
        assert_eq!((error.message(), error.file_offset()), (message, Some(12_800)));
        assert_eq!(reference::message(&error), message.replace("checksum", "chechsum"));
        let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
        let source = VmaSource::open(as_stream(&builder.build()), &salvage).unwrap();
        let content = support::read_source(&source).unwrap();
        assert_eq!(content[&1][CLUSTER as usize..][..4096], block_content(1, 1, 0));
        let losses = source.losses();
        assert_eq!((losses.len(), &losses[0].guest), (1, &(0..CLUSTER)), "{message}");
    }
    let error = error_of(&one_cluster().with(|archive| archive.flip = Some((5000, 1))));
    assert_eq!(error.message(), "wrong vma header checksum");
    assert_eq!(reference::message(&error), "wrong vma header chechsum");
}

/// Reference: refuses a cut archive, but leaves its output files.
/// Ours: refuses it with the same message (the end-to-end tests assert that no files are left).
#[test]
fn refuses_truncated_archives_with_the_reference_message() {
    let whole = one_cluster().build();
    for (len, message) in [
        (0, "can't read vma header - got EOF"),
        (12_287, "can't read vma header - got EOF"),
        (12_799, "can't read vma header data - got EOF"),
        (12_800, "detected missing cluster 0 for stream a"),
        (12_801, "read short extent (1 bytes)"),
        (13_311, "read short extent (511 bytes)"),
        (13_312, "short vma extent (512 < 4608)"),
        (whole.len() - 1, "short vma extent (4607 < 4608)"),
    ] {
        let error = read_both(&whole[..len], &OpenOptions::default()).unwrap_err();
        assert_eq!(error.message(), message, "cut at {len}");
    }
}

/// Reference: fails on trailing bytes after it has written all data.
/// Ours: fails as well, unless the options allow them.
#[test]
fn trailing_bytes_fail_unless_allowed() {
    for (trailing, message) in
        [(vec![0; 1], "read short extent (1 bytes)"), (vec![0; 512], "wrong vma extent header checksum")]
    {
        let builder = one_cluster().with(|archive| archive.trailing = trailing);
        assert_eq!(error_of(&builder).message(), message);
        let lenient = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
        read_both(&builder.build(), &lenient).unwrap();
    }
}

/// Reference: refuses a compressed archive ("not a vma file").
/// Ours: the toolkit decompresses it, even from a pipe.
#[test]
fn reads_compressed_archives() {
    let plain = support::read(open_file(&fixture("two-disks.vma.zst")), &OpenOptions::default());
    let plain = plain.unwrap();
    for name in ["two-disks.vma.gz", "two-disks.vma.lzo"] {
        let file = std::fs::File::open(fixture(name)).unwrap();
        let piped = support::read(piped(file).unwrap(), &OpenOptions::default()).unwrap();
        assert!(piped == plain, "{name}");
    }
}

/// Reference: the behaviour on hundreds of thousands of gaps is unknown.
/// Ours: finds gaps run by run, in time proportional to the length of the archive.
#[test]
fn handles_many_gaps_quickly() {
    let slots: Vec<_> = (0..300_000).map(|number| slot(1, number * 14_000, 0)).collect();
    let builder = ArchiveBuilder::new().device(1, "a", 1 << 48).extents(&slots, 59);
    let archive = builder.build();
    assert_eq!(error_of_huge(&builder).message(), "detected missing cluster 1 for stream a");
    let report = VmaDriver.check(as_file(&archive), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 300_000);
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VmaSource::open(as_stream(&archive), &salvage).unwrap();
    let Access::Stream(stream) = source.access() else { panic!("salvage is sequential") };
    let (mut bytes, pool) = (0, BufferPool::new());
    while let Some(piece) = lock(stream).next_piece(&pool).unwrap() {
        bytes += piece.len;
    }
    assert_eq!(bytes, 1 << 48, "restored and lost bytes must add up to the whole device");
}
