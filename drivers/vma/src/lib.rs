#![doc = include_str!("../README.md")]
//!
//! # Map of the crate
//! [`layout`] and [`extent`] are the format on disk, [`header`] what stands before the first extent.
//! Reading: `walker` and `tracker` check, `index` and `masks` serve files, `stream` serves pipes,
//! `salvage` damaged archives. Writing: `plan` makes the header, `sink` the extents.

mod bytes;
mod check;
pub mod extent;
mod facts;
pub mod header;
mod index;
pub mod layout;
mod masks;
mod measure;
mod options;
mod plan;
mod probe;
pub mod reference;
mod salvage;
mod scan;
mod sink;
mod source;
mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tracker;
mod walker;

pub use header::ArchiveHeader;
pub use source::VmaSource;

use imgtool_toolkit::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest,
    Measure, OpenOptions, OptionSpec, Output, Registry, Result,
};

/// The driver.
#[derive(Debug, Clone, Copy, Default)]
pub struct VmaDriver;

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VmaDriver);
}

impl Driver for VmaDriver {
    fn name(&self) -> &'static str {
        "vma"
    }

    fn description(&self) -> &'static str {
        "Proxmox VE backup archive: the disks of a virtual machine, its configurations and its state"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vma"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            max_devices: u32::from(layout::MAX_DEV_ID),
            attachments: true,
            compression: false,
            open_ended: false,
            size_multiple: plan::SECTOR,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
    }

    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        options.check_names(self.name(), self.options())?;
        options::VmaOptions::parse(options).map(drop)
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        probe::probe(head)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        Ok(Box::new(VmaSource::open(input, options)?))
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        Ok(Box::new(sink::VmaSink::create(output, manifest, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        measure::measure(source, options)
    }
}
