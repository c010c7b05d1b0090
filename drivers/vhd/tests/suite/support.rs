//! The helpers of the toolkit's tests, for this driver.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{CheckReport, CreateOptions, ImageSource, Result};
use imgtool_testing::conformance::Image;
use imgtool_testing::saved;
use imgtool_vhd::VhdDriver;

pub use imgtool_testing::crafted::content;
pub use imgtool_testing::saved::{beyond_four_gib, save, small};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Returns creation options from valid pairs.
pub fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    saved::options(&VhdDriver, pairs)
}

/// Opens an image file, and allows the files of its directory.
pub fn open(path: &Path) -> Result<Arc<dyn ImageSource>> {
    saved::open_chain(VhdDriver, path)
}

/// Checks an image file.
pub fn check(path: &Path) -> CheckReport {
    saved::check(&VhdDriver, path)
}

/// Makes an image file from an image in memory.
pub fn make(image: &Image, pairs: &[(&str, &str)], directory: &Path) -> PathBuf {
    saved::make(&VhdDriver, image, pairs, directory)
}
