//! [`Disk`], a handle to one device of an open image, and [`DiskReader`], which implements `Read` and `Seek`.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use crate::device::{Device, DeviceId, meant};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentKind, MapExtent, check_answer};
use crate::source::{FileRange, ImageSource, Loss, RandomAccess};
use crate::stack::deeper;
use crate::suggest;

/// A handle to one device of an open image. Any number of threads may read it concurrently, at any offset.
///
/// Cloning is cheap and shares the image, which stays open as long as a handle exists. Every method checks
/// its range against the device's size, so drivers see only valid ranges.
#[derive(Clone)]
pub struct Disk {
    image: Arc<dyn ImageSource>,
    device: DeviceId,
    size: u64,
}

impl Disk {
    /// Creates a handle to the device `device` of an image.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if the image has no such device; [`crate::ErrorKind::Unsupported`] if the
    /// image can only be read in one pass.
    pub fn new(image: Arc<dyn ImageSource>, device: DeviceId) -> Result<Self> {
        let size = image
            .info()
            .device(device)
            .map(|device| device.size)
            .ok_or_else(|| Error::usage(format!("the image has no device {device}")))?;
        if image.access().is_stream() {
            return Err(Error::unsupported("the image can only be read in one pass")
                .hint("save the stream to a file first"));
        }
        Ok(Self { image, device, size })
    }

    /// Creates a handle to the first device called `name`, or that `name` means ([`meant`]).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if no device has that name, with a hint that lists the devices; otherwise
    /// the same as [`Disk::new`].
    pub fn by_name(image: Arc<dyn ImageSource>, name: &str) -> Result<Self> {
        let devices = &image.info().devices;
        let known = devices.iter().map(|device| device.name.as_str());
        let found = meant(name, known.clone());
        let found = found.and_then(|name| devices.iter().find(|device| device.name == name));
        let Some(device) = found.map(|device| device.id) else {
            return Err(Error::usage(format!("no device is called '{name}'"))
                .hint(suggest::hint(name, "devices", known)));
        };
        Self::new(image, device)
    }

    /// Creates a handle to the only device of an image. `role` names the image in errors ("the backing
    /// image").
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if the image has no device or several, or can only be read in one
    /// pass.
    pub fn only(image: Arc<dyn ImageSource>, role: &str) -> Result<Self> {
        let [device] = image.info().devices.as_slice() else {
            let count = image.info().devices.len();
            return Err(Error::unsupported(format!("{role} has {count} devices, expected one")));
        };
        let device = device.id;
        Self::new(image, device)
    }

    /// Creates handles to all devices of an image, in the image's order.
    ///
    /// # Errors
    /// Same as [`Disk::new`].
    pub fn all(image: &Arc<dyn ImageSource>) -> Result<Vec<Self>> {
        image.info().devices.iter().map(|device| Self::new(Arc::clone(image), device.id)).collect()
    }

    /// Returns the virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the description of the device: name, size and kind.
    pub fn device(&self) -> &Device {
        // `new` found the device, and the information about an open image does not change.
        self.image.info().device(self.device).unwrap_or(&NO_DEVICE)
    }

    /// Returns the device's name, which comes from the image and is untrusted.
    pub fn name(&self) -> &str {
        &self.device().name
    }

    /// Returns the image that contains the device.
    pub fn image(&self) -> &Arc<dyn ImageSource> {
        &self.image
    }

    /// Fills `buf` with guest bytes, starting at `guest_offset`. Unallocated ranges read as zeros.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] if the range exceeds the disk, or any error of the image's driver.
    pub fn read_at(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset.checked_add(buf.len() as u64);
        self.check(guest_offset, end)?;
        if buf.is_empty() {
            return Ok(());
        }
        let random = self.random()?;
        deeper(|| random.read_at(self.device, buf, guest_offset))
    }

    /// Returns the extents of `range`: ascending, contiguous, starting at `range.start`, and at least one
    /// unless `range` is empty. The answer may end before `range.end`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfBounds`] if the range exceeds the disk, or any error of the image's driver.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.within(range, |random, range| check_answer(random.extents(self.device, range.clone())?, range))
    }

    /// Like [`Disk::extents`], but only as precise as needed to read in pieces that end at multiples of
    /// `resolution` bytes; see [`RandomAccess::rough_extents`].
    ///
    /// # Errors
    /// Same as [`Disk::extents`].
    pub fn rough_extents(&self, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        let resolution = resolution.max(1);
        self.within(range, |random, range| {
            check_answer(random.rough_extents(self.device, range.clone(), resolution)?, range)
        })
    }

    /// Like [`Disk::extents`], but also reports, for each extent, which image of the backing chain it comes
    /// from and where in that image's file.
    ///
    /// # Errors
    /// Same as [`Disk::extents`].
    pub fn map(&self, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.within(range, |random, range| {
            let answer = random.map(self.device, range.clone())?;
            let extents =
                answer.iter().map(|one| Extent { start: one.start, len: one.len, kind: ExtentKind::Data });
            check_answer(extents.collect(), range)?;
            Ok(answer)
        })
    }

    /// Returns the file range that stores the guest bytes starting at `range.start`; see
    /// [`RandomAccess::locate`]. Also returns `None` if `range` is empty or exceeds the disk.
    pub fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        let is_within = range.start < range.end && range.end <= self.size;
        is_within.then(|| deeper(|| self.random().ok()?.locate(self.device, range))).flatten()
    }

    /// See [`RandomAccess::reader_memory`].
    pub fn reader_memory(&self) -> u64 {
        self.random().map_or(0, |random| random.reader_memory(self.device))
    }

    /// Returns the unit, in bytes, in which reads are cheapest.
    pub fn read_granule(&self) -> u64 {
        self.random().map_or(1, |random| deeper(|| random.read_granule(self.device)))
    }

    /// Returns the losses of the image that contains the device; see [`ImageSource::losses`].
    pub fn losses(&self) -> Vec<Loss> {
        deeper(|| self.image.losses())
    }

    /// Returns a reader positioned at the start of the disk.
    pub fn reader(&self) -> DiskReader {
        DiskReader { disk: self.clone(), position: 0 }
    }

    fn within<T>(
        &self,
        range: Range<u64>,
        answer: impl FnOnce(&dyn RandomAccess, Range<u64>) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        self.check(range.start, Some(range.end))?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let random = self.random()?;
        deeper(|| answer(random, range))
    }

    fn check(&self, start: u64, end: Option<u64>) -> Result<()> {
        match end {
            Some(end) if start <= end && end <= self.size => Ok(()),
            _ => Err(Error::out_of_bounds(format!(
                "bytes from {start} to {} leave the disk of {} bytes",
                end.map_or("beyond 2^64".to_owned(), |end| end.to_string()),
                self.size
            ))
            .device(self.name())),
        }
    }

    fn random(&self) -> Result<&dyn RandomAccess> {
        self.image
            .access()
            .random()
            .ok_or_else(|| Error::unsupported("the image can only be read in one pass"))
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("device", self.device()).finish_non_exhaustive()
    }
}

static NO_DEVICE: Device = Device {
    id: DeviceId(0),
    name: String::new(),
    size: 0,
    open_ended: false,
    kind: crate::device::DeviceKind::Disk,
};

/// A reader over a disk, for crates that parse partition tables and file systems. Any number of readers may
/// read one disk, each with its own position.
///
/// The reader does not buffer, and a driver may decode a whole compressed cluster for each small read. Wrap
/// the reader in a [`std::io::BufReader`].
#[derive(Debug, Clone)]
pub struct DiskReader {
    disk: Disk,
    position: u64,
}

impl Read for DiskReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size.saturating_sub(self.position);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if len > 0 {
            self.disk.read_at(&mut buf[..len], self.position)?;
            self.position += len as u64;
        }
        Ok(len)
    }
}

impl Seek for DiskReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(distance) => self.disk.size.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = position.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "seek to a position before the start or beyond 2^64")
        })?;
        Ok(self.position)
    }
}
