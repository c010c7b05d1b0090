//! The [`Driver`] implementation.

use std::sync::Arc;

use imgtool_core::{
    Archive, Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource,
    ImageWriter, Input, Manifest, Measure, OpenOptions, OptionSpec, OutputFactory, Result,
};

use crate::layout::{MAGIC, MAX_DEV_ID};
use crate::options::{OPTIONS, VmaOptions};
use crate::plan::{ArchivePlan, SECTOR};
use crate::sink::VmaSink;
use crate::source::VmaSource;
use crate::{check, measure};

/// Driver for backup archives of Proxmox VE.
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
            archive: Some(Archive { max_devices: u32::from(MAX_DEV_ID), attachments: true }),
            size_multiple: SECTOR,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(&MAGIC).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        Ok(Arc::new(VmaSource::open(input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(VmaWriter { options: VmaOptions::parse(options)? }))
    }
}

/// Writer of archives, with its parsed options.
struct VmaWriter {
    options: VmaOptions,
}

impl ImageWriter for VmaWriter {
    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        measure::measure(source, &self.options)
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let plan = ArchivePlan::new(manifest, &self.options)?;
        Ok(Box::new(VmaSink::new(outputs.main()?, plan, self.options.zero_unit)))
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
