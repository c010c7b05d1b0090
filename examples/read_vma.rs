//! Reads from a disk in a VMA archive at any offset, without extracting the archive.
//!
//! ```sh
//! cargo run --release --example read_vma -- fixtures/sparse.vma
//! cargo run --release --example read_vma -- fixtures/sparse.vma drive-virtio0 268455936 64
//! ```
//!
//! Given only an archive, it lists the disks and the number of bytes stored for each. With a disk, a guest
//! offset and a length, it prints these guest bytes.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;

use imgtool::contracts::OpenOptions;
use imgtool::{Error, Image, Result};

/// Opens an archive for random access. A compressed archive is first copied to an unnamed temporary file,
/// unless it is a seekable .zst as imgtool writes it.
fn open(archive: &Path) -> Result<Image> {
    imgtool::open_with(&imgtool::registry(), archive, Some("vma"), &OpenOptions::default())
}

/// Lists the disks with their virtual sizes and stored bytes. Reads the archive's index, but no data.
fn list(archive: &Path) -> Result<String> {
    let mut text = String::new();
    for disk in open(archive)?.disks()? {
        let (mut at, mut stored) = (0, 0);
        while at < disk.size() {
            // The extents may cover only the first part of the range.
            for extent in disk.extents(at..disk.size())? {
                at = extent.end();
                stored += if extent.is_data() { extent.len } else { 0 };
            }
        }
        text += &format!("{}: {} bytes, {stored} of them stored\n", disk.name(), disk.size());
    }
    Ok(text)
}

/// Reads at most `len` bytes of a disk, starting at `guest_offset`.
fn read(archive: &Path, disk: &str, guest_offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut reader = open(archive)?.disk(disk)?.reader();
    let mut bytes = Vec::new();
    reader
        .seek(SeekFrom::Start(guest_offset))
        .and_then(|_| reader.take(len).read_to_end(&mut bytes))
        .map_err(|e| Error::io("read", e).path(archive).device(disk))?;
    Ok(bytes)
}

fn run(args: &[String]) -> Result<Vec<u8>> {
    let number =
        |text: &String| text.parse().map_err(|_| Error::usage(format!("'{text}' is not a number of bytes")));
    match args {
        [archive] => list(Path::new(archive)).map(String::into_bytes),
        [archive, disk, offset, len] => read(Path::new(archive), disk, number(offset)?, number(len)?),
        _ => Err(Error::usage("usage: read_vma ARCHIVE [DISK OFFSET LENGTH]")),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let written =
        run(&args).and_then(|bytes| std::io::stdout().write_all(&bytes).map_err(|e| Error::io("write", e)));
    if let Err(error) = written {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool_testing::{fixture, sha256};

    #[test]
    fn lists_stored_bytes() {
        let text = list(&fixture("sparse.vma")).expect("an archive");
        assert_eq!(text, "drive-virtio0: 536871424 bytes, 4608 of them stored\n");
    }

    #[test]
    fn reads_whole_and_partial_disks() {
        let archive = fixture("two-disks.vma.zst");
        let whole = read(&archive, "drive-efidisk0", 0, u64::MAX).expect("the whole disk");
        assert_eq!(sha256(&whole), "a0fd2cf34e841d0d1e7f30367fc2b547c952d35ae30d9003b2890c10b61d82c9");
        for (offset, len) in [(0, 1), (65_535, 2), (300_001, 70_000), (540_671, 10), (540_672, 10)] {
            let part = read(&archive, "drive-efidisk0", offset, len).expect("a part");
            let end = whole.len().min((offset + len) as usize);
            assert!(part == whole[offset as usize..end], "{len} bytes at {offset}");
        }
    }

    #[test]
    fn missing_disk_is_named_in_the_error() {
        let error = read(&fixture("sparse.vma"), "drive-scsi7", 0, 1).expect_err("no such disk");
        assert!(error.to_string().contains("drive-scsi7"), "{error}");
        assert_eq!(error.hint_text().as_deref(), Some("devices: drive-virtio0"));
    }
}
