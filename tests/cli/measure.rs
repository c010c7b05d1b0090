//! `measure` of archives and with compression: every disk, the sum, and an estimate that holds.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::tempdir;
use serde_json::Value;

use crate::support::imgtool;

fn workshop() -> tempfile::TempDir {
    let dir = tempdir();
    let text = "Every line of this text is the same as the one before it, but for a number: ";
    let text: Vec<u8> = (0..60_000).flat_map(|number| format!("{text}{number}\n").into_bytes()).collect();
    let image = Image::hole("a", 200 << 20).with(3 << 20, text).with(90 << 20, images::noise(1, 5 << 20));
    image.write_raw(&dir.path().join("a.raw"));
    Image::hole("b", 24 << 20).with(1 << 20, images::noise(2, 2 << 20)).write_raw(&dir.path().join("b.raw"));
    let pack = ["convert", "-q", "drive-scsi0=a.raw", "drive-scsi1=b.raw", "vm.vma.zst"];
    imgtool(pack).within(dir.path()).ok();
    dir
}

fn measure(directory: &Path, args: &[&str]) -> Value {
    imgtool(["measure", "--output", "json"]).args(args).within(directory).ok().json()
}

fn len(directory: &Path, name: &str) -> u64 {
    std::fs::metadata(directory.join(name)).unwrap().len()
}

#[test]
fn measures_every_disk_of_an_archive_and_the_sum() {
    let dir = workshop();
    let found = measure(dir.path(), &["-O", "qcow2", "vm.vma.zst"]);
    let single = |name: &str| measure(dir.path(), &["-O", "qcow2", name])["required"].as_u64().unwrap();
    let (a, b) = (single("a.raw"), single("b.raw"));
    assert_eq!(found["devices"][0]["name"], "drive-scsi0");
    // Data in whole clusters of the archive may be a little more than in the raw file.
    for (device, expected) in [(0, a), (1, b)] {
        let required = found["devices"][device]["required"].as_u64().unwrap();
        assert!(required.abs_diff(expected) <= 1 << 20, "{found} {expected}");
    }
    let sum: u64 = (0..2).map(|index| found["devices"][index]["required"].as_u64().unwrap()).sum();
    assert_eq!(found["required"], sum);
    let one = measure(dir.path(), &["-O", "qcow2", "--disk", "scsi1", "vm.vma.zst"]);
    assert_eq!(one["required"], found["devices"][1]["required"]);
    let archive = measure(dir.path(), &["-O", "vma", "vm.vma.zst"]);
    imgtool(["convert", "-q", "vm.vma.zst", "plain.vma"]).within(dir.path()).ok();
    let real = len(dir.path(), "plain.vma");
    assert!(archive["required"].as_u64().unwrap().abs_diff(real) <= real / 50, "{archive} {real}");
    let text = imgtool(["measure", "-O", "qcow2", "vm.vma.zst"]).within(dir.path()).ok().text();
    assert!(text.contains("drive-scsi0") && text.contains(&format!("required size: {sum}\n")), "{text}");
    let missing = ["measure", "-O", "qcow2", "--disk", "scsi7", "vm.vma.zst"];
    imgtool(missing).within(dir.path()).go().exits(2).says("no device is called 'scsi7'");
}

#[test]
fn compressed_size_is_estimated_from_samples() {
    let dir = workshop();
    for (args, convert) in [
        (&["-O", "qcow2", "-c", "a.raw"][..], &["-c", "a.raw", "c.qcow2"][..]),
        (&["-O", "qcow2", "-c=zstd", "a.raw"], &["-c=zstd", "a.raw", "z.qcow2"]),
        (&["-O", "qcow2", "-c", "vm.vma.zst", "--disk", "scsi1"], &["-c", "b.raw", "b.qcow2"]),
        (&["-O", "vma", "-c", "vm.vma.zst"], &["vm.vma.zst", "again.vma.zst"]),
        (&["-O", "vmdk", "-o", "subformat=streamOptimized", "-c", "a.raw"], &["-c", "a.raw", "s.vmdk"]),
    ] {
        imgtool(["convert", "-q"]).args(convert).within(dir.path()).ok();
        let real = len(dir.path(), convert.last().unwrap());
        let found = measure(dir.path(), args);
        let bytes = found["estimate"]["bytes"].as_u64().unwrap();
        assert!(bytes.abs_diff(real) <= real / 10 + (1 << 18), "{args:?}: {found}, really {real}");
        assert_eq!(found["estimate"]["method"], "sampled");
    }
    let text = imgtool(["measure", "-O", "qcow2", "-c", "a.raw"]).within(dir.path()).ok().text();
    assert!(text.contains("compressed size, estimated: ") && text.contains("method: compressed "), "{text}");
    imgtool(["measure", "-O", "raw", "-c", "a.raw"]).within(dir.path()).go().exits(2).says("no compression");
}
