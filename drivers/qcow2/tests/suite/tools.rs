//! Options, the registry and conversions for the tests of this driver.

use std::path::{Path, PathBuf};

use imgtool_core::{
    Compress, CreateOptions, Disk, Driver, Manifest, OpenOptions, Output, OutputFactory, Registry, Result,
};
use imgtool_engine::{ExternalPolicy, PolicyOpener};
use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_testing::conformance::{self as laws, Image};

/// Parses creation options `a=b,c=d`; a part `compress` turns on compression.
pub fn options(text: &str) -> CreateOptions {
    let parts = text.split(',').filter(|part| !part.is_empty());
    let pairs = parts.clone().filter_map(|part| part.split_once('='));
    let options = CreateOptions::parse("qcow2", Qcow2Driver.options(), pairs).unwrap();
    let compress = parts.clone().any(|part| part == "compress").then(Compress::default);
    CreateOptions { compress, ..options }
}

/// Returns a registry with the drivers qcow2 and raw.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    imgtool_qcow2::register(&mut registry);
    imgtool_raw::register(&mut registry);
    registry
}

/// Returns options that allow external files in the image's own directory.
pub fn open_options() -> OpenOptions {
    let policy = ExternalPolicy { chain: true, ..ExternalPolicy::default() };
    OpenOptions { externals: PolicyOpener::new(registry(), policy).externals(), ..OpenOptions::default() }
}

/// Outputs that replace the files of an earlier image.
pub struct Replacing<'a>(pub &'a Path);

impl OutputFactory for Replacing<'_> {
    fn main(&mut self) -> Result<Output> {
        let _ = std::fs::remove_file(self.0);
        Ok(laws::new_file(self.0))
    }

    fn beside(&mut self, name: &str) -> Result<Output> {
        Replacing(&self.0.with_file_name(name)).main()
    }
}

/// Writes `image` to `path`. If `base` is given, the sink omits data that equals this raw image.
pub fn write(image: &Image, options: &CreateOptions, base: Option<&Path>, path: &Path) {
    let base = base.map(|base| Disk::only(laws::open(&RawDriver, base).unwrap(), "the base").unwrap());
    let manifest = Manifest { base, ..image.manifest() };
    let sink = Qcow2Driver.writer(options).unwrap().create(&mut Replacing(path), &manifest).unwrap();
    laws::fill_sink(&laws::MemorySource::new(image), &*sink, 3).unwrap();
}

/// Converts with the pipeline, and returns the path of the result.
pub fn convert(
    from: (&dyn Driver, &Path, &OpenOptions),
    to: (&dyn Driver, &Path, &CreateOptions),
    threads: usize,
) -> Result<PathBuf> {
    let source = laws::open_with(from.0, from.1, from.2)?;
    let manifest = Manifest { devices: source.info().devices.clone(), ..Manifest::default() };
    let sink = to.0.writer(to.2)?.create(&mut Replacing(to.1), &manifest)?;
    laws::fill_sink(&*source, &*sink, threads)?;
    Ok(to.1.to_owned())
}
