//! A disk as [`Read`] and [`Seek`]: for crates that read partition tables and file systems.

use std::io::{self, Read, Seek, SeekFrom};

use crate::device::{Device, DeviceId};
use crate::error::{Error, Result};
use crate::source::{ImageSource, RandomAccess};

/// Reads one device of an image as if it were a file of its own: guest bytes, zeros for what is not
/// allocated. As many as one likes may read the same image at once, each with its own position.
///
/// Small reads cost as much as they cost the driver (a compressed cluster is decoded for each):
/// [`std::io::BufReader`] around it helps.
pub struct DeviceReader<'a> {
    random: &'a dyn RandomAccess,
    device: DeviceId,
    size: u64,
    position: u64,
}

impl<'a> DeviceReader<'a> {
    /// A reader at the beginning of a device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when there is no such device, [`crate::ErrorKind::Unsupported`]
    /// when the image can be read in one pass only.
    pub fn new(source: &'a dyn ImageSource, device: DeviceId) -> Result<Self> {
        let size = source
            .info()
            .device(device)
            .map(|device| device.size)
            .ok_or_else(|| Error::usage(format!("the source has no device {device}")))?;
        let random = source.random().ok_or_else(|| {
            Error::unsupported("the image can be read in one pass only")
                .hint("open it from a file, or from Input::spool of the stream")
        })?;
        Ok(Self { random, device, size, position: 0 })
    }

    /// A reader of the device called `name`, the first of that name.
    ///
    /// # Errors
    /// Those of [`DeviceReader::new`].
    pub fn by_name(source: &'a dyn ImageSource, name: &str) -> Result<Self> {
        let devices: &[Device] = &source.info().devices;
        match devices.iter().find(|device| device.name == name) {
            Some(device) => Self::new(source, device.id),
            None => {
                let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
                Err(Error::usage(format!("no device is called '{name}'"))
                    .hint(format!("devices: {}", names.join(", "))))
            }
        }
    }

    /// The device's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Read for DeviceReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.position);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if len > 0 {
            self.random.read_at(self.device, &mut buf[..len], self.position).map_err(io::Error::other)?;
            self.position += len as u64;
        }
        Ok(len)
    }
}

impl Seek for DeviceReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(distance) => self.size.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = position.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "a position before the beginning or beyond 2^64")
        })?;
        Ok(self.position)
    }
}
