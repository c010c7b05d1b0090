//! The driver for LUKS containers: its capabilities and options.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, Input,
    OpenOptions, OptionSpec, Result,
};
use imgtool_crypt::{MAGIC, SECTOR};

use crate::check;
use crate::options::OPTIONS;
use crate::sink::LuksWriter;
use crate::source::LuksSource;

/// Driver for LUKS version 1 containers.
#[derive(Debug, Clone, Copy, Default)]
pub struct LuksDriver;

impl Driver for LuksDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "LUKS version 1 container: an encrypted raw disk"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["luks"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_write: true,
            open_ended: true,
            size_multiple: SECTOR as u64,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Recognises every version: `open` refuses the unknown ones by name, and none is read as a raw disk.
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(&MAGIC).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        Ok(Arc::new(LuksSource::open(input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(LuksWriter::new(options)?))
    }
}
