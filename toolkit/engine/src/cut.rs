//! An image whose disk ends earlier: what is cut off holds only zeros.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{
    Access, CancelToken, DeviceId, Disk, Doubt, Error, Extent, FileRange, ImageInfo, ImageSource, Loss,
    MapExtent, RandomAccess, Result, zero,
};

/// Length in bytes of a read. Our choice: fits into the cache of one core.
const STEP: u64 = 256 * 1024;

/// An image with one device cut to a smaller size.
struct Cut {
    info: ImageInfo,
    image: Arc<dyn ImageSource>,
}

/// Returns `image` with the device `device` cut to `size` bytes.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the rest of the device holds data;
/// [`imgtool_core::ErrorKind::Unsupported`] if the image can only be read in one pass.
pub fn to_size(
    image: Arc<dyn ImageSource>,
    device: DeviceId,
    size: u64,
    cancel: &CancelToken,
) -> Result<Arc<dyn ImageSource>> {
    let disk = Disk::new(Arc::clone(&image), device)?;
    if let Some(offset) = first_data(&disk, size, cancel)? {
        return Err(Error::refused(format!(
            "the disk holds data beyond {size} bytes, at guest byte {offset}"
        ))
        .device(disk.name())
        .hint("shrink its partitions and file systems in the guest first"));
    }
    let info = image.info();
    let mut devices = info.devices.clone();
    devices.iter_mut().filter(|known| known.id == device).for_each(|known| known.size = size);
    let info = ImageInfo {
        format: info.format,
        devices,
        attachments: info.attachments.clone(),
        ..ImageInfo::default()
    };
    Ok(Arc::new(Cut { info, image }))
}

/// Returns the offset of the first byte from `start` on that is not zero.
fn first_data(disk: &Disk, start: u64, cancel: &CancelToken) -> Result<Option<u64>> {
    let mut buffer = vec![0; usize::try_from(STEP).unwrap_or_default()];
    let mut position = start;
    while position < disk.size() {
        cancel.check()?;
        for extent in disk.extents(position..disk.size())? {
            let mut at = extent.start;
            while extent.is_data() && at < extent.end() {
                cancel.check()?;
                let len = STEP.min(extent.end() - at);
                let part = &mut buffer[..usize::try_from(len).unwrap_or_default()];
                disk.read_at(part, at)?;
                if !zero::is_zero(part) {
                    let first = part.iter().position(|byte| *byte != 0).unwrap_or_default();
                    return Ok(Some(at + first as u64));
                }
                at += len;
            }
            position = extent.end();
        }
    }
    Ok(None)
}

impl Cut {
    /// Returns the access to the whole image, which [`to_size`] has found.
    fn random(&self) -> Result<&dyn RandomAccess> {
        self.image.access().random().ok_or_else(imgtool_core::source::second_pass)
    }
}

impl ImageSource for Cut {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        self.image.losses()
    }

    fn doubts(&self) -> Vec<Doubt> {
        self.image.doubts()
    }

    fn notes(&self) -> Vec<String> {
        self.image.notes()
    }

    fn verify(&self) -> Result<()> {
        self.image.verify()
    }
}

impl RandomAccess for Cut {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.random()?.extents(device, range)
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.random()?.map(device, range)
    }

    fn rough_extents(&self, device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.random()?.rough_extents(device, range, resolution)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.random()?.read_at(device, buf, guest_offset)
    }

    fn read_granule(&self, device: DeviceId) -> u64 {
        self.random().map_or(1, |random| random.read_granule(device))
    }

    fn reader_memory(&self, device: DeviceId) -> u64 {
        self.random().map_or(0, |random| random.reader_memory(device))
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        self.random().ok()?.locate(device, range)
    }
}
