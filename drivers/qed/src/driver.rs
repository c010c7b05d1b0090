//! The driver for QED images: its capabilities.

use std::sync::Arc;

use imgtool_core::{Capabilities, CheckReport, Confidence, Driver, ImageSource, Input, OpenOptions, Result};

use crate::layout::{SECTOR_SIZE, is_qed};
use crate::{check, image};

/// Read-only driver for QED images.
#[derive(Debug, Clone, Copy, Default)]
pub struct QedDriver;

impl Driver for QedDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "QEMU enhanced disk"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["qed"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, size_multiple: SECTOR_SIZE, check: true, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        is_qed(head).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        image::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, &options.memory)
    }
}
