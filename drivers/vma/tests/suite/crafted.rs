//! Archives built byte by byte: valid ones of every shape, and invalid ones with the expected message.

use imgtool_core::{ErrorKind, ImageSource, OpenOptions, Remedy};
use imgtool_testing::vma::{ArchiveBuilder, Slot, extent, guest_content, hole, slot};
use imgtool_vma::VmaSource;

use crate::support::{self, Content, read_both};

const CLUSTER: u64 = 65_536;

/// Builds an archive of `devices` (id and size) with `per_extent` slots in each extent, and asserts
/// that it is read correctly.
fn assert_reads(what: &str, devices: &[(u8, u64)], slots: &[Slot], per_extent: usize) {
    let mut builder = ArchiveBuilder::new();
    for (dev_id, size) in devices {
        builder = builder.device(*dev_id, &format!("disk{dev_id}"), *size);
    }
    let archive = builder.extents(slots, per_extent).build();
    let content = read_both(&archive, &OpenOptions::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let expected: Content = devices
        .iter()
        .map(|(dev_id, size)| (u32::from(*dev_id), guest_content(*dev_id, *size, slots)))
        .collect();
    assert!(content == expected, "{what}: content differs");
}

fn clusters(dev_id: u8, count: u32) -> Vec<Slot> {
    (0..count).map(|cluster| slot(dev_id, cluster, mask_of(cluster))).collect()
}

/// Returns a mask that depends on the cluster number: empty, full, a single sub-block or stripes.
fn mask_of(cluster: u32) -> u16 {
    [0, 0xffff, 1, 0x8000, 0x5555, 0xaaaa, 0x0ff0, 0xf00f, 0, 0, 0x1234][cluster as usize % 11]
}

/// Shuffles slots deterministically.
fn shuffled(mut slots: Vec<Slot>) -> Vec<Slot> {
    let mut state = 1u64;
    for end in (1..slots.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        slots.swap(end, (state >> 33) as usize % (end + 1));
    }
    slots
}

#[test]
fn reads_extents_of_any_length() {
    for per_extent in [1, 2, 7, 58, 59] {
        let slots = clusters(1, 130);
        assert_reads(&format!("{per_extent} slots"), &[(1, 130 * CLUSTER)], &slots, per_extent);
    }
    let full: Vec<Slot> = (0..59).map(|cluster| slot(1, cluster, 0xffff)).collect();
    assert_reads("59 full clusters", &[(1, 59 * CLUSTER)], &full, 59);
}

#[test]
fn reads_clusters_in_any_order_across_devices() {
    let mut slots = clusters(1, 90);
    slots.extend(clusters(2, 33));
    slots.extend(clusters(7, 61));
    for per_extent in [1, 7, 59] {
        let devices = [(1, 90 * CLUSTER), (2, 33 * CLUSTER), (7, 61 * CLUSTER)];
        assert_reads("shuffled", &devices, &shuffled(slots.clone()), per_extent);
    }
    let backwards: Vec<Slot> = clusters(1, 100).into_iter().rev().collect();
    assert_reads("backwards", &[(1, 100 * CLUSTER)], &backwards, 59);
}

#[test]
fn reads_device_ids_with_gaps() {
    let slots: Vec<Slot> = [3, 200, 254].into_iter().flat_map(|dev_id| clusters(dev_id, 5)).collect();
    let devices = [(3, 5 * CLUSTER), (200, 5 * CLUSTER), (254, 5 * CLUSTER)];
    assert_reads("ids 3, 200, 254", &devices, &slots, 59);
}

#[test]
fn skips_empty_slots_anywhere() {
    let mut slots = vec![hole(), hole()];
    for cluster in clusters(1, 20) {
        slots.push(cluster);
        slots.push(hole());
    }
    assert_reads("holes between slots", &[(1, 20 * CLUSTER)], &slots, 42);
    let archive = ArchiveBuilder::new()
        .device(1, "a", CLUSTER)
        .extent(extent(&[]))
        .extent(extent(&[hole()]))
        .extent(extent(&[slot(1, 0, 3)]))
        .extent(extent(&[]))
        .build();
    read_both(&archive, &OpenOptions::default()).unwrap();
}

#[test]
fn reads_odd_sizes_exactly() {
    for size in [1, 511, 512, 513, 4095, 4096, 4097, 61_440, 65_535, 65_537, 3 * CLUSTER + 5000] {
        let count = size.div_ceil(CLUSTER) as u32;
        let last_blocks = (size - u64::from(count - 1) * CLUSTER).div_ceil(4096);
        let exact = ((1u32 << last_blocks) - 1) as u16;
        let mut slots: Vec<Slot> = (0..count).map(|cluster| slot(1, cluster, 0xffff)).collect();
        assert_reads("a full mask on the last cluster", &[(1, size)], &slots, 59);
        slots.last_mut().unwrap().mask = exact;
        assert_reads("an exact mask on the last cluster", &[(1, size)], &slots, 59);
        // The reference program refuses this mask ("write beyond end"); archives of 2012 contain such masks.
        slots.last_mut().unwrap().mask = 0x8001;
        assert_reads("a mask with a bit past the end", &[(1, size)], &slots, 59);
    }
}

#[test]
fn drops_zero_clusters_slightly_past_the_end() {
    let archive = ArchiveBuilder::new()
        .device(1, "a", 2 * CLUSTER)
        .extent(extent(&[slot(1, 0, 1), slot(1, 1, 0), slot(1, 2, 0), slot(1, 63, 0)]))
        .build();
    let source = VmaSource::open(support::as_file(&archive), &OpenOptions::default()).unwrap();
    assert!(source.info().notes.iter().any(|note| note.starts_with("2 zero clusters of device a")));
    read_both(&archive, &OpenOptions::default()).unwrap();
}

#[test]
fn reads_256_configurations() {
    let mut builder = ArchiveBuilder::new().device(1, "a", 512).extent(extent(&[slot(1, 0, 0)]));
    for index in 0..256 {
        builder = builder.config(&format!("c{index}"), &vec![index as u8; index * 7]);
    }
    let source = VmaSource::open(support::as_stream(&builder.build()), &OpenOptions::default()).unwrap();
    let configs = &source.info().attachments;
    assert_eq!(configs.len(), 256);
    assert!(configs[0].data.is_empty());
    assert_eq!((configs[255].name.as_str(), configs[255].data.len()), ("c255", 1785));
}

#[test]
fn reads_shared_blobs_and_unusual_names() {
    let archive = ArchiveBuilder::new()
        .with(|archive| {
            let name = archive.blob("ü \x1b[2J\n/../x\0ignored\0".as_bytes());
            let data = archive.blob(b"");
            archive.devices.push((1, name, 4096));
            archive.configs.push((3, name, data));
            archive.configs.push((200, name, name));
        })
        .extent(extent(&[slot(1, 0, 1)]))
        .build();
    let source = VmaSource::open(support::as_file(&archive), &OpenOptions::default()).unwrap();
    let name = "ü \x1b[2J\n/../x";
    assert_eq!(source.info().devices[0].name, name);
    let configs = &source.info().attachments;
    assert_eq!((configs[0].name.as_str(), configs[0].data.len()), (name, 0));
    assert_eq!(configs[1].data, "ü \x1b[2J\n/../x\0ignored\0".as_bytes());
    // Errors escape the control characters.
    assert!(!format!("{}", imgtool_core::Error::corrupt("x").device(name)).contains('\x1b'));
}

#[test]
fn ignores_reserved_bytes_and_header_padding() {
    let mut slots = clusters(1, 3);
    slots.iter_mut().for_each(|slot| slot.reserved = 0xff);
    let archive = ArchiveBuilder::new()
        .device(1, "a", 3 * CLUSTER)
        .extents(&slots, 59)
        .with(|archive| {
            archive.reserved = 0xee;
            // With this padding, the header size is not a multiple of 512.
            archive.padding = 7;
        })
        .build();
    let content = read_both(&archive, &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], guest_content(1, 3 * CLUSTER, &slots));
}

#[test]
fn reads_archives_without_devices() {
    let builder = ArchiveBuilder::new().config("only.conf", b"x");
    assert_eq!(read_both(&builder.build(), &OpenOptions::default()).unwrap().len(), 0);
    // The reference program writes one empty extent.
    let with_extent = builder.extent(extent(&[]));
    assert_eq!(read_both(&with_extent.build(), &OpenOptions::default()).unwrap().len(), 0);
}

#[test]
fn truncates_guest_state_to_its_size() {
    let size = 2 * CLUSTER + 5000;
    let slots = [
        slot(1, 0, 0xffff),
        slot(1, 1, 0),
        slot(1, 2, 0xffff),
        slot(1, 3, 0xffff),
        slot(1, 4, 0),
        slot(1, 5, 0x00ff),
    ];
    let archive = ArchiveBuilder::new().device(1, "vmstate", size).extents(&slots, 2).build();
    let content = read_both(&archive, &OpenOptions::default()).unwrap();
    assert!(content[&1] == guest_content(1, size, &slots));
}

/// An archive that must be refused, and the expected error.
struct Refusal {
    what: &'static str,
    archive: Vec<u8>,
    kind: ErrorKind,
    message: &'static str,
    file_offset: u64,
    device: Option<&'static str>,
}

// By value, because the callers build it in place.
#[allow(clippy::needless_pass_by_value)]
fn refused(
    what: &'static str,
    builder: ArchiveBuilder,
    kind: ErrorKind,
    message: &'static str,
    at: u64,
) -> Refusal {
    Refusal { what, archive: builder.build(), kind, message, file_offset: at, device: None }
}

impl Refusal {
    fn device(mut self, name: &'static str) -> Self {
        self.device = Some(name);
        self
    }

    fn assert(&self) {
        let Err(error) = read_both(&self.archive, &OpenOptions::default()) else {
            panic!("{} is accepted", self.what);
        };
        assert_eq!(error.message(), self.message, "{}", self.what);
        assert_eq!(error.kind(), self.kind, "{}", self.what);
        assert_eq!(error.file_offset(), Some(self.file_offset), "{}", self.what);
        assert_eq!(error.device_name(), self.device, "{}", self.what);
    }
}

/// Returns a builder of an archive with one device of two clusters and a header of 12,800 bytes.
fn two_clusters() -> ArchiveBuilder {
    ArchiveBuilder::new().device(1, "a", 2 * CLUSTER)
}

/// Returns valid slots for [`two_clusters`].
fn valid_slots() -> [Slot; 2] {
    [slot(1, 0, 3), slot(1, 1, 0)]
}

#[test]
fn refuses_invalid_headers() {
    use ErrorKind::{Corrupt, LimitExceeded, Malformed, Unsupported, WrongFormat};
    let whole = || two_clusters().extents(&valid_slots(), 59);
    let header = |change: fn(&mut ArchiveBuilder)| whole().with(change);
    for refusal in [
        refused(
            "magic",
            header(|a| a.magic = *b"VMB\0"),
            WrongFormat,
            "not a vma file - wrong magic number",
            0,
        ),
        refused("size 0", header(|a| a.header_size = Some(0)), Malformed, "wrong vma header size 0", 56),
        refused(
            "size too small",
            header(|a| a.header_size = Some(12_288)),
            Malformed,
            "wrong vma header size 12288",
            56,
        ),
        refused(
            "size 17 MiB",
            header(|a| a.header_size = Some(17 << 20)),
            LimitExceeded,
            "wrong vma header size 17825792",
            56,
        ),
        refused(
            "size negative",
            header(|a| a.header_size = Some(1 << 31)),
            LimitExceeded,
            "wrong vma header size -2147483648",
            56,
        ),
        refused(
            "size beyond the file",
            header(|a| a.header_size = Some(1 << 20)),
            Corrupt,
            "can't read vma header data - got EOF",
            21_504,
        ),
        refused(
            "flipped bit",
            header(|a| a.flip = Some((5000, 4))),
            Corrupt,
            "wrong vma header checksum",
            32,
        ),
        refused("version", header(|a| a.version = 2), Unsupported, "wrong vma version 2", 4),
        refused(
            "blob offset",
            header(|a| a.blob_buffer_offset = 12_287),
            Malformed,
            "wrong vma blob buffer offset 12287",
            48,
        ),
        refused(
            "blob size",
            header(|a| a.blob_buffer_size = Some(513)),
            Malformed,
            "wrong vma blob buffer size 12288/513",
            52,
        ),
        // A 32-bit sum would wrap to a small number.
        refused(
            "blob wrap",
            header(|a| {
                a.blob_buffer_offset = 12_288;
                a.blob_buffer_size = Some(u32::MAX - 100)
            }),
            Malformed,
            "wrong vma blob buffer size 12288/-101",
            52,
        ),
        refused(
            "configuration name nowhere",
            header(|a| a.configs.push((0, 3, 1))),
            Malformed,
            "vma contains invalid data pointers",
            2044,
        ),
        refused(
            "configuration data nowhere",
            header(|a| a.configs.push((2, 1, 500))),
            Malformed,
            "vma contains invalid data pointers",
            2052,
        ),
        refused(
            "configuration name without NUL",
            header(|a| {
                let blob = a.blob(b"abc");
                a.configs.push((1, blob, blob))
            }),
            Malformed,
            "vma contains invalid data pointers",
            2048,
        ),
        refused(
            "configuration name of no bytes",
            header(|a| {
                let blob = a.blob(b"");
                a.configs.push((1, blob, blob))
            }),
            Malformed,
            "vma contains invalid data pointers",
            2048,
        ),
    ] {
        refusal.assert();
    }
    refused(
        "huge device",
        ArchiveBuilder::new().device(1, "a", 1 << 62),
        LimitExceeded,
        "device size 4611686018427387904 is above 281474976710656, the maximum that cluster numbers can address",
        4136,
    )
    .device("a")
    .assert();
}

#[test]
fn refuses_invalid_extents() {
    use ErrorKind::{Corrupt, Malformed, OutOfBounds};
    let sized = |slots: &[Slot]| two_clusters().extent(extent(slots));
    let changed = |change: fn(&mut imgtool_testing::vma::Extent)| {
        let mut changed = extent(&valid_slots());
        change(&mut changed);
        two_clusters().extent(changed)
    };
    let at = 12_800;
    for refusal in [
        refused(
            "flipped bit",
            changed(|e| e.flip = Some((100, 1))),
            Corrupt,
            "wrong vma extent header checksum",
            at,
        ),
        refused("uuid", changed(|e| e.uuid[15] ^= 1), Corrupt, "wrong vma extent uuid", at),
        refused("magic", changed(|e| e.magic = *b"VMAF"), Malformed, "wrong vma extent header magic", at),
        refused("reserved1", changed(|e| e.reserved1 = 1), Malformed, "wrong vma extent header magic", at),
        refused(
            "block count too small",
            changed(|e| e.block_count = Some(1)),
            Malformed,
            "short vma extent - too many blocks",
            at,
        )
        .device("a"),
        refused(
            "block count 0",
            changed(|e| e.block_count = Some(0)),
            Malformed,
            "short vma extent - too many blocks",
            at,
        )
        .device("a"),
        refused(
            "block count too big",
            changed(|e| e.block_count = Some(3)),
            Corrupt,
            "short vma extent (8704 < 12800)",
            at,
        ),
        refused(
            "block count 65535",
            changed(|e| e.block_count = Some(65_535)),
            Corrupt,
            "short vma extent (8704 < 268431872)",
            at,
        ),
        refused("data cut", changed(|e| e.cut = 1), Corrupt, "short vma extent (8703 < 8704)", at)
            .device("a"),
        refused("unknown device", sized(&[slot(2, 0, 0)]), Malformed, "got wrong dev id 2", at),
        refused("device 255", sized(&[slot(255, 0, 1)]), Malformed, "got wrong dev id 255", at),
        refused(
            "twice in an extent",
            sized(&[slot(1, 0, 1), slot(1, 0, 1)]),
            Corrupt,
            "found duplicated cluster 0 for stream a",
            at,
        )
        .device("a"),
        refused(
            "data past the end",
            sized(&[slot(1, 2, 1)]),
            OutOfBounds,
            "got wrong block address - write beyond end",
            at,
        )
        .device("a"),
        refused(
            "zeros far past the end",
            sized(&[slot(1, 64, 0)]),
            OutOfBounds,
            "got wrong block address - write beyond end",
            at,
        )
        .device("a"),
        refused(
            "cluster 2^32-1",
            sized(&[slot(1, u32::MAX, 0xffff)]),
            OutOfBounds,
            "got wrong block address - write beyond end",
            at,
        )
        .device("a"),
    ] {
        refusal.assert();
    }
    let missing = two_clusters().extent(extent(&[slot(1, 0, 1)])).build();
    let error = read_both(&missing, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.message(), "detected missing cluster 1 for stream a");
    assert_eq!(error.guest_range(), Some(CLUSTER..2 * CLUSTER));
    let twice = two_clusters().extents(&valid_slots(), 59).extent(extent(&[slot(1, 1, 0xffff)])).build();
    let error = read_both(&twice, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.message(), "found duplicated cluster 1 for stream a");
    assert_eq!((error.file_offset(), error.guest_range()), (Some(12_800 + 8704), Some(CLUSTER..2 * CLUSTER)));
}

#[test]
fn refuses_more_sub_blocks_than_an_extent_holds() {
    let mut long = extent(&valid_slots());
    long.block_count = Some(945);
    let archive = two_clusters().extent(long).with(|archive| archive.trailing = vec![0; 5_000_000]).build();
    let error = read_both(&archive, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.message(), "short vma extent (3867136 < 3871232)");
}

#[test]
fn refuses_guest_state_out_of_order() {
    for slots in
        [[slot(1, 1, 1), slot(1, 0, 1)], [slot(1, 0, 1), slot(1, 0, 1)], [slot(1, 0, 1), slot(1, 2, 1)]]
    {
        let archive = ArchiveBuilder::new().device(1, "vmstate", 2 * CLUSTER).extents(&slots, 59).build();
        let error = read_both(&archive, &OpenOptions::default()).unwrap_err();
        assert_eq!(error.message(), "found out of order vmstate data");
        assert_eq!(error.device_name(), Some("vmstate"));
    }
}

#[test]
fn refuses_trailing_bytes_unless_allowed() {
    for (trailing, message) in [
        (vec![0; 1], "read short extent (1 bytes)"),
        (vec![0; 511], "read short extent (511 bytes)"),
        (vec![0; 10_240], "wrong vma extent header checksum"),
        (vec![0xff; 4_000_000], "wrong vma extent header checksum"),
    ] {
        let archive =
            two_clusters().extents(&valid_slots(), 59).with(|archive| archive.trailing = trailing).build();
        let error = read_both(&archive, &OpenOptions::default()).unwrap_err();
        assert_eq!(error.message(), message);
        assert_eq!(error.remedy(), Some(&Remedy::IgnoreTrailing));
        let lenient = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
        assert_eq!(read_both(&archive, &lenient).unwrap()[&1], guest_content(1, 2 * CLUSTER, &valid_slots()));
    }
    // After an incomplete archive, such bytes are damage.
    let archive = two_clusters()
        .extent(extent(&[slot(1, 0, 1)]))
        .with(|archive| archive.trailing = vec![0; 600])
        .build();
    let lenient = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
    assert_eq!(read_both(&archive, &lenient).unwrap_err().message(), "wrong vma extent header checksum");
}
