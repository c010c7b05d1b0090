//! [`Device`] and [`Attachment`], which describe the content of an image in any format, and the index types
//! of a conversion.
//!
//! A conversion numbers devices, outputs and progress lines. Each number has its own type, so the compiler
//! catches a mix-up:
//!
//! | type | identifies |
//! |---|---|
//! | [`DeviceId`] | a device of a source, by the image's own numbering |
//! | [`Slot`] | a device selected for the conversion, counted across all sources |
//! | [`SinkDevice`] | a device in one sink's [`crate::Manifest`] |
//! | [`OutputId`] | an output of one sink |
//! | [`Lane`] | a line of the progress display |

use std::fmt;

/// Identity of a device within one source image. A conversion does not preserve it.
///
/// Single-disk formats use 0. A VMA archive uses its `dev_id` (1 to 254).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! indices {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub struct $name(pub u32);

            impl $name {
                /// Returns the number as an index into a list.
                pub fn index(self) -> usize {
                    self.0 as usize
                }

                /// Returns the first `count` numbers, starting at 0.
                pub fn first(count: usize) -> impl Iterator<Item = Self> {
                    (0..).map(Self).take(count)
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.0.fmt(f)
                }
            }
        )*
    };
}

indices! {
    /// A device selected for the conversion, counted across all of its sources.
    Slot;
    /// A device of one sink: an index into [`crate::Manifest::devices`].
    SinkDevice;
    /// An output of one sink: an index into [`crate::ImageSink::outputs`].
    OutputId;
    /// A line of a progress display.
    Lane;
}

impl OutputId {
    /// The output with the image's own name.
    pub const MAIN: Self = Self(0);
}

/// Kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// A disk that the guest sees.
    Disk,
    /// The saved memory and device state of a running guest.
    VmState,
}

/// One block device of an image: a raw, qcow2 or VHDX file has one, a VMA archive up to 254.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Identity within the image. In a manifest, it equals the [`SinkDevice`].
    pub id: DeviceId,
    /// Name from the image: untrusted, possibly not unique, and not a path.
    pub name: String,
    /// Virtual size in bytes. Any value is legal, including 0 and sizes that are not a multiple of a sector.
    pub size: u64,
    /// True if the size is unknown until the stream ends. `size` is 0 until then; afterwards the pipeline
    /// passes the size to [`crate::Consumer::resize`].
    pub open_ended: bool,
    /// Disk or guest state.
    pub kind: DeviceKind,
}

impl Device {
    /// Creates a disk of `size` bytes.
    pub fn disk(id: u32, name: impl Into<String>, size: u64) -> Self {
        Self { id: DeviceId(id), name: name.into(), size, open_ended: false, kind: DeviceKind::Disk }
    }
}

/// A named blob stored along with the devices, such as a VM configuration in a VMA archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Name from the image: untrusted, possibly not unique, and not a path.
    pub name: String,
    /// Content.
    pub data: Vec<u8>,
}

/// Returns the name among `known` that a user means by `wanted`: the same, or the only one that QEMU and
/// Proxmox VE make of it (`drive-scsi0` of `scsi0`, `drive-tpmstate0-backup` of `tpmstate0`).
///
/// ```
/// use imgtool_core::device::meant;
/// let known = ["drive-scsi0", "drive-tpmstate0-backup", "vmstate"];
/// assert_eq!(meant("scsi0", known), Some("drive-scsi0"));
/// assert_eq!(meant("tpmstate0", known), Some("drive-tpmstate0-backup"));
/// assert_eq!(meant("drive", known), None);
/// assert_eq!(meant("a", ["a", "drive-a"]), Some("a"));
/// assert_eq!(meant("a", ["drive-a", "drive-a-backup"]), None);
/// ```
pub fn meant<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut drives = Vec::new();
    for name in known {
        if name == wanted {
            return Some(name);
        }
        let drive = name.strip_prefix("drive-");
        let is_meant = drive.is_some_and(|drive| drive.strip_suffix("-backup").unwrap_or(drive) == wanted);
        if is_meant && !drives.contains(&name) {
            drives.push(name);
        }
    }
    if let [only] = drives.as_slice() { Some(only) } else { None }
}
