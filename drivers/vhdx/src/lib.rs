//! imgtool driver: Microsoft's VHDX format, after the public specification MS-VHDX.
//!
//! Reads fixed, dynamic and differencing disks at random and in parallel. A log that must be replayed
//! is replayed in memory; the file is opened read-only and stays as it is. Writes dynamic and fixed
//! disks, whose bytes depend on the content and the options alone.
//!
//! A block of the guest is called a *payload block* here, as in the specification; a *sector-bitmap
//! block* tells which sectors of payload blocks a differencing file holds.

mod bat_writer;
mod check;
mod file;
mod fingerprint;
mod image;
mod layout;
mod log;
mod measure;
mod options;
mod parent;
mod probe;
mod sink;
mod source;

use imgtool_toolkit::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest,
    Measure, OpenOptions, OptionSpec, Output, Registry, Result,
};

/// The driver.
#[derive(Debug, Clone, Copy, Default)]
pub struct VhdxDriver;

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VhdxDriver);
}

impl Driver for VhdxDriver {
    fn name(&self) -> &'static str {
        "vhdx"
    }

    fn description(&self) -> &'static str {
        "VHDX, the disk image of Hyper-V"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vhdx", "avhdx"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: false,
            stream_write: false,
            max_devices: 1,
            attachments: false,
            compression: false,
            open_ended: false,
            size_multiple: options::DEFAULT_LOGICAL_SECTOR_SIZE,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
    }

    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        options::VhdxOptions::parse(options).map(drop)
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        probe::probe(head)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        source::open(input, options)
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        sink::create(output, manifest, options)
    }

    fn check(&self, input: Input, _options: &OpenOptions) -> Result<CheckReport> {
        check::check(input)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        measure::measure(source, options)
    }
}
