//! Damaged archives: every fault is an error, and salvage restores intact clusters and lists the rest.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_core::zero::is_zero;
use imgtool_core::{Driver, ErrorKind, ImageSource, Input, Loss, OpenOptions, ReadAt};
use imgtool_testing::fixture;
use imgtool_testing::vma::{ArchiveBuilder, Slot, extent, guest_content, slot};
use imgtool_vma::{VmaDriver, VmaSource};

use crate::support::{Content, as_file, as_stream, open_file, piped, read, read_both, read_source};

const CLUSTER: u64 = 65_536;
const STEP: usize = 4096;

fn salvage() -> OpenOptions {
    OpenOptions { salvage: true, ..OpenOptions::default() }
}

/// Returns an archive of three devices and 31 clusters, seven to an extent, with its content and slots.
fn archive() -> (Vec<u8>, Content, Vec<Slot>) {
    let sizes = [(1u8, 20 * CLUSTER + 5120), (2, 9 * CLUSTER), (5, 512)];
    let mut slots = Vec::new();
    for cluster in 0..21u32 {
        slots.push(slot(
            1,
            cluster,
            if cluster == 20 { 3 } else { [0xffff, 0, 0x0f0f, 1][cluster as usize % 4] },
        ));
        if cluster < 9 {
            slots.push(slot(2, 8 - cluster, 0x8421));
        }
    }
    slots.push(slot(5, 0, 1));
    let mut builder = ArchiveBuilder::new().config("a.conf", b"x");
    for (dev_id, size) in sizes {
        builder = builder.device(dev_id, &format!("disk{dev_id}"), size);
    }
    let content = sizes
        .iter()
        .map(|(dev_id, size)| (u32::from(*dev_id), guest_content(*dev_id, *size, &slots)))
        .collect();
    (builder.extents(&slots, 7).build(), content, slots)
}

/// Returns the decompressed bytes of a fixture.
fn decompressed(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    open_file(&fixture(name)).into_stream().unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn refuses_an_archive_truncated_anywhere() {
    let (bytes, _, _) = archive();
    let cuts = (0..bytes.len()).step_by(509).chain(bytes.len() - 3..bytes.len()).chain(0..20);
    for cut in cuts.chain([12_287, 12_288, 12_799, 12_801, 13_311, 13_312]) {
        let error = read_both(&bytes[..cut], &OpenOptions::default()).unwrap_err();
        let kinds = [ErrorKind::Corrupt, ErrorKind::WrongFormat];
        assert!(kinds.contains(&error.kind()), "cut at {cut}: {error}");
    }
    // At the exact end of an extent, only missing clusters reveal the cut.
    let (end, _) =
        extent_ranges(&bytes).into_iter().map(|range| (range.start, range.end)).next_back().unwrap();
    let error = read_both(&bytes[..end], &OpenOptions::default()).unwrap_err();
    assert!(error.message().starts_with("detected missing cluster"), "{error}");
}

/// Returns the byte ranges of the extents in an undamaged archive.
fn extent_ranges(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut at = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
    let mut ranges = Vec::new();
    while at < bytes.len() {
        let blocks = u16::from_be_bytes(bytes[at + 6..at + 8].try_into().unwrap());
        let end = at + 512 + usize::from(blocks) * STEP;
        ranges.push(at..end);
        at = end;
    }
    ranges
}

#[test]
fn refuses_a_flipped_bit_in_any_header_byte() {
    let (bytes, _, _) = archive();
    let header_size = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
    let headers = std::iter::once(0..header_size)
        .chain(extent_ranges(&bytes).into_iter().map(|r| r.start..r.start + 512));
    for at in headers.flat_map(|range| range.step_by(1)).enumerate().filter_map(|(number, at)| {
        // The first 60 bytes, every nonzero byte, and every eleventh byte.
        (number < 60 || bytes[at] != 0 || number % 11 == 0).then_some(at)
    }) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        let error = read(as_file(&flipped), &OpenOptions::default()).unwrap_err();
        assert!(error.file_offset().is_some(), "byte {at}: {error} has no file offset");
        if at % 16 == 0 {
            read_both(&flipped, &OpenOptions::default()).unwrap_err();
        }
        let report = VmaDriver.check(as_file(&flipped), &OpenOptions::default());
        let claimed_size = u32::from_be_bytes(flipped[56..60].try_into().unwrap());
        if at < 4 {
            assert_eq!(report.unwrap_err().kind(), ErrorKind::WrongFormat, "byte {at}");
        } else if claimed_size > 16 << 20 {
            assert_eq!(report.unwrap_err().kind(), ErrorKind::LimitExceeded, "byte {at}");
        } else {
            assert!(report.unwrap().corruptions > 0, "check misses byte {at}");
        }
    }
}

/// Salvages an archive. Returns the restored content and the losses.
fn salvaged(input: Input) -> (Content, Vec<Loss>) {
    let source = VmaSource::open(input, &salvage()).unwrap();
    let content = read_source(&source).unwrap();
    (content, source.losses())
}

/// Asserts that every byte is right or listed, that lost bytes are zero unless the reason says that they
/// may be wrong, and that losses are ascending, disjoint, joined and not empty. Returns the number of
/// bytes listed.
fn assert_restored(what: &str, restored: &Content, losses: &[Loss], truth: &Content) -> u64 {
    let mut lost_bytes = 0;
    let order: Vec<(u32, u64)> = losses.iter().map(|loss| (loss.device.0, loss.guest.start)).collect();
    assert!(order.is_sorted(), "{what}: losses are not ascending");
    for (id, bytes) in restored {
        let truth = &truth[id];
        assert_eq!(bytes.len(), truth.len(), "{what}");
        let mut at = 0;
        let mut reason = "";
        for loss in losses.iter().filter(|loss| loss.device.0 == *id) {
            let (start, end) = (loss.guest.start as usize, loss.guest.end as usize);
            assert!(start >= at && start < end && end <= truth.len(), "{what}: {loss:?}");
            let is_apart = start > at || at == 0 || loss.reason != reason;
            assert!(is_apart, "{what}: losses are not joined: {loss:?}");
            reason = &loss.reason;
            assert!(
                bytes[at..start] == truth[at..start],
                "{what}: wrong bytes before {start} of device {id}"
            );
            let may_be_wrong = loss.reason.contains("may be wrong");
            assert!(may_be_wrong || is_zero(&bytes[start..end]), "{what}: lost bytes are not zero");
            assert!(!loss.reason.is_empty());
            lost_bytes += (end - start) as u64;
            at = end;
        }
        assert!(bytes[at..] == truth[at..], "{what}: wrong bytes after {at} of device {id}");
    }
    lost_bytes
}

/// Damages an archive at one place after another, 4 KiB apart, and salvages each result as a file and as a
/// stream.
fn salvage_at_every_step(bytes: &[u8], truth: &Content, damage: impl Fn(&mut Vec<u8>, usize)) {
    let header_size = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
    for at in (header_size..bytes.len()).step_by(STEP) {
        let mut damaged = bytes.to_vec();
        damage(&mut damaged, at);
        let what = format!("damage at {at}");
        let (content, losses) = salvaged(as_file(&damaged));
        let lost = assert_restored(&what, &content, &losses, truth);
        assert!(lost > 0, "{what}: nothing is listed");
        let (from_stream, stream_losses) = salvaged(as_stream(&damaged));
        assert!(from_stream == content && stream_losses == losses, "{what}: file and stream differ");
    }
}

#[test]
fn salvages_an_archive_truncated_anywhere() {
    let (bytes, truth, _) = archive();
    salvage_at_every_step(&bytes, &truth, |bytes, at| bytes.truncate(at));
    salvage_at_every_step(&bytes, &truth, |bytes, at| bytes.truncate(at + 17));
}

#[test]
fn salvages_an_archive_with_bytes_missing_anywhere() {
    let (bytes, truth, _) = archive();
    let last = extent_ranges(&bytes).pop().unwrap();
    for len in [1, 512, STEP, 3 * STEP + 5] {
        salvage_at_every_step(&bytes, &truth, |bytes, at| {
            if at + len > last.start {
                // In the last extent, missing bytes look the same as a cut.
                bytes.truncate(at);
            } else {
                bytes.drain(at..at + len);
            }
        });
    }
}

/// Returns the content of an undamaged archive.
fn fixture_content(bytes: &[u8]) -> Content {
    read(as_file(bytes), &OpenOptions::default()).unwrap()
}

#[test]
fn salvages_a_fixture_truncated_anywhere() {
    let bytes = decompressed("two-disks.vma.zst");
    let truth = fixture_content(&bytes);
    let header_size = 12_800;
    let mut last_lost = u64::MAX;
    for at in (header_size..bytes.len()).step_by(STEP) {
        let (content, losses) = salvaged(as_file(&bytes[..at]));
        let lost = assert_restored(&format!("cut at {at}"), &content, &losses, &truth);
        assert!(lost > 0 && lost <= last_lost, "a longer file must restore at least as much");
        last_lost = lost;
    }
}

#[test]
fn salvages_a_fixture_overwritten_anywhere() {
    let bytes = decompressed("two-disks.vma.zst");
    let truth = fixture_content(&bytes);
    let extents = extent_ranges(&bytes);
    let mut restored_by_resync = 0;
    for at in (12_800..bytes.len()).step_by(STEP) {
        let hit = at..bytes.len().min(at + STEP);
        let mut damaged = bytes.clone();
        damaged[hit.clone()].fill(0xd7);
        // Data has no checksum, so overwritten data is restored as it is.
        let header_hit = extents.iter().any(|e| hit.start < e.start + 512 && e.start < hit.end);
        let mut truth = truth.clone();
        overwrite_truth(&bytes, &extents, &hit, &mut truth);
        let (content, losses) = salvaged(as_file(&damaged));
        let lost = assert_restored(&format!("overwritten at {at}"), &content, &losses, &truth);
        assert_eq!(lost > 0, header_hit, "overwritten at {at}");
        restored_by_resync += u64::from(header_hit && lost < truth.values().map(|d| d.len() as u64).sum());
    }
    assert!(restored_by_resync > 0);
}

/// Overwrites the expected guest bytes that the archive stores in `hit`, a range of the archive.
fn overwrite_truth(bytes: &[u8], extents: &[Range<usize>], hit: &Range<usize>, truth: &mut Content) {
    for range in extents {
        let mut at = range.start + 512;
        for info in bytes[range.start + 40..range.start + 512].chunks_exact(8) {
            let mask = u16::from_be_bytes([info[0], info[1]]);
            let cluster = u32::from_be_bytes([info[4], info[5], info[6], info[7]]) as usize;
            for block in (0..16).filter(|block| info[3] != 0 && mask >> block & 1 == 1) {
                let guest = cluster * CLUSTER as usize + block * STEP;
                let device = truth.get_mut(&u32::from(info[3])).unwrap();
                let overlap = at.max(hit.start)..(at + STEP).min(hit.end);
                for position in overlap {
                    if let Some(byte) = device.get_mut(guest + (position - at)) {
                        *byte = 0xd7;
                    }
                }
                at += STEP;
            }
        }
    }
}

/// A file with an unreadable range, as on a failing disk.
struct BadSectors {
    bytes: Vec<u8>,
    bad: Range<u64>,
    granule: u64,
    reads: AtomicU64,
}

impl BadSectors {
    fn input(bytes: &[u8], bad: Range<u64>, granule: u64) -> (Input, Arc<Self>) {
        let file = Arc::new(Self { bytes: bytes.to_vec(), bad, granule, reads: AtomicU64::new(0) });
        (Input::from_read_at("bad.vma", Arc::clone(&file) as Arc<dyn ReadAt>), file)
    }
}

impl ReadAt for BadSectors {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if position < self.bad.end && self.bad.start < position + buf.len() as u64 {
            return Err(io::Error::from_raw_os_error(5));
        }
        let start = position as usize;
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn granule(&self) -> u64 {
        self.granule
    }
}

#[test]
fn salvage_reads_around_bad_sectors() {
    let (bytes, truth, _) = archive();
    let total: u64 = truth.values().map(|device| device.len() as u64).sum();
    for at in (16_384..bytes.len() as u64).step_by(STEP) {
        let (input, _) = BadSectors::input(&bytes, at..at + 512, 1);
        let (content, losses) = salvaged(input);
        let lost = assert_restored(&format!("bad sector at {at}"), &content, &losses, &truth);
        assert!(lost > 0 && lost < total / 2, "bad sector at {at}: {lost} of {total} lost");
    }
}

/// Simulates seekable zstd with one frame per extent, one of them damaged.
#[test]
fn salvage_loses_only_the_damaged_frame_and_retries_it_rarely() {
    let (bytes, truth, _) = archive();
    let mut best = u64::MAX;
    for frame in extent_ranges(&bytes) {
        let (input, file) = BadSectors::input(&bytes, frame.start as u64..frame.end as u64, 4 << 20);
        let (content, losses) = salvaged(input);
        let lost = assert_restored(&format!("frame {frame:?}"), &content, &losses, &truth);
        assert!(lost > 0 && lost <= 7 * CLUSTER, "{lost} of frame {frame:?}");
        best = best.min(lost);
        let reads = file.reads.load(Ordering::Relaxed);
        assert!(reads < 150, "{reads} attempts");
    }
    assert!(best < 7 * CLUSTER);
}

/// A stream that ends with an error, like a decompressor on a damaged frame.
struct FailingStream(io::Cursor<Vec<u8>>);

impl Read for FailingStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf)? {
            0 => Err(io::Error::new(io::ErrorKind::InvalidData, "the zstd stream is damaged")),
            count => Ok(count),
        }
    }
}

#[test]
fn salvage_keeps_data_before_a_stream_error() {
    let (bytes, truth, _) = archive();
    for at in (12_800..bytes.len()).step_by(STEP) {
        let input = piped(FailingStream(io::Cursor::new(bytes[..at].to_vec()))).unwrap();
        let (content, losses) = salvaged(input);
        let (cut, cut_losses) = salvaged(as_stream(&bytes[..at]));
        assert!(content == cut, "broken at {at}");
        assert_eq!(losses.len(), cut_losses.len(), "broken at {at}");
        assert_restored(&format!("broken at {at}"), &content, &losses, &truth);
        let input = piped(FailingStream(io::Cursor::new(bytes[..at].to_vec()))).unwrap();
        read(input, &OpenOptions::default()).unwrap_err();
    }
}

#[test]
fn salvages_a_truncated_zstd_frame() {
    let whole = std::fs::read(fixture("two-disks.vma.zst")).unwrap();
    let truth = fixture_content(&decompressed("two-disks.vma.zst"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.vma.zst");
    let mut best = u64::MAX;
    for percent in [30, 60, 90, 99] {
        std::fs::write(&path, &whole[..whole.len() * percent / 100]).unwrap();
        read(open_file(&path), &OpenOptions::default()).unwrap_err();
        let (content, losses) = salvaged(open_file(&path));
        let lost = assert_restored(&format!("{percent} percent"), &content, &losses, &truth);
        assert!(lost > 0 && lost <= best);
        best = lost;
    }
    assert!(best < 3_000_000, "{best} bytes are lost of a frame that is nearly whole");
}

/// A decoder may decode a damaged end without an error and only then find no checksum.
#[test]
fn lists_clusters_without_a_checksum_as_unverified() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["two-disks.vma.zst", "two-disks.vma.gz"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        let truth = fixture_content(&decompressed(name));
        let path = dir.path().join(name);
        for seed in 1..40_u32 {
            let mut damaged = whole.clone();
            // Only zeros follow the last data of the disks, and the archive does not store them, so even a
            // short tail contains data.
            let from = whole.len() - (seed * seed * 8) as usize % 12_000 - 9;
            for (index, byte) in damaged[from..].iter_mut().enumerate() {
                *byte = match seed % 3 {
                    0 => b'U',
                    1 => 0,
                    _ => ((index as u32 + seed).wrapping_mul(0x9e37_79b9) >> 24) as u8,
                };
            }
            std::fs::write(&path, &damaged).unwrap();
            let (content, losses) = salvaged(open_file(&path));
            let what = format!("{name}, damaged from {from} of {}", whole.len());
            assert_restored(&what, &content, &losses, &truth);
            assert!(!losses.is_empty(), "{what}");
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let source = VmaSource::open(open_file(&path), &salvage()).unwrap();
        let content = read_source(&source).unwrap();
        assert_restored(name, &content, &source.losses(), &truth);
        let doubts = source.doubts();
        assert!(doubts.len() == 2 && doubts.iter().all(|doubt| doubt.reason.contains("is unverified")));
    }
}

/// Even a frame damaged near its start yields the archive header.
#[test]
fn salvage_reads_the_header_from_a_damaged_frame() {
    let whole = std::fs::read(fixture("two-disks.vma.zst")).unwrap();
    let truth = fixture_content(&decompressed("two-disks.vma.zst"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.vma.zst");
    for at in [9490, 30_000, 60_000, 210_000] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        let (content, losses) = salvaged(open_file(&path));
        assert!(assert_restored(&format!("byte {at}"), &content, &losses, &truth) > 0);
    }
}

/// Compresses each extent into a separate frame or member. The first one also contains the archive header.
fn in_units(bytes: &[u8], pack: impl Fn(&[u8]) -> Vec<u8>) -> Vec<Vec<u8>> {
    let mut ranges = extent_ranges(bytes);
    ranges[0].start = 0;
    ranges.into_iter().map(|range| pack(&bytes[range])).collect()
}

fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gzip_member(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Returns the archive of [`archive`] with noise as data, and its content. Damaged noise decompresses without
/// an error; only the checksum at the end of the frame reveals the damage.
fn noisy_archive() -> (Vec<u8>, Content) {
    let (mut bytes, _, _) = archive();
    let mut state = 1u32;
    for range in extent_ranges(&bytes) {
        for byte in &mut bytes[range.start + 512..range.end] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
    }
    let (truth, losses) = salvaged(as_file(&bytes));
    assert!(losses.is_empty());
    (bytes, truth)
}

/// Returns `unit` with each of four kinds of damage at byte `at`: a flipped bit, zeros, missing bytes, a cut.
fn damages(unit: &[u8], at: usize) -> [Vec<u8>; 4] {
    let mut flipped = unit.to_vec();
    flipped[at] ^= 0x10;
    let mut zeroed = unit.to_vec();
    let end = unit.len().min(at + 600);
    zeroed[at..end].fill(0);
    let mut shortened = unit.to_vec();
    shortened.drain(at..end);
    [flipped, zeroed, shortened, unit[..at].to_vec()]
}

#[test]
fn salvage_of_a_stream_loses_only_damaged_frames() {
    let (bytes, truth) = noisy_archive();
    for pack in [zstd_frame as fn(&[u8]) -> Vec<u8>, gzip_member] {
        let units = in_units(&bytes, pack);
        // The first unit contains the archive header, so it stays undamaged.
        for damaged in [1, units.len() - 1] {
            let unit = &units[damaged];
            for at in [0, 3, 16, unit.len() / 2, unit.len() - 700] {
                for (kind, bad) in damages(unit, at).into_iter().enumerate() {
                    let mut all = units.clone();
                    all[damaged] = bad;
                    let what = format!("unit {damaged} of {}, byte {at}, kind {kind}", units.len());
                    let (content, losses) = salvaged(as_stream(&all.concat()));
                    let lost = assert_restored(&what, &content, &losses, &truth);
                    // An extent has seven clusters. A unit with missing bytes damages the next unit as well.
                    // A cut unit damages as many units as its last compressed block then spans.
                    let is_bounded = kind == 3 || lost <= 14 * CLUSTER;
                    assert!(lost > 0 && is_bounded, "{what}: {lost}");
                    let report = VmaDriver.check(as_stream(&all.concat()), &OpenOptions::default()).unwrap();
                    assert!(report.corruptions > 0, "{what}");
                }
            }
        }
    }
}

#[test]
fn lists_clusters_from_a_long_damaged_frame_as_unverified() {
    let (bytes, truth) = noisy_archive();
    // `counts`: archives opened, and archives refused because the header is in the damaged part.
    for (pack, counts) in [(zstd_frame as fn(&[u8]) -> Vec<u8>, (34, 2)), (gzip_member, (36, 0))] {
        let unit = pack(&bytes);
        let (mut opened, mut refused) = (0, 0);
        for at in (13_000..unit.len()).step_by(unit.len() / 12) {
            for (kind, bad) in damages(&unit, at).into_iter().take(3).enumerate() {
                let what = format!("byte {at}, kind {kind}");
                let input = piped(io::Cursor::new(bad));
                let source = match input.and_then(|input| VmaSource::open(input, &salvage())) {
                    Ok(source) => source,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
                        refused += 1;
                        continue;
                    }
                };
                opened += 1;
                let content = read_source(&source).unwrap();
                assert_restored(&what, &content, &source.losses(), &truth);
                assert!(!source.losses().is_empty(), "{what}");
            }
        }
        assert_eq!((opened, refused), counts);
    }
}

#[test]
fn salvage_keeps_the_first_copy_of_a_duplicate_cluster() {
    let slots = [slot(1, 0, 1), slot(1, 1, 1)];
    let archive = ArchiveBuilder::new()
        .device(1, "a", 3 * CLUSTER)
        .extents(&slots, 59)
        .extent(extent(&[slot(1, 1, 0xffff)]))
        .build();
    let (content, losses) = salvaged(as_file(&archive));
    assert!(content[&1] == guest_content(1, 3 * CLUSTER, &slots));
    let listed: Vec<Range<u64>> = losses.iter().map(|loss| loss.guest.clone()).collect();
    assert_eq!(listed, [CLUSTER..2 * CLUSTER, 2 * CLUSTER..3 * CLUSTER]);
    assert!(losses[0].reason.contains("more than once"));
}

#[test]
fn salvage_decodes_a_damaged_header_as_far_as_possible() {
    let (bytes, truth, _) = archive();
    // Reserved bytes; UUID; version; offset of a configuration's name; end of the device table; first blobs.
    for range in [70..2000, 8..24, 4..8, 2044..2048, 8192..12_288, 12_288..12_300] {
        let mut damaged = bytes.clone();
        damaged[range.clone()].iter_mut().for_each(|byte| *byte ^= 0x5a);
        let what = format!("{range:?}");
        VmaSource::open(as_file(&damaged), &OpenOptions::default()).err().unwrap();
        for input in [as_file(&damaged), as_stream(&damaged)] {
            let source = VmaSource::open(input, &salvage()).unwrap();
            let content = read_source(&source).unwrap();
            assert!(content == truth, "{what}");
            assert_eq!(source.losses(), [], "{what}");
            let doubts = source.doubts();
            assert_eq!(doubts.len(), 3, "{what}: {doubts:?}");
            assert!(doubts.iter().all(|doubt| doubt.reason.contains("checksum")), "{what}");
            assert!(source.info().notes.iter().any(|note| note.contains("header is damaged")), "{what}");
        }
    }
    // Salvage needs the device table, the header size and the magic number.
    for (range, message) in [
        (4096..5000, "wrong vma header checksum"),
        (56..60, "wrong vma header size"),
        (0..4, "not a vma file"),
    ] {
        let mut damaged = bytes.clone();
        damaged[range].fill(0);
        let error = VmaSource::open(as_file(&damaged), &salvage()).err().unwrap();
        assert!(error.message().starts_with(message), "{error}");
        assert!(error.hint_text().is_some(), "{error}");
    }
}

#[test]
fn check_reports_every_fault() {
    let builder = ArchiveBuilder::new().device(1, "a", 4 * CLUSTER).device(2, "b", CLUSTER);
    let mut bad_uuid = extent(&[slot(1, 3, 1)]);
    bad_uuid.uuid = [7; 16];
    let archive = builder
        .extent(extent(&[slot(1, 0, 1), slot(1, 1, 0)]))
        .extent(bad_uuid)
        .extent(extent(&[slot(1, 1, 3), slot(9, 0, 0), slot(2, 5000, 1)]))
        .build();
    let report = VmaDriver.check(as_file(&archive), &OpenOptions::default()).unwrap();
    let findings = report.findings.join("\n");
    for finding in [
        "file offset 17408: wrong vma extent uuid",
        "found duplicated cluster 1 for stream a (device a, guest bytes 65536..131072, file offset 22016)",
        "got wrong dev id 9 (file offset 22016)",
        "got wrong block address - write beyond end (device b",
        "clusters 2 to 3 of 4 are missing (device a)",
        "cluster 0 of 1 is missing (device b)",
    ] {
        assert!(findings.contains(finding), "{finding} is missing from\n{findings}");
    }
    assert_eq!(report.corruptions, 6, "{findings}");
    let (bytes, _, _) = self::archive();
    let clean = VmaDriver.check(as_stream(&bytes), &OpenOptions::default()).unwrap();
    assert_eq!((clean.corruptions, clean.total_clusters), (0, Some(31)));
    assert_eq!(clean.image_end_offset, Some(bytes.len() as u64));
}
