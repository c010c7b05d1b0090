//! The driver for VHD images: its capabilities and options.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, Input,
    OpenOptions, OptionSpec, Result,
};

use crate::layout::SECTOR_SIZE;
use crate::layout::footer::COOKIE;
use crate::options::OPTIONS;
use crate::sink::VhdWriter;
use crate::{check, source, stream};

/// Driver for Microsoft's VHD format.
#[derive(Debug, Clone, Copy, Default)]
pub struct VhdDriver;

impl Driver for VhdDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    /// The name in QEMU.
    fn aliases(&self) -> &'static [&'static str] {
        &["vpc"]
    }

    fn description(&self) -> &'static str {
        "VHD, the disk image of Virtual PC, Hyper-V and Azure"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vhd", "vpc", "avhd"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            sized_by_end: true,
            size_multiple: SECTOR_SIZE,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Recognises the copy of the footer at the start of a dynamic or differencing image.
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(COOKIE).then_some(Confidence::Magic)
    }

    /// Recognises the footer of a fixed image. The end of a stream is checked once it has been read.
    fn probe_end(&self, end: Option<&[u8]>) -> bool {
        // Virtual PC before 2004 omitted the last byte.
        end.is_none_or(|end| {
            end.starts_with(COOKIE) || end.get(1..).is_some_and(|end| end.starts_with(COOKIE))
        })
    }

    /// A fixed image can be read in one pass. The blocks of the others are in any order.
    fn reads_stream(&self, head: &[u8]) -> bool {
        !head.starts_with(COOKIE)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        if input.is_stream() && self.reads_stream(&input.head()?) {
            return stream::open(input, options);
        }
        source::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(VhdWriter::new(options)?))
    }
}
