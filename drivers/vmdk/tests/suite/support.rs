//! Options, inputs and images shared by the tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{CheckReport, CreateOptions, Disk, Driver, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_vmdk::VmdkDriver;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Names of the variants that the driver writes.
pub const SUBFORMATS: [&str; 6] = [
    "streamOptimized",
    "monolithicSparse",
    "monolithicFlat",
    "vmfs",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
];

/// Names of the variants that consist of several files.
pub const SEVERAL: [&str; 4] = ["monolithicFlat", "vmfs", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

/// Returns creation options from valid pairs.
pub fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse("vmdk", VmdkDriver.options(), pairs.iter().copied()).unwrap()
}

/// Returns options for opening. With `chain`, an image may name files of its directory; without it, only its
/// own extents.
pub fn open_options(chain: bool) -> OpenOptions {
    let mut registry = Registry::new();
    imgtool_vmdk::register(&mut registry);
    let policy = ExternalPolicy { chain, ..ExternalPolicy::default() };
    let externals = PolicyOpener::new(registry, policy).externals();
    OpenOptions { externals, ..OpenOptions::default() }
}

/// Opens an image file, and allows the files of its directory.
pub fn open(path: &Path) -> Result<Arc<dyn ImageSource>> {
    VmdkDriver.open(conformance::input(path)?, &open_options(true))
}

/// Opens an image file as a user does who allows nothing.
pub fn open_plainly(path: &Path) -> Result<Arc<dyn ImageSource>> {
    VmdkDriver.open(conformance::input(path)?, &open_options(false))
}

/// Checks an image file.
pub fn check(path: &Path) -> CheckReport {
    VmdkDriver.check(conformance::input(path).unwrap(), &open_options(false)).unwrap()
}

/// Asserts that a check finds nothing.
#[track_caller]
pub fn assert_clean(path: &Path) {
    let report = check(path);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{}: {:?}", path.display(), report.findings);
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

/// Makes an image file from an image in memory, in a directory of its own.
pub fn make(image: &Image, pairs: &[(&str, &str)], directory: &Path) -> PathBuf {
    let directory = directory.join(format!("ours{}", std::fs::read_dir(directory).unwrap().count()));
    std::fs::create_dir(&directory).unwrap();
    // libvmdk opens the file that a single file names.
    let path = directory.join("any name.vmdk");
    let mut outputs = conformance::FileOutputs::new(&path);
    conformance::write_to(&VmdkDriver, &options(pairs), image, &mut outputs, 2).unwrap();
    path
}

/// Returns an image with mixed content that reaches past 4 GiB, and with a ragged size.
pub fn beyond_four_gib() -> Image {
    let content = Content::zero()
        .with(0..300_000, Fill::Random)
        .with(5 * MIB + 512..5 * MIB + 1024, Fill::Byte(9))
        .with(2047 * MIB - 70_000..2047 * MIB + 70_000, Fill::Text)
        .with(4 * GIB - 70_000..4 * GIB + 70_000, Fill::Random)
        .with(4 * GIB + 99 * MIB..4 * GIB + 100 * MIB, Fill::Random);
    Image::disk("beyond 4 GiB", 4 * GIB + 100 * MIB + 512, content)
}

/// Returns a disk of 20 MiB.
pub fn small() -> Image {
    let content = Content::zero()
        .with(0..1000, Fill::Random)
        .with(MIB..3 * MIB, Fill::Checker(65_536))
        .with(7 * MIB..8 * MIB, Fill::Text)
        .with(20 * MIB - 512..20 * MIB, Fill::Byte(1));
    Image::disk("20 MiB", 20 * MIB, content)
}
