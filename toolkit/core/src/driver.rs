//! The contract of an image format: [`Driver`] opens, checks and describes images, [`ImageWriter`] makes
//! them.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::external::{BackingName, OpenOptions};
use crate::input::Input;
use crate::manifest::Manifest;
use crate::options::{CreateOptions, OptionSpec};
use crate::output::Output;
use crate::sink::ImageSink;
use crate::source::ImageSource;

/// One image format.
///
/// The methods without a default suffice for a driver that only reads.
pub trait Driver: Send + Sync {
    /// Returns the name of the format: lower case, no blanks ("qcow2").
    fn name(&self) -> &'static str;

    /// Describes the format in one line, for a person.
    fn description(&self) -> &'static str;

    /// Returns the file name extensions without the dot. Outputs get the first.
    fn extensions(&self) -> &'static [&'static str];

    /// Describes which operations the driver supports.
    fn capabilities(&self) -> Capabilities;

    /// Declares the options of [`Driver::writer`].
    fn options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Returns the confidence that an image is of this format; `None` if it is not. `head` holds the first
    /// bytes, up to [`crate::input::PROBE_LEN`]; `len` is the length in bytes, if known.
    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence>;

    /// Opens an image for reading. The driver checks all metadata that it can check without reading data,
    /// and refuses unsupported features by name.
    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>>;

    /// Checks the whole structure of an image.
    ///
    /// # Errors
    /// If the image can't be checked. Damage is no error: the report lists it.
    fn check(&self, _input: Input, _options: &OpenOptions) -> Result<CheckReport> {
        Err(Error::unsupported(format!("{} images have no structure to check", self.name())))
    }

    /// Parses the options and returns a writer for images that have them. Opens and creates nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for options that can't be combined; [`crate::ErrorKind::Unsupported`]
    /// by default, for a driver that only reads.
    fn writer(&self, _options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Err(Error::unsupported(format!("{} images are read, not written", self.name())))
    }
}

/// Makes images of one format, with options that [`Driver::writer`] has checked.
pub trait ImageWriter: Send + Sync {
    /// Returns the backing image that the options name, if any. The caller opens it and passes its disk in
    /// [`Manifest::base`].
    fn backing(&self) -> Option<BackingName> {
        None
    }

    /// Returns the names of the further outputs that [`ImageWriter::create`] will make, relative to the
    /// image `main`. The caller checks all names before anything is created.
    fn companions(&self, _main: &str, _manifest: &Manifest) -> Vec<String> {
        Vec::new()
    }

    /// Returns the number of bytes that an image made from `source` will need.
    fn measure(&self, _source: &dyn ImageSource) -> Result<Measure> {
        Err(Error::unsupported("this format can't be measured"))
    }

    /// Creates the sink of a new image.
    ///
    /// # Errors
    /// If the format can't hold the content of the manifest. Nothing has been written then.
    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>>;
}

/// Makes the outputs of one image under temporary names. They are renamed, or removed, together.
pub trait OutputFactory {
    /// Returns the output with the image's own name; the same one on every call.
    fn main(&mut self) -> Result<Output>;

    /// Creates an output beside the image. `name` is relative to the image, as the image will refer to it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the name is not a plain file name, or already exists.
    fn beside(&mut self, name: &str) -> Result<Output>;
}

/// The operations that a driver supports. The conformance suite selects the laws to test by them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Capabilities {
    /// True if images can be read.
    pub read: bool,
    /// True if images can be made.
    pub write: bool,
    /// True if an image can be read in one pass from a pipe.
    pub stream_read: bool,
    /// True if an image can be written in one pass to a pipe.
    pub stream_write: bool,
    /// Limits of an archive of whole machines; `None` if an image is one disk.
    pub archive: Option<Archive>,
    /// True if images hold other images, whose formats have drivers of their own (a tar of disks).
    pub container: bool,
    /// True if an image is the bytes of its disk and nothing else, so that every content is legal.
    pub verbatim: bool,
    /// Existing targets that are written in place instead of being replaced.
    pub in_place: InPlace,
    /// True if the format can compress its content.
    pub compression: bool,
    /// True if internal snapshots can be read.
    pub snapshots: bool,
    /// True if an image can be made of a device whose size is unknown until the source ends.
    pub open_ended: bool,
    /// Virtual sizes are rounded up to a multiple of this many bytes.
    pub size_multiple: u64,
    /// True if [`Driver::check`] is implemented.
    pub check: bool,
}

impl Capabilities {
    /// True if an image can hold several devices, each with a name.
    pub fn is_archive(&self) -> bool {
        self.archive.is_some()
    }

    /// Returns the maximum number of devices in one image.
    pub fn max_devices(&self) -> u32 {
        self.archive.map_or(1, |archive| archive.max_devices)
    }

    /// True if an image can hold configurations.
    pub fn attachments(&self) -> bool {
        self.archive.is_some_and(|archive| archive.attachments)
    }
}

/// Limits of an archive of whole machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archive {
    /// Maximum number of devices.
    pub max_devices: u32,
    /// True if an archive can hold configurations.
    pub attachments: bool,
}

/// Existing targets that a format writes in place, without a temporary name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InPlace {
    /// None: every image is a new file.
    #[default]
    Never,
    /// Block devices: the image does not depend on where its file ends.
    BlockDevices,
    /// Block devices and regular files that keep their length.
    Anywhere,
}

/// Confidence of a probe, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// Every content is legal in this format. The driver is chosen if no other recognises the image.
    Fallback,
    /// The image has the magic number of the format.
    Magic,
}

/// Result of [`Driver::check`].
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Number of contradictions in the metadata. The content may be wrong.
    pub corruptions: u64,
    /// Number of allocated units that nothing refers to. The content is right.
    pub leaks: u64,
    /// Number of structures that could not be checked.
    pub check_errors: u64,
    /// One line per finding, worst first; at most [`CheckReport::MAX_FINDINGS`].
    pub findings: Vec<String>,
    /// File offset of the end of the used part.
    pub image_end_offset: Option<u64>,
    /// Number of allocation units of the whole disk.
    pub total_clusters: Option<u64>,
    /// Number of units that are allocated.
    pub allocated_clusters: Option<u64>,
    /// Number of allocated units that do not follow their predecessor in the file.
    pub fragmented_clusters: Option<u64>,
    /// Number of units that are compressed.
    pub compressed_clusters: Option<u64>,
}

impl CheckReport {
    /// Maximum number of findings kept as lines; further ones are only counted. Our limit.
    pub const MAX_FINDINGS: usize = 1000;

    /// Counts one corruption and keeps its line.
    pub fn corruption(&mut self, finding: impl fmt::Display) {
        self.corruptions += 1;
        self.keep(finding);
    }

    /// Counts leaked allocation units and keeps the line.
    pub fn leak(&mut self, units: u64, finding: impl fmt::Display) {
        self.leaks += units;
        self.keep(finding);
    }

    fn keep(&mut self, finding: impl fmt::Display) {
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(finding.to_string());
        }
    }
}

/// The expected size of an image.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Measure {
    /// Bytes that the image needs for the source's content, as its driver counts them.
    pub required: u64,
    /// Bytes that the image would need if every part were allocated.
    #[serde(rename = "fully-allocated")]
    pub fully_allocated: u64,
    /// Minimum number of bytes that the image takes on a file system where holes take none. The space
    /// check uses this number; the other two are for a user who wants to know how much to provide.
    #[serde(skip)]
    pub occupied: u64,
}
