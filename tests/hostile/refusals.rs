//! Refusals: external files, unknown features, malicious headers. The message names the reason, and nothing
//! is written.

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, first_difference, oracles, require, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::trace::opened_outside;

/// Asserts that converting `source` fails with exit code 1, prints each of `words`, and writes nothing.
fn refused(directory: &Path, source: &str, words: &[&str]) {
    let before = snapshot(directory);
    for format in ["raw", "qcow2", "vma"] {
        let mut run = imgtool(["convert", source, "--to", format, "out"]).within(directory).go().exits(1);
        for word in words {
            run = run.says(word);
        }
        assert_eq!(snapshot(directory), before, "{source} to {format}");
    }
}

/// Creates a directory that contains `base.raw`.
fn with_base() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("base", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&dir.path().join("base.raw"));
    dir
}

fn qemu_img(directory: &Path, line: &str) {
    let output = Command::new("qemu-img").args(line.split(' ')).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

#[test]
fn refuses_backing_files_by_default() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "create -q -f qcow2 -F raw -b base.raw overlay.qcow2");
    refused(dir.path(), "overlay.qcow2", &["backing file", "base.raw"]);
}

#[test]
fn refuses_etc_passwd_as_a_backing_file() {
    require!("qemu-img", "strace");
    let dir = with_base();
    qemu_img(dir.path(), "create -q -u -f qcow2 -F raw -b /etc/passwd overlay.qcow2 1M");
    refused(dir.path(), "overlay.qcow2", &["/etc/passwd"]);
    assert_eq!(opened_outside(dir.path(), &["info", "overlay.qcow2"]), [""; 0]);
}

#[test]
fn reads_an_allowed_backing_file() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "create -q -f qcow2 -F raw -b base.raw overlay.qcow2 2M");
    let line = ["-c", "write -q -P 7 300k 200k", "overlay.qcow2"];
    let status = Command::new("qemu-io").args(line).current_dir(dir.path()).status();
    assert!(status.is_ok_and(|status| status.success()));
    qemu_img(dir.path(), "convert -O raw overlay.qcow2 wanted.raw");
    for allowed in ["chain", "base.raw"] {
        let line =
            ["convert", "--force", "--allow-external", allowed, "overlay.qcow2", "--to", "raw", "out.raw"];
        imgtool(line).within(dir.path()).ok();
        assert_same(&dir.path().join("wanted.raw"), &dir.path().join("out.raw"), allowed);
    }
}

#[test]
fn refuses_external_data_files_by_default() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "convert -f raw -O qcow2 -o data_file=data.bin base.raw image.qcow2");
    refused(dir.path(), "image.qcow2", &["data file", "data.bin"]);
}

#[test]
fn refuses_encrypted_images() {
    require!("qemu-img");
    let dir = tempdir();
    let line = "create -q --object secret,id=s,data=secret -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 image.qcow2 1M";
    qemu_img(dir.path(), line);
    refused(dir.path(), "image.qcow2", &["encrypt"]);
}

#[test]
fn refuses_unknown_incompatible_features() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "convert -f raw -O qcow2 base.raw image.qcow2");
    let path = dir.path().join("image.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    // Incompatible features: header bytes 72 to 79, big-endian. Bit 40 has no meaning.
    bytes[72 + 2] |= 1;
    std::fs::write(&path, bytes).unwrap();
    refused(dir.path(), "image.qcow2", &["feature"]);
}

#[test]
fn reads_extended_l2_entries() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "convert -f raw -O qcow2 -o extended_l2=on,cluster_size=64k base.raw image.qcow2");
    imgtool(["convert", "image.qcow2", "--to", "raw", "out.raw"]).within(dir.path()).ok();
    assert_same(&dir.path().join("base.raw"), &dir.path().join("out.raw"), "extended L2");
}

#[test]
fn refuses_differencing_vhdx_images_by_default() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "convert -f raw -O vhdx base.raw image.vhdx");
    let path = dir.path().join("image.vhdx");
    let mut bytes = std::fs::read(&path).unwrap();
    // The file parameters item follows its GUID caa16737-fa36-4d43-b3b6-33f0aa44e76b in the
    // metadata table; its flags (bit 1: has a parent) are the second 32-bit word.
    let guid =
        [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b];
    let entry = bytes.windows(16).position(|window| window == guid).expect("file parameters");
    let table = bytes.windows(8).position(|window| window == b"metadata").expect("metadata table");
    let item = u32::from_le_bytes(bytes[entry + 16..entry + 20].try_into().unwrap()) as usize;
    bytes[table + item + 4] |= 2;
    std::fs::write(&path, bytes).unwrap();
    refused(dir.path(), "image.vhdx", &["parent"]);
}

#[test]
fn rejects_hostile_headers_within_the_memory_limit() {
    let dir = tempdir();
    let be32 = |value: u32| value.to_be_bytes();
    let mut l1_too_big = vec![0u8; 65_536];
    l1_too_big[..4].copy_from_slice(b"QFI\xfb");
    l1_too_big[4..8].copy_from_slice(&be32(3));
    l1_too_big[20..24].copy_from_slice(&be32(16));
    l1_too_big[24..32].copy_from_slice(&(1u64 << 62).to_be_bytes());
    l1_too_big[36..40].copy_from_slice(&be32(u32::MAX));
    l1_too_big[100..104].copy_from_slice(&be32(104));
    let mut huge_header = vec![0u8; 12_800];
    huge_header[..4].copy_from_slice(b"VMA\0");
    huge_header[7] = 1;
    huge_header[48..52].copy_from_slice(&be32(12_288));
    huge_header[52..56].copy_from_slice(&be32(u32::MAX));
    huge_header[56..60].copy_from_slice(&be32(0x7fff_0000));
    let vhdx_only_magic = [b"vhdxfile".to_vec(), vec![0xff; 1 << 20]].concat();
    let cases = [("qcow2", l1_too_big), ("vma", huge_header), ("vhdx", vhdx_only_magic)];
    for (format, bytes) in cases {
        let source = dir.path().join("hostile");
        std::fs::write(&source, bytes).unwrap();
        let before = snapshot(dir.path());
        let line = ["convert", "hostile", "--to", "raw", "out"];
        let run = imgtool(line).within(dir.path()).measured().go().exits(1);
        assert!(run.peak_memory < 256 << 20, "{format}: {} bytes", run.peak_memory);
        assert_eq!(snapshot(dir.path()), before, "{format}");
    }
}

/// Header bytes that may have any value in a qcow2 image without a backing file and snapshots: the reader
/// does not need them, or they change only the size of the disk (29 to 31).
const ACCEPTED: [Range<usize>; 9] =
    [14..15, 16..20, 29..32, 38..40, 49..54, 64..72, 80..96, 102..103, 105..112];

/// Converts an image once for each place, with the byte there changed. The program must refuse the image
/// where `refused` returns true; elsewhere the output must have the content of `base.raw`.
#[track_caller]
fn with_one_byte_changed(format: &str, places: &[usize], refused: impl Fn(usize) -> bool) {
    let dir = with_base();
    let (base, image) = (dir.path().join("base.raw"), dir.path().join("image"));
    let (mutant, out) = (dir.path().join("mutant"), dir.path().join("mutant.raw"));
    oracles::qemu_make(&base, format, "", &image);
    let good = std::fs::read(&image).unwrap();
    for place in places {
        let mut bytes = good.clone();
        bytes[*place] = bytes[*place].wrapping_add(0x81);
        std::fs::write(&mutant, bytes).unwrap();
        let run = imgtool(["convert", "-f", format, text(&mutant), "--to", "raw", text(&out)]).go();
        if refused(*place) {
            run.exits(1);
        } else {
            run.exits(0);
            assert_eq!(first_difference(&base, &out), None, "{format} byte {place}");
            std::fs::remove_file(&out).unwrap();
        }
    }
}

#[test]
fn changed_qcow2_header_byte_is_refused_or_harmless() {
    require!("qemu-img");
    let places: Vec<usize> = (4..112).collect();
    with_one_byte_changed("qcow2", &places, |place| !ACCEPTED.iter().any(|range| range.contains(&place)));
}

/// The checksum of the first copy is wrong, so the program reads the second.
#[test]
fn changed_byte_in_one_vhdx_header_copy_is_harmless() {
    require!("qemu-img");
    let places: Vec<usize> =
        (0..40).map(|i| 65_536 + i * 3).chain((0..30).map(|i| 196_608 + i * 3)).collect();
    with_one_byte_changed("vhdx", &places, |_| false);
}

/// A fixed VHD begins with the first sector of the guest, which may look like an image of another format.
#[test]
fn a_guest_does_not_choose_the_format_of_its_disk() {
    require!("qemu-img");
    let dir = with_base();
    qemu_img(dir.path(), "create -q -f qcow2 inner.qcow2 64M");
    let inner = std::fs::read(dir.path().join("inner.qcow2")).unwrap();
    Image::hole("guest", 2 << 20).with(0, inner).write_raw(&dir.path().join("guest.raw"));
    imgtool("convert -q -f raw guest.raw -O vhd -o subformat=fixed guest.vhd".split(' '))
        .within(dir.path())
        .ok();
    imgtool("convert guest.vhd --to raw back.raw".split(' ')).within(dir.path()).ok().says("vhd, 2 MiB");
    assert_same(&dir.path().join("guest.raw"), &dir.path().join("back.raw"), "the disk of the guest");

    // Compressed, the end is known only after the beginning.
    let gz = oracles::filter("gzip", &["-1"], &std::fs::read(dir.path().join("guest.vhd")).unwrap());
    std::fs::write(dir.path().join("guest.vhd.gz"), gz).unwrap();
    let line = "convert --force guest.vhd.gz --to raw back.raw";
    imgtool(line.split(' ')).within(dir.path()).ok().says("vhd in gzip, 2 MiB");
    assert_same(
        &dir.path().join("guest.raw"),
        &dir.path().join("back.raw"),
        "the compressed disk of the guest",
    );
    imgtool("check guest.vhd.gz".split(' ')).within(dir.path()).ok();
    let info = imgtool("info guest.vhd.gz".split(' ')).within(dir.path()).ok();
    assert!(info.text().contains("file format: vhd"), "{}", info.text());
}

/// A name decides what a file may be by its end, so another name must not hide it without a word.
#[test]
fn refuses_a_raw_disk_that_ends_like_an_image() {
    let dir = with_base();
    imgtool("convert -q base.raw -O vhd -o subformat=fixed azure.img".split(' ')).within(dir.path()).ok();
    for line in ["convert azure.img --to raw out.raw", "info azure.img", "checksum azure.img"] {
        imgtool(line.split(' ')).within(dir.path()).go().exits(1).says("ends like a vhd image");
    }
    imgtool("info -f raw azure.img".split(' ')).within(dir.path()).ok();
    imgtool("compare -f vhd azure.img base.raw".split(' ')).within(dir.path()).ok();
}
