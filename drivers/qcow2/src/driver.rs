//! The driver that the registry holds.

use imgtool_toolkit::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource, Input, Manifest,
    Measure, OpenOptions, OptionSpec, Output, Result,
};

use crate::compressed::Encoder;
use crate::layout::FORMAT;
use crate::layout::header::MAGIC;
use crate::options::{OPTIONS, SIZE_MULTIPLE, WriteOptions};
use crate::sink::Qcow2Sink;
use crate::source::Qcow2Source;
use crate::{check, measure};

/// Driver of QEMU's qcow2 format.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qcow2Driver;

impl Driver for Qcow2Driver {
    fn name(&self) -> &'static str {
        FORMAT
    }

    fn description(&self) -> &'static str {
        "QEMU copy-on-write, versions 2 and 3"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["qcow2", "qcow"]
    }

    fn reads_snapshots(&self) -> bool {
        true
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: false,
            stream_write: false,
            max_devices: 1,
            attachments: false,
            compression: true,
            open_ended: true,
            size_multiple: SIZE_MULTIPLE,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        let parsed = WriteOptions::parse(options)?;
        parsed.compress.map_or(Ok(()), |level| Encoder::new(parsed.compression, level).map(drop))
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        // Opening refuses unknown versions by number.
        head.starts_with(&MAGIC).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        Ok(Box::new(Qcow2Source::open(input, options)?))
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        Ok(Box::new(Qcow2Sink::create(output, manifest, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        measure::measure(source, options)
    }
}
