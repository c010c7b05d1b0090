//! Formats that are only read, through the program.

use imgtool_testing::images::{noise, prose};
use imgtool_testing::{oracles, require, tempdir, text};

use crate::support::imgtool;

/// Returns a DMG image of `disk`, whose only chunk is compressed with bzip2. Its table is in a resource fork.
pub fn dmg(disk: &[u8]) -> Vec<u8> {
    let mut file = oracles::filter("bzip2", &["-c"], disk);
    let (stored, sectors) = (file.len() as u64, disk.len() as u64 / 512);
    let mut table = vec![0; 204];
    table[..8].copy_from_slice(b"mish\0\0\0\x01");
    table[16..24].copy_from_slice(&sectors.to_be_bytes());
    table[200..204].copy_from_slice(&1_u32.to_be_bytes());
    table.extend(0x8000_0006_u64.rotate_left(32).to_be_bytes());
    table.extend([0, sectors, 0, stored].map(u64::to_be_bytes).concat());
    let len = table.len() as u32;
    file.extend([16, 16 + 4 + len, 4 + len, 0, len].map(u32::to_be_bytes).concat());
    file.extend(table);
    let mut trailer = vec![0; 512];
    trailer[..12].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
    trailer[40..48].copy_from_slice(&stored.to_be_bytes());
    trailer[48..56].copy_from_slice(&(file.len() as u64 - stored).to_be_bytes());
    trailer[492..500].copy_from_slice(&sectors.to_be_bytes());
    file.extend(trailer);
    file
}

#[test]
fn reads_a_dmg_image_that_begins_like_a_compressed_file() {
    require!("bzip2", "qemu-img");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let disk = [noise(1, 4096), vec![0; 8192], prose(2, 100 * 512)].concat();
    let image = dmg(&disk);
    assert!(image.starts_with(b"BZh"));
    std::fs::write(path("x.raw"), &disk).unwrap();
    std::fs::write(path("x.dmg"), &image).unwrap();
    std::fs::write(path("other-name"), &image).unwrap();

    let packed = oracles::filter("bzip2", &["-c"], &image);
    std::fs::write(path("x.dmg.bz2"), packed).unwrap();
    imgtool(["compare", text(&path("x.dmg.bz2")), text(&path("x.raw"))]).ok();

    let info = imgtool(["info", text(&path("x.dmg"))]).ok();
    assert!(info.text().contains("file format: dmg"), "{}", info.text());
    imgtool(["check", text(&path("x.dmg"))]).ok();
    imgtool(["map", text(&path("x.dmg"))]).ok();
    imgtool(["compare", text(&path("x.dmg")), text(&path("x.raw"))]).ok();
    imgtool(["compare", "-f", "dmg", text(&path("other-name")), text(&path("x.raw"))]).ok();
    imgtool(["measure", "-O", "qcow2", text(&path("x.dmg"))]).ok();
    imgtool(["convert", text(&path("x.dmg")), text(&path("x.qcow2"))]).ok();
    oracles::qemu_compare(&path("x.raw"), "raw", &path("x.qcow2"), "qcow2");
}

#[test]
fn writes_none_of_them() {
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    for (format, name) in [
        ("parallels", "x.hds"),
        ("qed", "x.qed"),
        ("qcow", "x.qcow1"),
        ("bochs", "x.bochs"),
        ("cloop", "x.cloop"),
        ("dmg", "x.dmg"),
    ] {
        let target = dir.path().join(name);
        for args in [vec!["convert"], vec!["convert", "-O", format]] {
            let args = args.iter().copied().chain([text(&raw), text(&target)]);
            imgtool(args).go().exits(2).says("is read, but not written").says("formats: qcow2, ");
        }
    }
}

#[test]
fn a_qcow2_image_may_still_be_called_qcow() {
    let dir = tempdir();
    let (raw, target) = (dir.path().join("x.raw"), dir.path().join("x.qcow"));
    std::fs::write(&raw, noise(1, 4096)).unwrap();
    imgtool(["convert", text(&raw), text(&target)]).ok();
    let info = imgtool(["info", text(&target)]).ok();
    assert!(info.text().contains("file format: qcow2"), "{}", info.text());
}
