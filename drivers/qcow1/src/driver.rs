//! The driver for QCOW images of version 1: its capabilities.

use std::sync::Arc;

use imgtool_core::{Capabilities, CheckReport, Confidence, Driver, ImageSource, Input, OpenOptions, Result};

use crate::layout::{SECTOR_SIZE, is_qcow1};
use crate::{check, image};

/// Read-only driver for QCOW images of version 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qcow1Driver;

impl Driver for Qcow1Driver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["qcow1"]
    }

    fn description(&self) -> &'static str {
        "QEMU copy-on-write, version 1"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["qcow1"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, size_multiple: SECTOR_SIZE, check: true, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        is_qcow1(head).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        image::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, &options.memory)
    }
}
