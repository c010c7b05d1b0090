//! The driver for VHDX images: its capabilities and options.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, InPlace, Input,
    OpenOptions, OptionSpec, Output, Repair, Result,
};

use crate::layout::header::FILE_SIGNATURE;
use crate::options::{DEFAULT_LOGICAL_SECTOR_SIZE, OPTIONS};
use crate::writer::VhdxWriter;
use crate::{check, repair, source};

/// Driver for Microsoft's VHDX format.
#[derive(Debug, Clone, Copy, Default)]
pub struct VhdxDriver;

impl Driver for VhdxDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
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
            in_place: InPlace::BlockDevices,
            updates: true,
            size_multiple: DEFAULT_LOGICAL_SECTOR_SIZE,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Recognises the signature of the file type identifier (section 2.2.1).
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(FILE_SIGNATURE).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        source::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check_with_parent(input, options)
    }

    fn repair(&self, image: &Output, what: Repair, options: &OpenOptions) -> Result<CheckReport> {
        repair::repair(image, what, &options.memory)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(VhdxWriter::new(options)?))
    }
}
