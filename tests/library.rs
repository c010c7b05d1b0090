//! The library as another program uses it: `imgtool::open` and `imgtool::convert`.

use std::io::Read;

use imgtool::Disk;
use imgtool_testing::sha256;

mod convert;
mod open;
mod progress;

/// Disks of `two-disks.vma.zst`: name, size, SHA-256 of the content.
const TWO_DISKS: [(&str, u64, &str); 2] = [
    ("drive-scsi0", 5_255_168, "2eb0f4945306c46775684ae3e6b0f9c401fea1cbfb4ff3c2d6cbe6b8745326f3"),
    ("drive-efidisk0", 540_672, "a0fd2cf34e841d0d1e7f30367fc2b547c952d35ae30d9003b2890c10b61d82c9"),
];

/// Returns the SHA-256 of all content of a disk.
fn digest(disk: &Disk) -> String {
    let mut content = Vec::new();
    disk.reader().read_to_end(&mut content).unwrap();
    sha256(&content)
}

/// Asserts that `disks` are the two disks of `two-disks.vma.zst`.
#[track_caller]
fn assert_two_disks(disks: &[Disk]) {
    let found: Vec<_> = disks.iter().map(|disk| (disk.name(), disk.size(), digest(disk))).collect();
    let expected = TWO_DISKS.map(|(name, size, sha256)| (name, size, sha256.to_owned()));
    assert_eq!(found, expected);
}
