//! The driver for VMDK images: its capabilities and options.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, Input,
    OpenOptions, OptionSpec, Result,
};

use crate::descriptor::Descriptor;
use crate::layout::{SECTOR_SIZE, cowd, hosted, sesparse};
use crate::options::OPTIONS;
use crate::sink::VmdkWriter;
use crate::{check, source, stream};

/// Driver for VMware's VMDK format.
#[derive(Debug, Clone, Copy, Default)]
pub struct VmdkDriver;

impl Driver for VmdkDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "VMDK, the disk image of VMware and of OVA archives"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vmdk"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            compression: true,
            size_multiple: SECTOR_SIZE,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        let magics: [&[u8]; 3] = [hosted::MAGIC, cowd::MAGIC, &sesparse::MAGIC];
        let is_ours = magics.iter().any(|magic| head.starts_with(magic)) || Descriptor::probe(head);
        is_ours.then_some(Confidence::Magic)
    }

    /// A compressed image with markers has its grains in order. All others need their tables.
    fn reads_stream(&self, head: &[u8]) -> bool {
        stream::layout(head).is_some()
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        if input.is_stream()
            && let Some(layout) = stream::layout(&input.head()?)
        {
            return stream::open(input, layout, options);
        }
        source::open(input, options)
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(VmdkWriter::new(options)?))
    }
}
