//! The driver: the format as the registry sees it.

use imgtool_toolkit::source::data_bytes;
use imgtool_toolkit::{
    Capabilities, Confidence, CreateOptions, Driver, Error, ImageSink, ImageSource, Input, Manifest, Measure,
    OpenOptions, OptionSpec, Output, Result,
};

use crate::{sink, source};

/// Raw disk images and block devices.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawDriver;

/// The `-o` options; `sink::create` parses them.
const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "preallocation",
    help: "space allocated ahead: off, by the file system (falloc), by writing zeros (full)",
    default: "off",
    values: "off|falloc|full",
}];

impl Driver for RawDriver {
    fn name(&self) -> &'static str {
        crate::FORMAT
    }

    fn description(&self) -> &'static str {
        "raw disk image or block device: the guest's bytes and nothing else"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["raw", "img"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            max_devices: 1,
            attachments: false,
            compression: false,
            open_ended: true,
            size_multiple: 1,
            check: false,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    /// Accepts any bytes: a file of no other format is read as raw.
    fn probe(&self, _head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        Some(Confidence::Fallback)
    }

    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        source::open(input)
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        sink::create(output, manifest, options)
    }

    fn measure(&self, source: &dyn ImageSource, options: &CreateOptions) -> Result<Measure> {
        let [device] = source.info().devices.as_slice() else {
            return Err(Error::unsupported(format!(
                "raw holds one device, not {}",
                source.info().devices.len()
            )));
        };
        let data_bytes = data_bytes(source, device)?;
        let writes_all = options.get("preallocation").is_some_and(|value| value != "off")
            || options.sparse_granularity == Some(0);
        Ok(Measure {
            // The file's length, holes included: the output's file system decides whether they save space.
            required: device.size,
            fully_allocated: device.size,
            occupied: if writes_all { device.size } else { data_bytes },
        })
    }
}
