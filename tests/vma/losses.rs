//! Report of `--salvage`: three classes of ranges, the place of the damage, and advice on the next step.

use std::path::Path;

use imgtool_testing::images::{Image, noise};
use imgtool_testing::vma::Archive;
use imgtool_testing::{oracles, require, tempdir};
use serde_json::Value;

use crate::support::imgtool;

/// Length in bytes of a cluster.
const CLUSTER: u64 = 65_536;

fn disk() -> Image {
    Image::hole("d", 40 * CLUSTER).with(0, noise(1, 40 * CLUSTER as usize))
}

fn lost(directory: &Path, archive: &str) -> Vec<Value> {
    let line = ["convert", "--force", "--salvage", "--output", "json", archive, "--to", "raw", "out.raw"];
    let run = imgtool(line).within(directory).go().exits(3);
    run.json()["lost"].as_array().unwrap().clone()
}

fn ranges(lost: &[Value], class: &str) -> Vec<(u64, u64)> {
    let of_class = lost.iter().filter(|range| range["class"] == class);
    let number = |range: &Value, field: &str| range[field].as_u64().unwrap();
    of_class.map(|range| (number(range, "start"), number(range, "length"))).collect()
}

#[test]
fn classes_of_losses_are_told_apart() {
    let dir = tempdir();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let archive = || Archive::of([("drive-scsi0", disk())]).ids(&[1]);
    // A cluster that the writer left out, and one stored twice.
    let holes = archive().without_cluster(1, 5).build();
    write("holes.vma", &holes.bytes);
    let found = lost(dir.path(), "holes.vma");
    assert_eq!(ranges(&found, "never-stored"), [(5 * CLUSTER, CLUSTER)], "{found:?}");
    assert_eq!(found.len(), 1);
    write("twice.vma", &archive().with_cluster_twice(1, 9).build().bytes);
    let found = lost(dir.path(), "twice.vma");
    assert_eq!(ranges(&found, "unverified"), [(9 * CLUSTER, CLUSTER)], "{found:?}");
    let whole = archive().build().bytes;
    write("cut.vma", &whole[..whole.len() - 3 * CLUSTER as usize]);
    let found = lost(dir.path(), "cut.vma");
    assert_eq!(ranges(&found, "lost"), [(37 * CLUSTER, 3 * CLUSTER)], "{found:?}");
    // The offset is where the archive is damaged.
    assert!(found[0]["offset"].as_u64().is_some_and(|offset| offset < whole.len() as u64), "{found:?}");
    let line = ["convert", "--force", "--salvage", "cut.vma", "--to", "raw", "out.raw"];
    imgtool(line)
        .within(dir.path())
        .go()
        .exits(3)
        .says("lost: 192 KiB (196608 bytes) in 1 range (reads as zeros):")
        .says("imgtool compare --list out.raw OTHER")
        .says("fsck");
    let line = ["convert", "--force", "--salvage", "holes.vma", "--to", "raw", "out.raw"];
    imgtool(line).within(dir.path()).go().exits(3).says("never stored: 64 KiB").says("although it is intact");
}

#[test]
fn offsets_in_a_compressed_archive_are_said_to_be_decompressed() {
    let dir = tempdir();
    let whole = Archive::of([("drive-scsi0", disk())]).ids(&[1]).build().bytes;
    std::fs::write(dir.path().join("cut.vma"), &whole[..whole.len() - 70_000]).unwrap();
    let pack = ["convert", "-q", "-f", "raw", "--to", "raw", "cut.vma", "cut.vma.zst"];
    imgtool(pack).within(dir.path()).ok();
    let salvage = |name: &str| {
        let line = ["convert", "--force", "--salvage", name, "--to", "raw", "out.raw"];
        imgtool(line).within(dir.path()).go().exits(3)
    };
    let stored = std::fs::metadata(dir.path().join("cut.vma.zst")).unwrap().len();
    salvage("cut.vma.zst").says("offsets are those in the decompressed data").says("; compressed byte ");
    let found = lost(dir.path(), "cut.vma.zst");
    // The last extent is cut: that shows at the end of the file.
    let position = found[0]["compressed-offset"].as_u64().unwrap();
    assert!(position > stored / 4 && position <= stored, "{position} of {stored}: {found:?}");
    let plain = salvage("cut.vma").stderr;
    assert!(!plain.contains("decompressed") && !plain.contains("compressed byte"), "{plain}");
}

/// Damages a byte of a compressed archive, and asks for the place of what salvage has lost by it.
#[test]
fn the_place_in_the_compressed_file_is_named() {
    let dir = tempdir();
    let archive = Archive::of([("drive-scsi0", disk())]).ids(&[1]).build().bytes;
    require!("zstd", "gzip", "xz", "lzop", "bzip2");
    for program in ["zstd", "gzip", "xz", "lzop", "bzip2"] {
        let extension = match program {
            "zstd" => "zst",
            "gzip" => "gz",
            "lzop" => "lzo",
            "bzip2" => "bz2",
            other => other,
        };
        let arguments: &[&str] = if program == "zstd" { &["-q", "-c", "--check"] } else { &["-c"] };
        let mut stored = oracles::filter(program, arguments, &archive);
        let at = stored.len() / 2;
        stored[at] ^= 0x55;
        let name = format!("{program}.vma.{extension}");
        std::fs::write(dir.path().join(&name), &stored).unwrap();
        let line = ["convert", "--force", "--salvage", "--output", "json", &name, "--to", "raw", "out.raw"];
        let run = imgtool(line).within(dir.path()).go().exits(3);
        let found = run.json()["lost"].as_array().unwrap().clone();
        let places: Vec<u64> = found.iter().filter_map(|loss| loss["compressed-offset"].as_u64()).collect();
        assert!(!places.is_empty(), "{name}: {found:?}");
        // A decoder finds the damage where it is, or at the next checksum: at the end, if there is only one.
        let is_near = |place: &u64| (at as u64 / 2..=stored.len() as u64).contains(place);
        assert!(places.iter().all(is_near), "{name}: damaged at {at} of {}, found {places:?}", stored.len());
        // Without salvage, the error names the place, too.
        let line = ["convert", "--force", &name, "--to", "raw", "out.raw"];
        imgtool(line).within(dir.path()).go().exits(1).says("compressed byte ");
    }
}
