//! Options, inputs and images shared by the tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{CheckReport, CreateOptions, Disk, Driver, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_vhd::VhdDriver;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Returns creation options from valid pairs.
pub fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse("vhd", VhdDriver.options(), pairs.iter().copied()).unwrap()
}

/// Opens an image file, and allows the files of its directory.
pub fn open(path: &Path) -> Result<Arc<dyn ImageSource>> {
    let mut registry = Registry::new();
    imgtool_vhd::register(&mut registry);
    let policy = ExternalPolicy { chain: true, paths: Vec::new() };
    let externals = PolicyOpener::new(registry, policy).externals();
    VhdDriver.open(conformance::input(path)?, &OpenOptions { externals, ..OpenOptions::default() })
}

/// Checks an image file.
pub fn check(path: &Path) -> CheckReport {
    VhdDriver.check(conformance::input(path).unwrap(), &OpenOptions::default()).unwrap()
}

/// Returns the content of a small image.
pub fn content(source: &Arc<dyn ImageSource>) -> Result<Vec<u8>> {
    let disk = Disk::only(Arc::clone(source), "the image")?;
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Writes bytes to a file of the directory and returns its path.
pub fn save(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Makes an image file from an image in memory.
pub fn make(image: &Image, pairs: &[(&str, &str)], directory: &Path) -> PathBuf {
    let path = directory.join("ours.vhd");
    let _ = std::fs::remove_file(&path);
    conformance::write(&VhdDriver, &options(pairs), image, &conformance::new_file(&path), 2).unwrap();
    path
}

/// Returns an image with mixed content that reaches past 4 GiB, and with a ragged size.
pub fn beyond_four_gib() -> Image {
    let content = Content::zero()
        .with(0..300_000, Fill::Random)
        .with(5 * MIB + 512..5 * MIB + 1024, Fill::Byte(9))
        .with(4 * GIB - 70_000..4 * GIB + 70_000, Fill::Random)
        .with(4 * GIB + 99 * MIB..4 * GIB + 100 * MIB, Fill::Random);
    Image::disk("beyond 4 GiB", 4 * GIB + 100 * MIB + 512, content)
}

/// Returns a disk of 20 MiB.
pub fn small() -> Image {
    let content = Content::zero()
        .with(0..1000, Fill::Random)
        .with(MIB..3 * MIB, Fill::Checker(65_536))
        .with(20 * MIB - 512..20 * MIB, Fill::Byte(1));
    Image::disk("20 MiB", 20 * MIB, content)
}
