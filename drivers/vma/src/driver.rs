//! The [`Driver`] implementation: what the registry knows of the format.

use imgtool_toolkit::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest,
    Measure, OpenOptions, OptionSpec, Output, Result,
};

use crate::layout::{MAGIC, MAX_DEV_ID};
use crate::options::{OPTIONS, VmaOptions};
use crate::plan::SECTOR;
use crate::sink::VmaSink;
use crate::source::VmaSource;
use crate::{check, measure};

/// Driver for Proxmox VE's backup archives.
#[derive(Debug, Clone, Copy, Default)]
pub struct VmaDriver;

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
            max_devices: u32::from(MAX_DEV_ID),
            attachments: true,
            compression: false,
            open_ended: false,
            size_multiple: SECTOR,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        options.check_names(self.name(), self.options())?;
        VmaOptions::parse(options).map(drop)
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(&MAGIC).then_some(Confidence::Magic)
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
        Ok(Box::new(VmaSink::create(output, manifest, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        measure::measure(source, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_matches_only_the_magic_number() {
        assert_eq!(VmaDriver.probe(b"VMA\0\0\0\0\x01", None), Some(Confidence::Magic));
        for other in [&b"VMA"[..], b"VMAE\0\0", b"QFI\xfb", b""] {
            assert_eq!(VmaDriver.probe(other, None), None);
        }
    }
}
