//! Input on which the reference program (7.2 to 11.0) crashes, writes outside its directory, or says
//! nothing. Each test names what it does, and asserts what we do.
#![allow(clippy::unwrap_used)]

mod common;

use common::{as_file, as_stream, read_both};
use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Access, BufferPool, Driver, ErrorKind, ImageSource, OpenOptions};
use imgtool_vma::testing::{ArchiveBuilder, block_content, extent, slot};
use imgtool_vma::{ArchiveHeader, VmaDriver, VmaSource};

const CLUSTER: u64 = 65_536;

fn header(builder: &ArchiveBuilder) -> ArchiveHeader {
    ArchiveHeader::read(as_file(&builder.build())).unwrap()
}

fn open(builder: &ArchiveBuilder) -> VmaSource {
    VmaSource::open(as_file(&builder.build()), &OpenOptions::default()).unwrap()
}

fn error_of(builder: &ArchiveBuilder) -> imgtool_toolkit::Error {
    read_both(&builder.build(), &OpenOptions::default()).unwrap_err()
}

/// The error of opening, or of reading up to it without keeping anything, from a file and a stream.
fn error_of_huge(builder: &ArchiveBuilder) -> imgtool_toolkit::Error {
    let archive = builder.build();
    let from_file = VmaSource::open(as_file(&archive), &OpenOptions::default()).err().unwrap();
    let from_stream = VmaSource::open(as_stream(&archive), &OpenOptions::default()).and_then(|mut source| {
        let Access::Sequential(stream) = source.access() else { panic!("a stream is sequential") };
        while stream.next_piece(&BufferPool::new())?.is_some() {}
        Ok(())
    });
    assert_eq!(from_file.to_string(), from_stream.unwrap_err().to_string());
    from_file
}

/// One disk of one cluster.
fn one() -> ArchiveBuilder {
    ArchiveBuilder::new().device(1, "a", CLUSTER).extent(extent(&[slot(1, 0, 1)]))
}

/// Reference: a configuration called `../evil.conf` is written outside of the directory; absolute
/// ones, empty ones and `.` end in "unable to write file".
/// Ours: names are handed on as they are, never used as paths; our writer refuses or reduces them.
#[test]
fn configuration_names_are_only_names() {
    for name in ["../evil.conf", "/etc/passwd", "", ".", "a/b", "disk-a.raw", "vmstate.bin"] {
        let source = open(&one().config(name, b"x"));
        assert_eq!(source.info().attachments[0].name, name);
    }
}

/// Reference: a device called `../../x` fails only because a file name is put before it; `\n` and
/// terminal codes forge lines of `list`.
/// Ours: the name is handed on; whatever is printed is escaped.
#[test]
fn device_names_are_only_names() {
    let name = "x\nDEV: dev_id=9\x1b[2J";
    let builder =
        ArchiveBuilder::new().device(1, name, CLUSTER).extent(extent(&[slot(1, 0, 1), slot(1, 0, 1)]));
    let error = error_of(&builder);
    assert_eq!(error.device_name(), Some(name));
    assert!(!error.to_string().chars().any(char::is_control));
    assert!(!escape_control(name).contains('\n'));
}

/// Reference: two devices of one name are written into one file, then the rename fails.
/// Ours: they are told apart by id, and a note says so.
#[test]
fn devices_of_one_name_are_kept_apart() {
    let builder = ArchiveBuilder::new()
        .device(1, "a", 4096)
        .device(2, "a", 4096)
        .extent(extent(&[slot(2, 0, 1), slot(1, 0, 1)]));
    let content = read_both(&builder.build(), &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], block_content(1, 0, 0));
    assert_eq!(content[&2], block_content(2, 0, 0));
    assert!(open(&builder).info().notes.contains(&"devices 1 and 2 have the same name".to_owned()));
}

/// Reference: of two configurations of one name the last overwrites the first.
/// Ours: both are handed on, with a note.
#[test]
fn configurations_of_one_name_are_both_kept() {
    let header = header(&one().config("c", b"1").config("c", b"2"));
    assert_eq!(
        (header.configs[0].data.as_slice(), header.configs[1].data.as_slice()),
        (&b"1"[..], &b"2"[..])
    );
    assert_eq!(header.notes, ["configuration entry 1 has the name of an earlier one"]);
}

/// Reference: a name blob of zero length is read 4 GiB out of bounds (SIGSEGV).
/// Ours: it is no name: a device is left out, a configuration refused.
#[test]
fn names_of_zero_length_are_no_names() {
    let builder = one().with(|archive| {
        let empty = archive.blob(b"");
        archive.devices.push((2, empty, 4096));
    });
    assert_eq!(open(&builder).info().notes, ["device entry 2 is ignored: its name can't be found"]);
    let builder = one().with(|archive| {
        let empty = archive.blob(b"");
        archive.configs.push((0, empty, empty));
    });
    assert_eq!(error_of(&builder).message(), "vma contains invalid data pointers");
}

/// Reference: offset plus size of the blobs wraps at 2^32 (SIGSEGV, or an empty list).
/// Ours: sums have 64 bits.
#[test]
fn blob_bounds_do_not_wrap() {
    for (offset, size) in
        [(12_288, u32::MAX), (u32::MAX, 2), (u32::MAX, u32::MAX), (0x8000_0000, 0x8000_0200)]
    {
        let builder = one().with(|archive| {
            archive.blob_buffer_offset = offset;
            archive.blob_buffer_size = Some(size);
        });
        assert_eq!(error_of(&builder).kind(), ErrorKind::Malformed);
    }
}

/// Reference: allocates up to 2 GiB for a header before it looks at anything.
/// Ours: 16 MiB at most, and only as far as there are bytes.
#[test]
fn header_sizes_are_bounded() {
    for size in [(16 << 20) + 1, i32::MAX as u32, u32::MAX] {
        let error = error_of(&one().with(|archive| archive.header_size = Some(size)));
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    }
    let error = error_of(&one().with(|archive| archive.header_size = Some(16 << 20)));
    assert_eq!(error.message(), "can't read vma header data - got EOF");
}

/// Reference: tries terabytes of bitmap for 2^62 bytes, shows sizes from 2^63 as negative.
/// Ours: above 2^32 clusters it is refused; below, memory follows what is in the archive.
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

/// Reference: aborts (134) on a cluster far beyond the end, and in `verify` on unknown devices and
/// on device 255.
/// Ours: errors that name the extent.
#[test]
fn wrong_slots_are_clean_errors() {
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

/// Reference: `verify` says nothing about missing clusters.
/// Ours: reading and checking both say it.
#[test]
fn missing_clusters_are_never_silent() {
    let builder =
        ArchiveBuilder::new().device(1, "a", 3 * CLUSTER).extent(extent(&[slot(1, 0, 1), slot(1, 2, 0)]));
    assert_eq!(error_of(&builder).message(), "detected missing cluster 1 for stream a");
    let report = VmaDriver.check(as_stream(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.findings, ["cluster 1 of 3 is missing (device a)"]);
}

/// Reference: devices of size 0 or without a name are silently absent.
/// Ours: a note says so.
#[test]
fn entries_that_are_left_out_are_named() {
    let builder = one().with(|archive| {
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

/// Reference: loses the last `size % 512` bytes, or aborts where a size lies just above 4 MiB steps.
/// Ours: every byte.
#[test]
fn sizes_in_bytes_are_read_to_the_last() {
    for size in [1, 100, 511, 513, 4 << 20, (4 << 20) + 1, (4 << 20) + 511] {
        let count = u64::div_ceil(size, CLUSTER) as u32;
        let slots: Vec<_> = (0..count).map(|cluster| slot(1, cluster, 0xffff)).collect();
        let archive = ArchiveBuilder::new().device(1, "a", size).extents(&slots, 59).build();
        let content = read_both(&archive, &OpenOptions::default()).unwrap();
        assert!(content[&1] == imgtool_vma::testing::guest_content(1, size, &slots), "{size}");
    }
}

/// Reference: bytes that are reserved are ignored.
/// Ours: too; `check` mentions them.
#[test]
fn reserved_bytes_are_mentioned_by_check() {
    let mut odd = slot(1, 0, 1);
    odd.reserved = 1;
    let builder = ArchiveBuilder::new().device(1, "a", CLUSTER).extent(extent(&[odd]));
    read_both(&builder.build(), &OpenOptions::default()).unwrap();
    let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 0);
    assert_eq!(report.findings, ["note: 1 extents have something in bytes that are reserved"]);
}

/// Reference: drops the zero sub-blocks of a state, so that what follows moves to the front.
/// Ours: zeros where they belong.
#[test]
fn zeros_of_a_state_keep_their_place() {
    let builder = ArchiveBuilder::new()
        .device(1, "vmstate", 2 * CLUSTER)
        .extent(extent(&[slot(1, 0, 0b1010), slot(1, 1, 0x8000)]));
    let state = &read_both(&builder.build(), &OpenOptions::default()).unwrap()[&1];
    assert_eq!(state[4096..8192], block_content(1, 0, 1));
    assert_eq!(state[3 * 4096..4 * 4096], block_content(1, 0, 3));
    assert_eq!(state[31 * 4096..], block_content(1, 1, 15));
    assert!(state[..4096].iter().all(|&byte| byte == 0));
}

/// Reference: takes a state of which the end is missing.
/// Ours: that is a missing cluster like any other; salvage fills it with zeros.
#[test]
fn a_state_must_be_complete() {
    let builder = ArchiveBuilder::new().device(1, "vmstate", 2 * CLUSTER).extent(extent(&[slot(1, 0, 1)]));
    assert_eq!(error_of(&builder).message(), "detected missing cluster 1 for stream vmstate");
}

/// Reference: takes all-zero slots slightly past the end without a word.
/// Ours: takes them too, with a note; `check` counts them.
#[test]
fn zero_slots_slightly_past_the_end_are_mentioned() {
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

/// Reference: refuses sub-blocks that are stored past the end unless the mask is full; its first
/// version wrote such.
/// Ours: leaves them out, with a note.
#[test]
fn sub_blocks_past_the_end_are_left_out() {
    let builder = ArchiveBuilder::new().device(1, "a", 4096).extent(extent(&[slot(1, 0, 0x8001)]));
    let content = read_both(&builder.build(), &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], block_content(1, 0, 0));
    let report = VmaDriver.check(as_file(&builder.build()), &OpenOptions::default()).unwrap();
    assert_eq!(report.findings, ["note: 1 sub-blocks lie past the end of their device and are left out"]);
}

/// Reference: clean errors for a number of sub-blocks that does not fit.
/// Ours: the same words.
#[test]
fn wrong_numbers_of_sub_blocks_are_clean_errors() {
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

/// Reference: clean errors for the fields of an extent's header.
/// Ours: the same words (one is spelled otherwise); salvage goes on behind it.
#[test]
fn wrong_extent_headers_are_clean_errors() {
    type Change = fn(&mut imgtool_vma::testing::Extent);
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
        let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
        let mut source = VmaSource::open(as_stream(&builder.build()), &salvage).unwrap();
        let content = common::read_source(&mut source).unwrap();
        assert_eq!(content[&1][CLUSTER as usize..][..4096], block_content(1, 1, 0));
        let losses = source.losses();
        assert_eq!((losses.len(), &losses[0].guest), (1, &(0..CLUSTER)), "{message}");
    }
    let words =
        imgtool_vma::reference::message(&imgtool_toolkit::Error::corrupt("wrong vma header checksum"));
    assert_eq!(words, "wrong vma header chechsum");
}

/// Reference: clean errors for an archive that is cut; its files stay.
/// Ours: the same words (that no files stay is tested with the program).
#[test]
fn cuts_are_clean_errors() {
    let whole = one().build();
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

/// Reference: bytes after the end are an error after all data was written.
/// Ours: too, unless they are allowed.
#[test]
fn trailing_bytes_are_an_error_unless_allowed() {
    for (trailing, message) in
        [(vec![0; 1], "read short extent (1 bytes)"), (vec![0; 512], "wrong vma extent header checksum")]
    {
        let builder = one().with(|archive| archive.trailing = trailing);
        assert_eq!(error_of(&builder).message(), message);
        let lenient = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
        read_both(&builder.build(), &lenient).unwrap();
    }
}

/// Reference: "not a vma file" for a compressed archive; reads pipes.
/// Ours: compression is undone by the toolkit, from pipes as well.
#[test]
fn compressed_archives_are_read() {
    let plain = common::read(
        imgtool_toolkit::Input::open(&common::fixture("two-disks.vma.zst")).unwrap(),
        &OpenOptions::default(),
    );
    let plain = plain.unwrap();
    for name in ["two-disks.vma.gz", "two-disks.vma.lzo"] {
        let file = std::fs::File::open(common::fixture(name)).unwrap();
        let piped = imgtool_toolkit::Input::from_stream("-", Box::new(file)).unwrap();
        let piped = common::read(piped.decompressed().unwrap(), &OpenOptions::default()).unwrap();
        assert!(piped == plain, "{name}");
    }
}

/// Not known of the reference: an archive of millions of gaps.
/// Ours: they are found by runs, and cost as much as what is there.
#[test]
fn many_gaps_cost_little() {
    let slots: Vec<_> = (0..300_000).map(|number| slot(1, number * 14_000, 0)).collect();
    let builder = ArchiveBuilder::new().device(1, "a", 1 << 48).extents(&slots, 59);
    let archive = builder.build();
    assert_eq!(error_of_huge(&builder).message(), "detected missing cluster 1 for stream a");
    let report = VmaDriver.check(as_file(&archive), &OpenOptions::default()).unwrap();
    assert_eq!(report.corruptions, 300_000);
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let mut source = VmaSource::open(as_stream(&archive), &salvage).unwrap();
    let Access::Sequential(stream) = source.access() else { panic!("salvage is sequential") };
    let (mut bytes, pool) = (0, BufferPool::new());
    while let Some(piece) = stream.next_piece(&pool).unwrap() {
        bytes += piece.len;
    }
    assert_eq!(bytes, 1 << 48, "restored and lost together are the whole device");
}
