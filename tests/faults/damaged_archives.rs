//! Damaged archives: the program reports the position, exits with 1 and leaves nothing behind.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::{Archive, Built};
use imgtool_testing::{snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::Outcome;

/// Returns an archive of two small disks in several extents.
fn healthy() -> Archive {
    let first = Image::hole("first", 9 * 65_536 + 512)
        .with(4096, images::noise(1, 4096))
        .with(5 * 65_536, images::noise(2, 20_000))
        .with(9 * 65_536, images::noise(3, 512));
    let second = Image::hole("second", 3 * 65_536).with(65_536, images::noise(4, 8192));
    Archive::of([("drive-scsi0", first), ("drive-scsi1", second)])
        .config("qemu-server.conf", b"cores: 1\n")
        .slots_per_extent(4)
}

/// Converts a damaged archive from a file and from a pipe. Both runs must fail and leave the directory
/// unchanged, and the error must name the file. Returns the run on the file.
fn fails(directory: &Path, bytes: &[u8], what: &str) -> Outcome {
    let file = directory.join("damaged.vma");
    std::fs::write(&file, bytes).unwrap();
    let before = snapshot(directory);
    let out = directory.join("out");
    let from_pipe =
        imgtool(["convert", "-f", "vma", "-", "--to", "qcow2", text(&out)]).pipe_bytes(bytes).go();
    let from_file = imgtool(["convert", "-f", "vma", text(&file), "--to", "qcow2", text(&out)]).go();
    for (how, run) in [("pipe", &from_pipe), ("file", &from_file)] {
        assert_eq!(run.status.code(), Some(1), "{what}, {how}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{what}, {how}: {}", run.stderr);
        assert!(run.stderr.lines().count() <= 8, "{what}, {how}: too long\n{}", run.stderr);
    }
    assert!(from_file.stderr.contains("damaged.vma"), "{what}: the file is not named: {}", from_file.stderr);
    assert_eq!(snapshot(directory), before, "{what} left something behind");
    from_file
}

/// Builds an archive, and proves that it can be converted before the tests damage it.
fn proven(directory: &Path, archive: &Archive) -> Built {
    let built = archive.build();
    let file = directory.join("healthy.vma");
    std::fs::write(&file, &built.bytes).unwrap();
    let out = directory.join("healthy");
    imgtool(["convert", text(&file), "--to", "raw", text(&out)]).ok();
    std::fs::remove_dir_all(out).unwrap();
    std::fs::remove_file(file).unwrap();
    built
}

#[test]
fn rejects_an_archive_truncated_anywhere() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    let len = built.bytes.len();
    let mut cuts = vec![0, 1, 3, 4, 11, 48, 511, 2044, 4096, 12_287, 12_288, 12_289, len - 1, len - 4096];
    for extent in &built.extents {
        cuts.extend([extent + 1, extent + 24, extent + 511, extent + 512, extent + 513, extent + 4608]);
    }
    cuts.extend((0..24).map(|i| len * i / 24 + 7));
    cuts.retain(|cut| *cut < len);
    for cut in cuts {
        fails(dir.path(), &built.bytes[..cut], &format!("cut at {cut} of {len}"));
    }
    // After a cut between two extents, only the missing clusters show the damage.
    for extent in &built.extents {
        fails(dir.path(), &built.bytes[..*extent], &format!("cut before the extent at {extent}"));
    }
}

#[test]
fn rejects_a_flipped_bit_in_the_archive_header() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    let mut places = vec![0, 3, 4, 7, 8, 23, 24, 31, 32, 47, 48, 51, 52, 55, 56, 57, 59, 60, 2043];
    places.extend([2044, 2047, 3068, 3071, 4092, 4096, 4128, 4131, 4136, 4143, 4144, 4160, 4168, 4175]);
    places.extend([12_288, 12_289, 12_290, 12_291, 12_300, built.extents[0] - 1]);
    places.extend((0..30).map(|i| i * 409 + 13));
    for place in places {
        let mut bytes = built.bytes.clone();
        bytes[place] ^= 1 << (place % 8);
        fails(dir.path(), &bytes, &format!("bit {} of header byte {place}", place % 8));
    }
}

#[test]
fn names_the_offset_of_a_damaged_extent_header() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    for extent in &built.extents {
        let fields = [0, 3, 4, 5, 6, 7, 8, 23, 24, 39, 40, 41, 42, 43, 44, 47, 64, 300, 504, 511];
        for field in fields {
            let mut bytes = built.bytes.clone();
            bytes[extent + field] ^= 1 << (field % 8);
            let what = format!("bit {} of byte {field} of the extent at {extent}", field % 8);
            let run = fails(dir.path(), &bytes, &what);
            assert!(run.stderr.contains(&extent.to_string()), "{what}: no place: {}", run.stderr);
        }
    }
}

#[test]
fn names_device_and_range_of_a_missing_cluster() {
    let dir = tempdir();
    for (id, name, cluster) in [(1, "drive-scsi0", 0u32), (1, "drive-scsi0", 9), (2, "drive-scsi1", 2)] {
        let built = healthy().without_cluster(id, cluster).build();
        let run = fails(dir.path(), &built.bytes, &format!("{name} without cluster {cluster}"));
        assert!(run.stderr.contains(name), "{}", run.stderr);
        assert!(run.stderr.contains(&(u64::from(cluster) * 65_536).to_string()), "{}", run.stderr);
    }
}

#[test]
fn names_device_and_range_of_a_duplicate_cluster() {
    let dir = tempdir();
    for (id, name, cluster) in [(1, "drive-scsi0", 0u32), (1, "drive-scsi0", 7), (2, "drive-scsi1", 1)] {
        let built = healthy().with_cluster_twice(id, cluster).build();
        let run = fails(dir.path(), &built.bytes, &format!("{name} with cluster {cluster} twice"));
        assert!(run.stderr.contains(name), "{}", run.stderr);
        assert!(run.stderr.contains(&(u64::from(cluster) * 65_536).to_string()), "{}", run.stderr);
    }
}

#[test]
fn rejects_bytes_after_the_last_extent() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    for tail in [vec![0u8], vec![0; 512], vec![0; 10_240], images::noise(1, 700)] {
        let bytes = [built.bytes.as_slice(), &tail].concat();
        fails(dir.path(), &bytes, &format!("{} bytes behind the end", tail.len()));
    }
}

#[test]
fn rejects_duplicate_and_missing_extents() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    let (start, end) = (built.extents[1], built.extents[2]);
    let twice = [&built.bytes[..end], &built.bytes[start..end], &built.bytes[end..]].concat();
    fails(dir.path(), &twice, "an extent twice");
    let gone = [&built.bytes[..start], &built.bytes[end..]].concat();
    fails(dir.path(), &gone, "an extent missing");
}

#[test]
fn damaged_archive_leaves_existing_files_unchanged() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    let source = dir.path().join("cut.vma");
    std::fs::write(&source, &built.bytes[..built.bytes.len() - 100]).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("drive-scsi0.raw"), b"precious").unwrap();
    std::fs::write(out.join("unrelated"), b"precious too").unwrap();
    let before = snapshot(dir.path());
    imgtool(["convert", "--force", text(&source), "--to", "raw", text(&out)]).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn rejects_truncated_qcow2_and_vhdx_images() {
    imgtool_testing::require!("qemu-img");
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    images::every_mask().write_raw(&raw);
    for format in ["qcow2", "vhdx"] {
        let image = dir.path().join(format!("x.{format}"));
        imgtool_testing::oracles::qemu_make(&raw, format, "", &image);
        let bytes = std::fs::read(&image).unwrap();
        for cut in [bytes.len() / 3, bytes.len() / 2, bytes.len() * 3 / 4] {
            std::fs::write(dir.path().join("cut"), &bytes[..cut]).unwrap();
            let before = snapshot(dir.path());
            let out = dir.path().join("out.raw");
            let source = dir.path().join("cut");
            imgtool(["convert", "-f", format, text(&source), "--to", "raw", text(&out)]).go().exits(1);
            assert_eq!(snapshot(dir.path()), before, "{format} cut at {cut}");
        }
    }
}

#[test]
fn salvage_keeps_intact_data_lists_losses_and_exits_3() {
    let dir = tempdir();
    let built = proven(dir.path(), &healthy());
    let source = dir.path().join("cut.vma");
    // The first extent survives: clusters 0..4 of the first disk.
    std::fs::write(&source, &built.bytes[..built.extents[1] + 100]).unwrap();
    let (raw, out) = (dir.path().join("first.raw"), dir.path().join("out"));
    Image::hole("first", 9 * 65_536 + 512).with(4096, images::noise(1, 4096)).write_raw(&raw);
    let run = imgtool(["convert", "--salvage", text(&source), "--to", "raw", text(&out)]).go().exits(3);
    let said = run.text() + &run.stderr;
    assert!(said.contains("drive-scsi0") && said.contains("drive-scsi1"), "{said}");
    imgtool_testing::assert_same(&raw, &out.join("drive-scsi0.raw"), "what is whole");
}
