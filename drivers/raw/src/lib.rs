//! imgtool driver: raw disk images and block devices.
//!
//! A raw image is the guest's bytes and nothing else. Holes are found with SEEK_DATA and SEEK_HOLE
//! and made by not writing; sizes are any number of bytes. Standard input and output are streams:
//! their size is known when they end.

mod sink;
mod source;

use imgtool_toolkit::{
    Capabilities, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest, Measure,
    OpenOptions, OptionSpec, Output, Registry, Result,
};

/// The driver.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawDriver;

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(RawDriver);
}

const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "preallocation",
    help: "whether space is set aside: not at all, by the file system, or by writing zeros",
    default: "off",
    values: "off|falloc|full",
}];

impl Driver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn description(&self) -> &'static str {
        "raw disk image or block device: the guest's bytes and nothing else"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["raw", "img"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            max_devices: 1,
            attachments: false,
            compression: false,
            open_ended: true,
            size_multiple: 1,
            check: false,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Anything is a raw image, if it is nothing else.
    fn probe(&self, _head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        Some(Confidence::Fallback)
    }

    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        source::open(input)
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        sink::create(output, manifest, options)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        let measured = source::measure(source)?;
        let all = options.get("preallocation").is_some_and(|value| value != "off")
            || options.sparse_granularity == Some(0);
        Ok(Measure { occupied: if all { measured.fully_allocated } else { measured.occupied }, ..measured })
    }
}
