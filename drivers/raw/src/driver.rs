//! The driver for raw images: its capabilities and options.

use std::sync::Arc;

use imgtool_core::driver::ENCRYPT;
use imgtool_core::{
    Capabilities, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, InPlace, Input, OpenOptions,
    OptionKind, OptionSpec, Output, Resize, Result,
};

use crate::options::WriteOptions;
use crate::writer::RawWriter;
use crate::{resize, source};

/// Driver for raw disk images and block devices.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawDriver;

/// Options of a new image.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "preallocation",
        help: "space allocated ahead: off, by the file system (falloc), by writing zeros (full)",
        default: "off",
        kind: OptionKind::OneOf(&["off", "falloc", "full"]),
    },
    OptionSpec {
        name: ENCRYPT,
        help: "encrypt the disk: write a LUKS container, with the options of the format luks",
        default: "no",
        kind: OptionKind::OneOf(&[LUKS]),
    },
];

/// Format of an encrypted raw disk.
const LUKS: &str = "luks";

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
            verbatim: true,
            in_place: InPlace::Anywhere,
            open_ended: true,
            sized_by_end: true,
            size_multiple: 1,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn encrypted_form(&self) -> Option<&'static str> {
        Some(LUKS)
    }

    /// Accepts any bytes: a file that no other driver recognises is read as raw.
    fn probe(&self, _head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        Some(Confidence::Fallback)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        source::open(input, options)
    }

    fn resize(&self, image: &Output, resize: Resize, options: &OpenOptions) -> Result<()> {
        resize::resize(image, resize, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(WriteOptions::parse(options).map(RawWriter)?))
    }
}
