//! Damaged and crafted images: errors with their positions, no panics, no hangs, bounded memory.

use std::path::Path;
use std::time::{Duration, Instant};

use imgtool_core::{DeviceId, Driver, Error, ErrorKind, OpenOptions};
use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance::{self as laws, Content, Fill, Hostile, Image, scratch};

use crate::tools::options;

const MIB: u64 = 1 << 20;

fn sample() -> Image {
    let content = Content::zero().with(0..200_000, Fill::Text).with(MIB..MIB + 9000, Fill::Random);
    Image::disk("sample", 2 * MIB, content)
}

/// Writes a sample image with `fields` overwritten, each by its file offset.
fn crafted(directory: &Path, fields: &[(usize, &[u8])]) -> std::path::PathBuf {
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    for (at, value) in fields {
        bytes[*at..*at + value.len()].copy_from_slice(value);
    }
    let path = directory.join("crafted.qcow2");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Opens an image and reads its extents and content.
fn read_all(path: &Path, options: &OpenOptions) -> Result<(), Error> {
    let source = laws::open_with(&Qcow2Driver, path, options)?;
    let size = source.info().devices[0].size;
    let random = source.access().random().unwrap();
    let (mut at, mut calls) = (0, 0);
    while at < size && calls < 1000 {
        at = random.extents(DeviceId(0), at..size)?.last().unwrap().end();
        calls += 1;
    }
    let mut buf = vec![0; size.min(4 * MIB) as usize];
    random.read_at(DeviceId(0), &mut buf, 0)
}

/// Name, overwritten fields, and the expected kind of error.
type Case<'a> = (&'a str, &'a [(usize, &'a [u8])], ErrorKind);

#[test]
fn rejects_header_fields_out_of_bounds() {
    let directory = scratch();
    let cases: &[Case<'_>] = &[
        ("magic", &[(0, b"QFI\0")], ErrorKind::WrongFormat),
        ("version 1", &[(4, &1u32.to_be_bytes())], ErrorKind::Unsupported),
        ("version 4", &[(4, &4u32.to_be_bytes())], ErrorKind::Unsupported),
        ("cluster_bits 8", &[(20, &8u32.to_be_bytes())], ErrorKind::Malformed),
        ("cluster_bits 22", &[(20, &22u32.to_be_bytes())], ErrorKind::Malformed),
        ("cluster_bits 2^32-1", &[(20, &u32::MAX.to_be_bytes())], ErrorKind::Malformed),
        ("size", &[(24, &u64::MAX.to_be_bytes())], ErrorKind::Malformed),
        ("crypt_method", &[(32, &3u32.to_be_bytes())], ErrorKind::Unsupported),
        ("l1_size", &[(36, &u32::MAX.to_be_bytes())], ErrorKind::LimitExceeded),
        ("l1_size 0", &[(36, &0u32.to_be_bytes())], ErrorKind::Malformed),
        ("l1_table_offset unaligned", &[(40, &65_537u64.to_be_bytes())], ErrorKind::Malformed),
        ("l1_table_offset", &[(40, &(u64::MAX << 16).to_be_bytes())], ErrorKind::Malformed),
        ("refcount_table_offset", &[(48, &1u64.to_be_bytes())], ErrorKind::Malformed),
        ("refcount_table_clusters", &[(56, &u32::MAX.to_be_bytes())], ErrorKind::LimitExceeded),
        ("nb_snapshots", &[(60, &u32::MAX.to_be_bytes())], ErrorKind::LimitExceeded),
        ("snapshots_offset", &[(60, &1u32.to_be_bytes()), (64, &1u64.to_be_bytes())], ErrorKind::Malformed),
        (
            "snapshot beyond",
            &[(60, &1u32.to_be_bytes()), (64, &(1u64 << 40).to_be_bytes())],
            ErrorKind::Corrupt,
        ),
        (
            "backing name too long",
            &[(8, &200u64.to_be_bytes()), (16, &1024u32.to_be_bytes())],
            ErrorKind::Malformed,
        ),
        (
            "backing name beyond",
            &[(8, &65_530u64.to_be_bytes()), (16, &10u32.to_be_bytes())],
            ErrorKind::Malformed,
        ),
        (
            "backing name at the end",
            &[(8, &u64::MAX.to_be_bytes()), (16, &10u32.to_be_bytes())],
            ErrorKind::Malformed,
        ),
        ("corrupt bit", &[(79, &[2])], ErrorKind::Refused),
        ("unknown bit", &[(76, &[1])], ErrorKind::Unsupported),
        ("compression bit alone", &[(79, &[8])], ErrorKind::Malformed),
        ("compression type alone", &[(104, &[1])], ErrorKind::Malformed),
        ("compression type 2", &[(79, &[8]), (104, &[2])], ErrorKind::Unsupported),
        ("extended l2, small clusters", &[(79, &[16]), (20, &13u32.to_be_bytes())], ErrorKind::Malformed),
        ("data file without name", &[(79, &[4])], ErrorKind::Unsupported),
        ("refcount_order", &[(96, &7u32.to_be_bytes())], ErrorKind::Malformed),
        ("header_length 96", &[(100, &96u32.to_be_bytes())], ErrorKind::Malformed),
        ("header_length 113", &[(100, &113u32.to_be_bytes())], ErrorKind::Malformed),
        ("header_length", &[(100, &u32::MAX.to_be_bytes())], ErrorKind::Malformed),
        ("extension length", &[(116, &u32::MAX.to_be_bytes())], ErrorKind::Malformed),
    ];
    for (what, fields, kind) in cases {
        let path = crafted(directory.path(), fields);
        let error = read_all(&path, &OpenOptions::default()).expect_err(what);
        assert_eq!(error.kind(), *kind, "{what}: {error}");
    }
}

/// Read without its encryption, the disk would be noise.
#[test]
fn refuses_an_encryption_header_without_its_method() {
    let directory = scratch();
    let bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    let end = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    let extension =
        [&[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16][..], &[0; 6], &[1, 0], &[0; 6], &[16, 0], &[0; 8]];
    let extension = extension.concat();
    for method in [0, 1] {
        let fields: [(usize, &[u8]); 2] = [(35, &[method]), (end, &extension)];
        let path = crafted(directory.path(), &fields);
        let error = read_all(&path, &OpenOptions::default()).unwrap_err();
        let text = error.to_string();
        assert!(
            error.kind() == ErrorKind::Malformed && text.contains(&format!("crypt_method is {method}")),
            "{text}"
        );
    }
}

#[test]
fn names_an_unknown_feature_from_the_image() {
    let directory = scratch();
    // The feature name table begins at 112. Its first entry becomes the name of bit 32.
    let path = crafted(directory.path(), &[(75, &[1]), (120, &[0, 32]), (122, b"time travel\0")]);
    let error = read_all(&path, &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("'time travel' (bit 32)"), "{error}");
    let facts = OpenOptions { info_only: true, ..OpenOptions::default() };
    let source = laws::open_with(&Qcow2Driver, &path, &facts).unwrap();
    assert!(source.info().notes.iter().any(|note| note.contains("time travel")));
}

#[test]
fn notes_a_dirty_image_and_reads_a_corrupt_one_with_force() {
    let directory = scratch();
    let path = crafted(directory.path(), &[(79, &[3])]);
    let force = OpenOptions { force: true, ..OpenOptions::default() };
    read_all(&path, &force).unwrap();
    let source = laws::open_with(&Qcow2Driver, &path, &force).unwrap();
    assert_eq!(source.info().notes.len(), 2);
}

#[test]
fn rejects_truncated_images() {
    for set in ["", "compress", "cluster_size=4k", "preallocation=metadata,cluster_size=512"] {
        laws::truncated_is_an_error(&Qcow2Driver, &options(set), &sample());
    }
}

#[test]
fn names_guest_range_and_file_offset_of_a_lost_cluster() {
    let directory = scratch();
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (be64(be64(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 8..l2 + 16].copy_from_slice(&(1u64 << 63 | 0x4000_0000).to_be_bytes());
    let path = directory.path().join("x.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let error = read_all(&path, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!((error.guest_range(), error.file_offset()), (Some(65_536..131_072), Some(0x4000_0000)));
    // Salvage reads the rest and lists the lost range.
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = laws::open_with(&Qcow2Driver, &path, &salvage).unwrap();
    let mut buf = vec![1; 200_000];
    source.access().random().unwrap().read_at(DeviceId(0), &mut buf, 0).unwrap();
    let mut expected = vec![0; 200_000];
    sample().devices[0].1.read(&mut expected, 0);
    expected[65_536..131_072].fill(0);
    assert!(buf == expected);
    assert_eq!(source.losses().len(), 1);
    assert_eq!(source.losses()[0].guest, 65_536..131_072);
}

/// Reads an image with salvage, and returns its content and the lost guest ranges.
fn salvage(path: &Path) -> (Vec<u8>, Vec<std::ops::Range<u64>>) {
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = laws::open_with(&Qcow2Driver, path, &salvage).unwrap();
    let mut content = vec![1; usize::try_from(source.info().devices[0].size).unwrap()];
    source.access().random().unwrap().read_at(DeviceId(0), &mut content, 0).unwrap();
    (content, source.losses().into_iter().map(|loss| loss.guest).collect())
}

#[test]
fn salvage_keeps_the_neighbours_of_a_bad_entry() {
    let directory = scratch();
    let path = directory.path().join("x.qcow2");
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    std::fs::write(&path, &bytes).unwrap();
    let (mut expected, none) = salvage(&path);
    assert_eq!(none, []);
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (be64(be64(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // An offset that is not aligned to clusters.
    bytes[l2 + 8..l2 + 16].copy_from_slice(&(1u64 << 63 | 0x1_0200).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    expected[65_536..131_072].fill(0);
    let (content, lost) = salvage(&path);
    assert!(content == expected);
    assert_eq!(lost, std::slice::from_ref(&(65_536..131_072)));
}

#[test]
fn salvage_ignores_a_damaged_snapshot_table() {
    let directory = scratch();
    let path = directory.path().join("x.qcow2");
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    std::fs::write(&path, &bytes).unwrap();
    let (expected, _) = salvage(&path);
    // One snapshot, whose ID and name extend beyond the end of the file.
    bytes.resize(bytes.len().next_multiple_of(65_536), 0);
    let at = bytes.len() as u64;
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&at.to_be_bytes());
    bytes.extend([0; 12]);
    bytes.extend([0xff; 4]);
    bytes.extend([0; 24]);
    std::fs::write(&path, bytes).unwrap();
    read_all(&path, &OpenOptions::default()).expect_err("a snapshot is cut short");
    let (content, lost) = salvage(&path);
    assert!(content == expected);
    assert_eq!(lost, []);
}

#[test]
fn salvage_keeps_the_remaining_part_of_a_truncated_cluster() {
    let directory = scratch();
    let path = directory.path().join("x.qcow2");
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options(""), &sample());
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (be64(be64(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    std::fs::write(&path, &bytes).unwrap();
    let (mut expected, _) = salvage(&path);
    // The data of the second cluster moves to the end of the file and is cut in the middle.
    let from = (be64(l2 + 8) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes.resize(bytes.len().next_multiple_of(65_536), 0);
    let to = bytes.len();
    bytes.extend_from_within(from..from + 30_001);
    bytes[l2 + 8..l2 + 16].copy_from_slice(&(1u64 << 63 | to as u64).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    expected[65_536 + 30_001..131_072].fill(0);
    let (content, lost) = salvage(&path);
    assert!(content == expected);
    assert_eq!(lost, std::slice::from_ref(&(65_536 + 30_001..131_072)));
}

#[test]
fn survives_random_damage() {
    for set in ["", "compress,cluster_size=512", "extended_l2=on", "compress,compression_type=zstd"] {
        let image = laws::make_bytes(&Qcow2Driver, &options(set), &sample());
        let be64 = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        let l1 = be64(40) as usize;
        let l2 = (be64(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let hostile =
            Hostile { image: &image, places: vec![0..600, l1..l1 + 64, l2..l2 + 256], repair: &|_| () };
        laws::hostile_bytes_do_not_panic(&Qcow2Driver, &hostile);
    }
}

#[test]
fn check_survives_damage() {
    let directory = scratch();
    let image = laws::make_bytes(&Qcow2Driver, &options("compress"), &sample());
    let path = directory.path().join("x");
    let started = Instant::now();
    let (mut refused, mut corrupt, mut sound) = (0, 0, 0);
    for at in (0..image.len()).step_by(7).take(60).chain((65_536..image.len()).step_by(4099)) {
        for value in [0, 0x7f, 0xff] {
            let mut bytes = image.clone();
            bytes[at] = value;
            std::fs::write(&path, bytes).unwrap();
            match Qcow2Driver.check(laws::input(&path).unwrap(), &OpenOptions::default()) {
                Err(_) => refused += 1,
                Ok(report) if report.corruptions + report.check_errors > 0 => corrupt += 1,
                Ok(_) => sound += 1,
            }
        }
    }
    assert!(
        refused > 0 && corrupt > 0 && sound > 0,
        "{refused} refused, {corrupt} corrupt, {sound} without a finding"
    );
    assert!(started.elapsed() < Duration::from_secs(400));
}

#[test]
fn rejects_a_repeated_l2_table_quickly() {
    let directory = scratch();
    let mut bytes = laws::make_bytes(&Qcow2Driver, &options("cluster_size=2M"), &sample());
    let be64 = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let entry = be64(&bytes, be64(&bytes, 40) as usize);
    // A new L1 table of 4 Mi equal entries at the end of the file.
    let l1 = bytes.len().next_multiple_of(2 << 20);
    bytes.resize(l1, 0);
    bytes.extend(std::iter::repeat_n(entry.to_be_bytes(), 4 << 20).flatten());
    bytes[36..40].copy_from_slice(&(4u32 << 20).to_be_bytes());
    bytes[40..48].copy_from_slice(&(l1 as u64).to_be_bytes());
    bytes[24..32].copy_from_slice(&(1u64 << 60).to_be_bytes());
    let path = directory.path().join("x");
    std::fs::write(&path, bytes).unwrap();
    let started = Instant::now();
    let report = Qcow2Driver.check(laws::input(&path).unwrap(), &OpenOptions::default()).unwrap();
    assert!(report.corruptions > 0);
    // Reading refuses an exbibyte of data from one table.
    let error = read_all(&path, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(started.elapsed() < Duration::from_secs(300), "{:?}", started.elapsed());
}
