//! The traits that an image format implements: [`Driver`] opens, checks and describes images; [`ImageWriter`]
//! creates them.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::external::{BackingName, OpenOptions};
use crate::input::Input;
use crate::manifest::Manifest;
use crate::memory::TableMemory;
use crate::options::{CreateOptions, OptionSpec};
use crate::output::Output;
use crate::sink::ImageSink;
use crate::source::ImageSource;

/// An image format.
///
/// A driver that only reads needs only the methods without a default.
pub trait Driver: Send + Sync {
    /// Returns the name of the format, in lower case and without spaces ("qcow2").
    fn name(&self) -> &'static str;

    /// Returns other names of the format that users may state ("vpc" for VHD, as in qemu-img).
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }

    /// Returns a one-line description of the format for the user.
    fn description(&self) -> &'static str;

    /// Returns the file name extensions, without the dot. New images get the first one.
    fn extensions(&self) -> &'static [&'static str];

    /// Returns the operations that the driver supports.
    fn capabilities(&self) -> Capabilities;

    /// Returns the declarations of the options that [`Driver::writer`] accepts.
    fn options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Returns the confidence that an image is of this format, or `None` if it is not. `head` contains the
    /// first bytes of the image, at most [`crate::input::PROBE_LEN`]; `len` is its file size in bytes, if
    /// known.
    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence>;

    /// True if a file that has one of the driver's extensions is of this format by its last bytes, `end`, at
    /// most [`crate::input::PROBE_END_LEN`]. For `None`, the end of a stream that is not known yet, true if
    /// the format has a signature there. False by default.
    fn probe_end(&self, _end: Option<&[u8]>) -> bool {
        false
    }

    /// True if an image that begins with `head` can be read in one pass from a stream. By default, every
    /// image of a format with [`Capabilities::stream_read`] can.
    fn reads_stream(&self, _head: &[u8]) -> bool {
        self.capabilities().stream_read
    }

    /// Opens an image for reading. The driver checks all metadata that it can check without reading guest
    /// data. Its error for an unsupported feature names the feature.
    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>>;

    /// Checks the whole structure of an image.
    ///
    /// # Errors
    /// If the image can't be checked; [`crate::ErrorKind::Unsupported`] by default. Damage is not an error:
    /// the report lists it.
    fn check(&self, _input: Input, _options: &OpenOptions) -> Result<CheckReport> {
        Err(Error::unsupported(format!("{} images have no structure to check", self.name())))
    }

    /// Repairs the structure of the image in `image`; reads and changes no guest data. Returns the report of
    /// a check before the repair. Every write leaves an image that is no worse than before.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] for damage that the driver does not mend; nothing has been written then.
    /// [`crate::ErrorKind::Unsupported`] by default.
    fn repair(&self, _image: &Output, _what: Repair, _options: &OpenOptions) -> Result<CheckReport> {
        Err(Error::unsupported(format!("{} images can't be repaired", self.name())))
    }

    /// Changes the size of the only disk of the image in `image`. New bytes are zeros. Every write leaves an
    /// intact image of the old or the new size.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if data would be cut off without permission; [`crate::ErrorKind::Unsupported`]
    /// by default. Nothing has been written in this case.
    fn resize(&self, _image: &Output, _resize: Resize, _options: &OpenOptions) -> Result<()> {
        Err(Error::unsupported(format!("{} images can't be resized", self.name()))
            .hint("convert the image, and give the copy the new size"))
    }

    /// Parses the options and returns a writer that applies them. Opens and creates no files.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for options that can't be combined; [`crate::ErrorKind::Unsupported`] by
    /// default, for a driver that only reads.
    fn writer(&self, _options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Err(Error::unsupported(format!("{} images can't be written", self.name())))
    }

    /// Returns the name of the format that is this one encrypted, and also the value of the option
    /// [`ENCRYPT`] that chooses it; `None` by default. The caller makes the writer of that format.
    fn encrypted_form(&self) -> Option<&'static str> {
        None
    }

    /// Returns the format of the images in a new container; `None` by default, for a format that contains no
    /// images. The caller makes the writer of that format, and passes it to [`Driver::container_writer`].
    fn member_format(&self) -> Option<MemberFormat> {
        None
    }

    /// Like [`Driver::writer`], for a container. `member` writes the images in it, each into a framed output
    /// ([`Output::framed`]).
    ///
    /// # Errors
    /// Same as [`Driver::writer`].
    fn container_writer(
        &self,
        options: &CreateOptions,
        _member: Box<dyn ImageWriter>,
    ) -> Result<Box<dyn ImageWriter>> {
        self.writer(options)
    }
}

/// Name of the option that encrypts a new image.
pub const ENCRYPT: &str = "encrypt";

/// Format of the images in a new container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberFormat {
    /// Name of the driver.
    pub name: &'static str,
    /// Options, as keys and values. The settings that every format has are those of the container, and so are
    /// those that the container's format has under the same name.
    pub options: &'static [(&'static str, &'static str)],
}

/// Creates images of one format, with options that [`Driver::writer`] has checked.
pub trait ImageWriter: Send + Sync {
    /// Returns the backing image that the options name, if any. The caller opens it and passes its disk in
    /// [`Manifest::base`].
    fn backing(&self) -> Option<BackingName> {
        None
    }

    /// True if a new image contains properties of its backing image, such as its identifier. The caller then
    /// passes [`Manifest::base_info`] even if the new image stays empty.
    fn describes_backing(&self) -> bool {
        false
    }

    /// True if an image can store the bitmaps of [`Manifest::bitmaps`].
    fn stores_bitmaps(&self) -> bool {
        false
    }

    /// False if a format with [`Capabilities::stream_write`] can't write this variant to a stream.
    fn writes_stream(&self) -> bool {
        true
    }

    /// True if the content must come one device after the other, each in guest order. The caller then saves
    /// the stream of an archive first, whose devices may come together. False by default.
    fn needs_guest_order(&self) -> bool {
        false
    }

    /// Returns the option by which a format that is not written to a stream in this variant has one that is
    /// (`subformat=fixed`).
    fn stream_option(&self) -> Option<&'static str> {
        None
    }

    /// True if new images are encrypted with [`CreateOptions::secret`]. False by default.
    fn encrypts(&self) -> bool {
        false
    }

    /// Returns the names of the other outputs that [`ImageWriter::create`] will create, relative to the
    /// image, whose file name is `main`. The caller checks all names before it creates any output.
    fn companions(&self, _main: &str, _manifest: &Manifest) -> Vec<String> {
        Vec::new()
    }

    /// Returns the memory that the tables of an image need while it is written; nothing by default.
    fn tables(&self, _manifest: &Manifest) -> TableMemory {
        TableMemory::default()
    }

    /// Predicts the size of an image created from `source`. Unsupported by default.
    fn measure(&self, _source: &dyn ImageSource) -> Result<Measure> {
        Err(Error::unsupported("this format can't be measured"))
    }

    /// Opens the existing image in `image` to replace the content of its disk with `manifest`'s only device.
    /// The image keeps everything else: its virtual size, options, snapshots and backing image.
    /// `reads_as_zero` is true if its disk is known to contain only zeros. `files` opens the other files of
    /// the image that change, `options` supplies those that are only read, and memory.
    ///
    /// Every write leaves an image whose structure is intact, and whose old content outside the range of the
    /// device is whole.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the image is smaller than the device, damaged, or has parts that the
    /// driver can't keep; [`crate::ErrorKind::Unsupported`] by default. Nothing has been written in this case.
    fn update(
        &self,
        _image: &Output,
        _files: &mut dyn NamedFiles,
        _manifest: &Manifest,
        _reads_as_zero: bool,
        _options: &OpenOptions,
    ) -> Result<Box<dyn ImageSink>> {
        Err(Error::unsupported("an existing image of this format can't be written into"))
    }

    /// Creates the sink of a new image.
    ///
    /// # Errors
    /// If the format can't store the content of the manifest. Nothing has been written in this case.
    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>>;
}

/// Creates the outputs of one image under temporary names. The caller later renames or removes all of them.
pub trait OutputFactory {
    /// Returns the output with the image's own name. Every call returns the same output.
    fn main(&mut self) -> Result<Output>;

    /// Creates an output beside the image. `name` is relative to the image, which will store it in this form.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if the name is not a plain file name; [`crate::ErrorKind::Refused`]
    /// if the file already exists and the user did not allow overwriting.
    fn beside(&mut self, name: &str) -> Result<Output>;
}

/// Opens the files that an existing image names, to change them together with it.
pub trait NamedFiles {
    /// Opens the file that the image refers to as `name` for writing. `role` says what it is ("data file").
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the image to use this file, or if it is in use.
    fn open(&mut self, role: &str, name: &str) -> Result<Output>;
}

/// The operations that a driver supports. The conformance suite uses them to select the laws to test.
#[derive(Debug, Clone, Copy, Default)]
pub struct Capabilities {
    /// True if images can be read.
    pub read: bool,
    /// True if images can be created.
    pub write: bool,
    /// True if an image of some variant can be read in one pass from a pipe.
    pub stream_read: bool,
    /// True if an image of some variant can be written in one pass to a pipe.
    pub stream_write: bool,
    /// Limits, if an image is an archive of whole machines; `None` if an image is one disk.
    pub archive: Option<Archive>,
    /// True if an image contains other images, each opened by the driver of its own format (a tar of disks).
    pub container: bool,
    /// True if a chosen member of a container ([`crate::OpenOptions::member`]) can be read from a pipe,
    /// though the container as a whole can't.
    pub stream_member: bool,
    /// True if an image consists of its disk's bytes and nothing else, so any content is legal.
    pub verbatim: bool,
    /// Kinds of existing targets that are overwritten in place rather than replaced.
    pub in_place: InPlace,
    /// True if [`ImageWriter::update`] is implemented.
    pub updates: bool,
    /// True if the format can compress its content.
    pub compression: bool,
    /// True if internal snapshots can be read.
    pub snapshots: bool,
    /// True if an image can be created from a device whose size is unknown until the source ends.
    pub open_ended: bool,
    /// True if the size of an image that is read from a pipe is unknown until the pipe ends.
    pub sized_by_end: bool,
    /// Multiple, in bytes, to which the driver rounds virtual sizes up.
    pub size_multiple: u64,
    /// True if [`Driver::check`] is implemented.
    pub check: bool,
}

impl Capabilities {
    /// True if an image can contain several devices, each with a name.
    pub fn is_archive(&self) -> bool {
        self.archive.is_some()
    }

    /// Returns the maximum number of devices in one image; 1 unless the format is an archive.
    pub fn max_devices(&self) -> u32 {
        self.archive.map_or(1, |archive| archive.max_devices)
    }

    /// True if an image can store attachments.
    pub fn attachments(&self) -> bool {
        self.archive.is_some_and(|archive| archive.attachments)
    }
}

/// Limits of an archive of whole machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archive {
    /// Maximum number of devices.
    pub max_devices: u32,
    /// True if an archive can store attachments (VM configurations).
    pub attachments: bool,
}

/// Kinds of existing targets that a format overwrites in place, without a temporary file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InPlace {
    /// No targets: every image is a new file.
    #[default]
    Never,
    /// Block devices only. The format does not depend on the end of the file.
    BlockDevices,
    /// Block devices and regular files. A regular file keeps its length.
    Anywhere,
}

/// Confidence of a probe, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// Any content is legal in this format. [`crate::Registry::probe`] chooses the driver only if no other
    /// recognises the image.
    Fallback,
    /// The image has the magic number of the format.
    Magic,
}

/// Extent of [`Driver::repair`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Only what wastes space.
    Leaks,
    /// Everything that the driver can mend.
    All,
}

/// Request of [`Driver::resize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    /// New size in bytes. The driver may round it up.
    pub size: u64,
    /// True to cut off data; otherwise, only zeros may be cut off.
    pub discards: bool,
}

/// Result of [`Driver::check`]. A number is `None` if the driver does not determine it.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Number of contradictions in the metadata, which may make the content wrong.
    pub corruptions: u64,
    /// Number of allocated units that nothing refers to. They waste space, but the content is intact.
    pub leaks: u64,
    /// Number of structures that could not be checked.
    pub check_errors: u64,
    /// One line per finding or note, in the order found; at most [`CheckReport::MAX_FINDINGS`].
    pub findings: Vec<String>,
    /// File offset one past the last byte in use.
    pub image_end_offset: Option<u64>,
    /// Number of allocation units of the whole disk.
    pub total_clusters: Option<u64>,
    /// Number of allocated units.
    pub allocated_clusters: Option<u64>,
    /// Number of allocated units that are not stored directly after their predecessor in the file.
    pub fragmented_clusters: Option<u64>,
    /// Number of compressed units.
    pub compressed_clusters: Option<u64>,
}

impl CheckReport {
    /// Maximum number of findings in the report; further ones are only counted. Our limit.
    pub const MAX_FINDINGS: usize = 1000;

    /// Counts one corruption and adds its line to the findings.
    pub fn corruption(&mut self, finding: impl fmt::Display) {
        self.corruptions += 1;
        self.keep(finding);
    }

    /// Counts `units` leaked allocation units and adds one line to the findings.
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

/// Predicted size of an image.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Measure {
    /// File size in bytes that the image needs for the source's content.
    pub required: u64,
    /// File size in bytes that the image would need if all of it were allocated.
    #[serde(rename = "fully-allocated")]
    pub fully_allocated: u64,
    /// Length in bytes of the persistent bitmaps of the source, which come on top if they are copied; `None`
    /// if source or image can't have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<u64>,
    /// Minimum disk space in bytes that the image occupies on a file system with holes, for the check for
    /// free space only.
    #[serde(skip)]
    pub occupied: u64,
}
