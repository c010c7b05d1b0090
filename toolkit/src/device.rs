//! Devices and attachments: what an image holds, whatever its format.

use std::fmt;

use crate::error::{Error, Result};

/// Identifies a device within one image; not kept across conversions.
///
/// Single-disk formats use 0. A VMA archive uses its own `dev_id` (1..=254).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a device stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// A disk that a guest sees.
    Disk,
    /// The saved memory and device state of a running guest.
    VmState,
}

/// One block device of an image: a raw, qcow2 or VHDX file has one, a VMA archive up to 254.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its identity within the image.
    pub id: DeviceId,
    /// Its name as the image gives it: not trusted, not unique, never a path.
    pub name: String,
    /// The guest-visible size in bytes; any number, also 0 and no multiple of anything.
    pub size: u64,
    /// The size is not known yet: a stream without a length. `size` is 0 until the stream has ended
    /// ([`crate::ImageSink::resize`] then tells the sink).
    pub open_ended: bool,
    /// What it stands for.
    pub kind: DeviceKind,
}

impl Device {
    /// A disk of `size` bytes.
    pub fn disk(id: u32, name: impl Into<String>, size: u64) -> Self {
        Self { id: DeviceId(id), name: name.into(), size, open_ended: false, kind: DeviceKind::Disk }
    }
}

/// A named blob that travels with the devices (a VM configuration in a VMA archive).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its name as the image gives it: not trusted, not unique, never a path.
    pub name: String,
    /// Its content.
    pub data: Vec<u8>,
}

/// What a sink is asked to hold: known before the first byte of data.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    /// The devices, in the order in which they will be written.
    pub devices: Vec<Device>,
    /// The blobs that travel with them; a format without a place for them ignores them.
    pub attachments: Vec<Attachment>,
}

impl Manifest {
    /// The only device, for formats that hold one.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] when there is none or more than one.
    pub fn single(&self, format: &str) -> Result<&Device> {
        match self.devices.as_slice() {
            [device] => Ok(device),
            devices => Err(Error::unsupported(format!("{format} holds one device, not {}", devices.len()))),
        }
    }
}
