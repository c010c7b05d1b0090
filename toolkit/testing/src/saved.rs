//! Images in files: written, opened with the files beside them, and checked.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{CheckReport, CreateOptions, Driver, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};

use crate::conformance::{self, Content, Fill, Image};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Returns creation options from valid pairs.
pub fn options(driver: &dyn Driver, pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse(driver.name(), driver.options(), pairs.iter().copied()).unwrap()
}

/// Returns options for opening images of one driver. With `chain`, an image may name the files of its directory;
/// without it, only its own parts.
pub fn open_options(driver: impl Driver + 'static, chain: bool) -> OpenOptions {
    let mut registry = Registry::new();
    registry.register(driver);
    let policy = ExternalPolicy { chain, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(registry, policy).externals();
    OpenOptions { externals, ..OpenOptions::default() }
}

/// Opens an image file, and allows the files of its directory.
///
/// # Errors
/// Any error of the driver.
pub fn open_chain(driver: impl Driver + Copy + 'static, path: &Path) -> Result<Arc<dyn ImageSource>> {
    conformance::open_with(&driver, path, &open_options(driver, true))
}

/// Checks an image file.
pub fn check(driver: &dyn Driver, path: &Path) -> CheckReport {
    driver.check(conformance::input(path).unwrap(), &OpenOptions::default()).unwrap()
}

/// Writes bytes to a file of the directory and returns its path.
pub fn save(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Makes an image file from an image in memory, in place of the previous one of the directory.
pub fn make(driver: &dyn Driver, image: &Image, pairs: &[(&str, &str)], directory: &Path) -> PathBuf {
    let path = directory.join(format!("ours.{}", driver.name()));
    let _ = std::fs::remove_file(&path);
    let output = conformance::new_file(&path);
    conformance::write(driver, &options(driver, pairs), image, &output, 2).unwrap();
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
