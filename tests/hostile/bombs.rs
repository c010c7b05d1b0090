//! Compressed files that expand without end, or ask for too much memory.

use std::path::{Path, PathBuf};
use std::process::Command;

use imgtool_testing::images::Image;
use imgtool_testing::vma::Archive;
use imgtool_testing::{require, tempdir, text};

use super::{all_end, qcow2};

/// Runs a shell line in `directory`.
#[track_caller]
fn sh(directory: &Path, line: &str) {
    let status = Command::new("bash").args(["-o", "pipefail", "-c", line]).current_dir(directory).status();
    assert!(status.unwrap().success(), "{line}");
}

/// Makes hundreds of MiB of zeros in compressed files, some after the header of an image, some compressed
/// again.
fn expanding(directory: &Path) -> Vec<PathBuf> {
    let head = qcow2(directory, "head", 5 << 20, 16, 64 << 40, 131_072);
    let archive = Archive::of([("drive-scsi0", Image::hole("x", 1 << 20))]).build();
    std::fs::write(directory.join("archive"), archive.bytes).unwrap();
    let all = [
        ("raw.zst", "head -c 1G /dev/zero | zstd -q -1"),
        ("raw.gz", "head -c 256M /dev/zero | gzip -1"),
        ("raw.xz", "head -c 256M /dev/zero | xz -0"),
        ("raw.bz2", "head -c 256M /dev/zero | bzip2 -1"),
        ("raw.lzo", "head -c 256M /dev/zero | lzop -1"),
        ("qcow2.zst", "(cat head; head -c 512M /dev/zero) | zstd -q -1"),
        ("qcow2.bz2", "(cat head; head -c 256M /dev/zero) | bzip2 -1"),
        ("vma.zst", "(cat archive; head -c 1G /dev/zero) | zstd -q -1"),
        ("raw.gz.zst", "head -c 256M /dev/zero | gzip -9 | gzip -9 | zstd -q -19"),
        ("zst-of-gz-of-zst-of-gz-of-zst", "echo | zstd -q | gzip | zstd -q | gzip | zstd -q"),
        (
            "empty-frames.raw.zst",
            "f=$(: | zstd -q --no-check | base64); for i in {1..20000}; do echo $f; done | base64 -d",
        ),
        (
            "empty-members.raw.gz",
            "f=$(: | gzip -n | base64); for i in {1..20000}; do echo $f; done | base64 -d",
        ),
    ];
    let mut paths = Vec::new();
    for (name, line) in all {
        sh(directory, &format!("({line}) > bomb.{name}"));
        paths.push(directory.join(format!("bomb.{name}")));
    }
    std::fs::remove_file(head.path).unwrap();
    std::fs::remove_file(directory.join("archive")).unwrap();
    paths
}

/// Makes compressed files whose headers ask for too much memory, by hand where no tool makes them.
fn demanding(directory: &Path) -> Vec<PathBuf> {
    sh(
        directory,
        "head -c 64M /dev/zero | zstd -q --ultra -20 --long=31 --no-check > window-of-2-gib.raw.zst",
    );
    sh(directory, "head -c 1M /dev/zero | xz --lzma2=dict=1536MiB > dictionary-of-1536-mib.raw.xz");
    // Window descriptor 0x88: 128 MiB, the most that we allow; then blocks that each repeat a zero 128 KiB
    // times.
    let frame =
        [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x88][..], &[0x02, 0, 0x10, 0].repeat(1599), &[0x03, 0, 0x10, 0]];
    let lzop =
        [b"\x89LZO\0\r\n\x1a\n".as_slice(), &[0x10, 0x30, 0x20, 0xa0, 0x09, 0x40, 1, 5, 3, 0, 0, 1]].concat();
    let gzip_name = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3][..], &[b'x'; 8 << 20]].concat();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff][..], &[0; 4096]].concat();
    // A seek table (a skippable frame at the end) that claims 4 Gi frames and contains none.
    let footer = [&[0xff; 4][..], &[0], &0x8f92_eab1u32.to_le_bytes()].concat();
    let table = [&[0x5e, 0x2a, 0x4d, 0x18][..], &(footer.len() as u32).to_le_bytes(), &footer].concat();
    let made = [
        ("window-of-128-mib.raw.zst", frame.concat()),
        ("block-of-4-gib.raw.lzo", [lzop, vec![0xff; 4096]].concat()),
        ("name-without-end.raw.gz", gzip_name),
        ("skippable-frame-of-4-gib.raw.zst", skippable),
        ("seek-table-of-4-gi-frames.raw.zst", [frame.concat(), table].concat()),
    ];
    let mut paths =
        vec![directory.join("window-of-2-gib.raw.zst"), directory.join("dictionary-of-1536-mib.raw.xz")];
    for (name, bytes) in made {
        std::fs::write(directory.join(name), bytes).unwrap();
        paths.push(directory.join(name));
    }
    paths
}

#[test]
fn decompression_bombs_stay_within_limits() {
    require!("prlimit", "zstd", "gzip", "xz", "bzip2", "lzop");
    let dir = tempdir();
    all_end("bombs", dir.path(), &expanding(dir.path()));
}

#[test]
fn excessive_memory_demands_stay_within_limits() {
    require!("prlimit", "zstd", "xz");
    let dir = tempdir();
    all_end("memory-demands", dir.path(), &demanding(dir.path()));
}

#[test]
fn info_refuses_to_expand_a_file_more_than_256_times() {
    require!("zstd");
    let dir = tempdir();
    // A qcow2 header and 3 GiB of zeros in 100 KiB: the program must unpack a copy to read it by position.
    let head = qcow2(dir.path(), "head", 5 << 20, 16, 1 << 30, 2);
    sh(dir.path(), "(cat head; head -c 3G /dev/zero) | zstd -q -1 > bomb.qcow2.zst");
    // Expands to more than 2 GiB, but to less than 256 times its length, due to 10 MiB of incompressible
    // content.
    sh(
        dir.path(),
        "(cat head; head -c 10M /dev/urandom; head -c 2300M /dev/zero) | zstd -q -1 > large.qcow2.zst",
    );
    std::fs::remove_file(head.path).unwrap();
    let stop = crate::support::imgtool(["info", "bomb.qcow2.zst"]).within(dir.path()).measured().go();
    let stop = stop.exits(1).says("expands to more than 2147483648 bytes").says("decompress it first");
    assert!(stop.peak_memory < super::MEMORY);
    crate::support::imgtool(["info", "large.qcow2.zst"]).within(dir.path()).ok();
    assert_eq!(imgtool_testing::names(dir.path()), ["bomb.qcow2.zst", "large.qcow2.zst"]);
    // `convert` needs the content and reads it to the end.
    crate::support::imgtool(["convert", "bomb.qcow2.zst", "--to", "raw", "out.raw"]).within(dir.path()).ok();
    let len = std::fs::metadata(dir.path().join("out.raw")).unwrap().len();
    assert_eq!(len, 1 << 30, "{}", text(dir.path()));
}
