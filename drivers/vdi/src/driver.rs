//! The driver for VDI images: its capabilities and options.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, InPlace, Input,
    OpenOptions, OptionSpec, Result,
};

use crate::layout::{SECTOR_SIZE, SIGNATURE, SIGNATURE_AT};
use crate::options::OPTIONS;
use crate::sink::VdiWriter;
use crate::{check, source};

/// Driver for VirtualBox's VDI format.
#[derive(Debug, Clone, Copy, Default)]
pub struct VdiDriver;

impl Driver for VdiDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "VDI, the disk image of VirtualBox"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vdi"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            in_place: InPlace::BlockDevices,
            size_multiple: SECTOR_SIZE,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Recognises the signature, which follows 64 bytes of text.
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        let signature = head.get(SIGNATURE_AT..).and_then(|rest| rest.first_chunk())?;
        (u32::from_le_bytes(*signature) == SIGNATURE).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        source::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(VdiWriter::new(options)?))
    }
}
