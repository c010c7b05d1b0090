//! The driver: the format as the registry sees it.

use imgtool_toolkit::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest,
    Measure, OpenOptions, OptionSpec, Output, Result,
};

use crate::layout::header::FILE_SIGNATURE;
use crate::options::{DEFAULT_LOGICAL_SECTOR_SIZE, OPTIONS, VhdxOptions};
use crate::{check, measure, sink, source};

/// Microsoft's VHDX format.
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
            stream_read: false,
            stream_write: false,
            max_devices: 1,
            attachments: false,
            compression: false,
            open_ended: false,
            size_multiple: DEFAULT_LOGICAL_SECTOR_SIZE,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        VhdxOptions::parse(options).map(drop)
    }

    /// Recognises the signature of the file type identifier (section 2.2.1).
    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(FILE_SIGNATURE).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        source::open(input, options)
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        sink::create(output, manifest, options)
    }

    fn check(&self, input: Input, _options: &OpenOptions) -> Result<CheckReport> {
        check::check(input)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        measure::measure(source, options)
    }
}
