//! Inputs, options and comparisons shared by the tests.

pub mod builder;

use std::path::Path;
use std::sync::Arc;

use imgtool_core::{CheckReport, CreateOptions, Disk, Driver, ImageSource, Input, OpenOptions, Result};
use imgtool_testing::conformance;
use imgtool_testing::memory;
use imgtool_vhdx::VhdxDriver;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// Returns creation options from valid pairs.
pub fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse("vhdx", VhdxDriver.options(), pairs.iter().copied()).unwrap()
}

/// Returns an input over bytes.
pub fn input(bytes: &[u8]) -> Input {
    memory::as_file("memory.vhdx", bytes)
}

/// Opens an image in memory.
pub fn open_bytes(bytes: &[u8]) -> Result<Arc<dyn ImageSource>> {
    VhdxDriver.open(input(bytes), &OpenOptions::default())
}

/// Opens an image file.
pub fn open_file(path: &Path) -> Result<Arc<dyn ImageSource>> {
    conformance::open(&VhdxDriver, path)
}

/// Checks an image file.
pub fn check_file(path: &Path) -> CheckReport {
    VhdxDriver.check(conformance::input(path).unwrap(), &OpenOptions::default()).unwrap()
}

/// Returns the disk of an image.
pub fn disk_of(source: &Arc<dyn ImageSource>) -> Disk {
    Disk::only(Arc::clone(source), "the image").unwrap()
}

/// Reads all content of a small disk, and checks that its extents and partial reads agree with it.
pub fn content(source: &Arc<dyn ImageSource>) -> Result<Vec<u8>> {
    let disk = disk_of(source);
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0)?;
    let mut at = 0;
    while at < disk.size() {
        for extent in disk.extents(at..disk.size())? {
            assert_eq!(extent.start, at);
            at = extent.end();
            let part = &bytes[extent.start as usize..at as usize];
            assert!(extent.is_data() || part.iter().all(|byte| *byte == 0), "{extent:?} is not zero");
        }
    }
    // Unaligned reads return the same bytes.
    for (start, len) in [(1, 511), (511, 2), (4095, 70_001), (MIB - 3, 7), (3 * MIB - 1, MIB)] {
        let end = (start + len).min(disk.size());
        if start < end {
            let mut part = vec![0xee; (end - start) as usize];
            disk.read_at(&mut part, start)?;
            assert!(part == bytes[start as usize..end as usize], "read of {start}..{end}");
        }
    }
    Ok(bytes)
}
