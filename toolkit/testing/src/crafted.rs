//! Images in memory, built byte by byte or by another program.

use std::sync::Arc;

use imgtool_core::{CheckReport, Disk, Driver, Error, ImageSource, OpenOptions, Result};

use crate::{memory, oracles, tempdir};

/// Opens an image in memory.
///
/// # Errors
/// Any error of the driver.
pub fn open(driver: &dyn Driver, bytes: &[u8]) -> Result<Arc<dyn ImageSource>> {
    driver.open(memory::as_file("image", bytes), &OpenOptions::default())
}

/// Returns the content of the only disk of a small image.
///
/// # Errors
/// Any error of reading the disk.
pub fn content(source: &Arc<dyn ImageSource>) -> Result<Vec<u8>> {
    let disk = Disk::only(Arc::clone(source), "the image")?;
    let mut bytes = vec![0xee; usize::try_from(disk.size()).expect("a small disk")];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Opens an image in memory and returns the content of its only disk.
///
/// # Errors
/// Any error of opening the image or reading the disk.
pub fn read(driver: &dyn Driver, bytes: &[u8]) -> Result<Vec<u8>> {
    content(&open(driver, bytes)?)
}

/// Returns the content of the only disk of a damaged image as salvage restores it, and start and end of
/// each lost guest range.
pub fn salvage(driver: &dyn Driver, bytes: &[u8]) -> (Vec<u8>, Vec<(u64, u64)>) {
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = driver.open(memory::as_file("image", bytes), &options).unwrap();
    let restored = content(&source).unwrap();
    (restored, source.losses().into_iter().map(|loss| (loss.guest.start, loss.guest.end)).collect())
}

/// Returns the error for an image that can't be opened or read.
#[track_caller]
pub fn refusal(driver: &dyn Driver, bytes: &[u8]) -> Error {
    read(driver, bytes).map(|_| ()).expect_err("the image is refused")
}

/// Asserts that `driver` refuses `image` with each of the numbers: file offset, bytes, and a part of the
/// message.
#[track_caller]
pub fn expect_refusals(driver: &dyn Driver, image: &[u8], numbers: &[(usize, &[u8], &str)]) {
    assert!(read(driver, image).is_ok(), "the image is sound");
    for (at, value, text) in numbers {
        let mut damaged = image.to_vec();
        damaged[*at..*at + value.len()].copy_from_slice(value);
        let message = format!("{:#}", refusal(driver, &damaged));
        assert!(message.contains(text), "bytes {at} = {value:02x?}: {message}");
    }
}

/// Checks an image in memory.
pub fn check(driver: &dyn Driver, bytes: &[u8]) -> CheckReport {
    driver.check(memory::as_file("image", bytes), &OpenOptions::default()).unwrap()
}

/// Returns the number of corruptions and leaks that a check finds.
pub fn faults(driver: &dyn Driver, bytes: &[u8]) -> (u64, u64) {
    let report = check(driver, bytes);
    println!("{:?}", report.findings);
    (report.corruptions, report.leaks)
}

/// Returns an image of `disk` that qemu-img makes. For `options` see [`oracles::qemu_make`].
#[track_caller]
pub fn qemu_image(disk: &[u8], format: &str, options: &str) -> Vec<u8> {
    let directory = tempdir();
    let (raw, image) = (directory.path().join("raw"), directory.path().join("image"));
    std::fs::write(&raw, disk).unwrap();
    oracles::qemu_make(&raw, format, options, &image);
    std::fs::read(image).unwrap()
}

/// Returns the content of an image in memory as qemu-img reads it.
#[track_caller]
pub fn qemu_content(image: &[u8], format: &str) -> Vec<u8> {
    let directory = tempdir();
    let (raw, path) = (directory.path().join("raw"), directory.path().join("image"));
    std::fs::write(&path, image).unwrap();
    oracles::qemu_img(&["convert", "-f", format, "-O", "raw", crate::text(&path), crate::text(&raw)]);
    std::fs::read(raw).unwrap()
}

/// Returns a disk of `len` bytes with noise, text and zeros.
pub fn mixed_disk(len: usize) -> Vec<u8> {
    let mut disk = vec![0; len];
    let quarter = len / 4;
    disk[..quarter].copy_from_slice(&crate::images::noise(1, quarter));
    disk[2 * quarter..3 * quarter].copy_from_slice(&crate::images::prose(2, quarter));
    disk[len - 512..].copy_from_slice(&crate::images::noise(3, 512));
    disk
}
