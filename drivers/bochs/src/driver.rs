//! The driver for Bochs images: its capabilities.

use std::sync::Arc;

use imgtool_core::{Capabilities, CheckReport, Confidence, Driver, ImageSource, Input, OpenOptions, Result};

use crate::layout::{SECTOR_SIZE, is_bochs};
use crate::{check, image};

/// Read-only driver for the growing images of Bochs.
#[derive(Debug, Clone, Copy, Default)]
pub struct BochsDriver;

impl Driver for BochsDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "Bochs growing disk image"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["bochs"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, size_multiple: SECTOR_SIZE, check: true, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        is_bochs(head).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        image::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, &options.memory)
    }
}
