//! The driver for DMG images: its capabilities.

use std::sync::Arc;

use imgtool_core::{Capabilities, CheckReport, Confidence, Driver, ImageSource, Input, OpenOptions, Result};

use crate::layout::{SECTOR_SIZE, is_encrypted, is_trailer};
use crate::{check, image};

/// Read-only driver for the disk images of macOS.
#[derive(Debug, Clone, Copy, Default)]
pub struct DmgDriver;

impl Driver for DmgDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "DMG, the disk image of macOS (UDIF)"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["dmg"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, size_multiple: SECTOR_SIZE, check: true, ..Capabilities::default() }
    }

    /// Recognises encrypted images alone, which `open` refuses by name. Others begin with their content.
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        is_encrypted(head).then_some(Confidence::Magic)
    }

    /// Recognises the trailer. An image without it is a raw disk (`UDRW`), or cut short.
    fn probe_end(&self, end: Option<&[u8]>) -> bool {
        end.is_none_or(is_trailer)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        image::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, &options.memory)
    }
}
