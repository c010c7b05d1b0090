//! [`Manifest`], the list of devices and attachments of a new image.

use crate::bitmap::Bitmap;
use crate::device::{Attachment, Device};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::source::ImageInfo;

/// Devices and attachments of a new image, known before the first byte of data.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    /// The devices, in the order in which they will be written.
    pub devices: Vec<Device>,
    /// Attachments. A format that can't store them ignores them.
    pub attachments: Vec<Attachment>,
    /// The machine of the devices, whose drives have the names of `devices`. A format that can't store it
    /// ignores it.
    pub machine: Option<Box<Machine>>,
    /// Disk of the backing image that [`crate::ImageWriter::backing`] names, if the caller opened it. The new
    /// image does not store content that this disk already contains.
    pub base: Option<Disk>,
    /// Facts about the backing image, if the caller opened it, at least for information.
    pub base_info: Option<ImageInfo>,
    /// Persistent bitmaps of the only device, for a format that stores them
    /// ([`crate::ImageWriter::stores_bitmaps`]).
    pub bitmaps: Vec<Bitmap>,
    /// Memory in bytes for the tables of the image, within the bounds of [`crate::ImageWriter::tables`];
    /// `None` for the upper bound. It may decide the layout of the image.
    pub tables: Option<u64>,
}

impl Manifest {
    /// Returns the only device, for formats that store exactly one. `format` names the format in the error.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if there is no device or more than one.
    pub fn single(&self, format: &str) -> Result<&Device> {
        match self.devices.as_slice() {
            [device] => Ok(device),
            devices => {
                Err(Error::unsupported(format!("a {format} image stores one device, not {}", devices.len())))
            }
        }
    }
}
