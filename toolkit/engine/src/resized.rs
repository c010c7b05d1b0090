//! [`Resized`], an image with a disk of another size. It is read by position.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::source::uniform_extent;
use imgtool_core::{
    Access, DeviceId, Doubt, Error, Extent, ExtentKind, FileRange, ImageInfo, ImageSource, Loss, MapExtent,
    MapPlace, RandomAccess, Result,
};

/// An image with a disk that ends earlier, or behind whose end a hole follows.
pub(crate) struct Resized {
    image: Arc<dyn ImageSource>,
    info: ImageInfo,
    device: DeviceId,
    /// Size in bytes of the disk in the image.
    inner_size: u64,
}

impl Resized {
    /// Gives the disk `device` of `image` another size in bytes.
    pub(crate) fn new(image: Arc<dyn ImageSource>, device: DeviceId, size: u64) -> Self {
        let mut info = image.info().clone();
        let mut inner_size = 0;
        for known in info.devices.iter_mut().filter(|known| known.id == device) {
            inner_size = std::mem::replace(&mut known.size, size);
        }
        Self { image, info, device, inner_size }
    }

    fn inner(&self) -> Result<&dyn RandomAccess> {
        self.image.access().random().ok_or_else(|| Error::unsupported("a stream has no other size"))
    }

    /// Gives a raw disk a size of whole sectors, as QEMU sees it. A stream stays as it is.
    pub(crate) fn to_sectors(image: Arc<dyn ImageSource>) -> Arc<dyn ImageSource> {
        /// Unit in bytes of the size. QEMU's.
        const SECTOR: u64 = 512;
        let ragged = image.info().devices.iter().find(|device| !device.size.is_multiple_of(SECTOR));
        let whole =
            ragged.and_then(|device| Some((device.id, device.size.checked_next_multiple_of(SECTOR)?)));
        match whole {
            Some((device, size)) if !image.access().is_stream() => Arc::new(Self::new(image, device, size)),
            _ => image,
        }
    }

    /// Returns the map of a range behind the end of the image: a hole, which continues the file that holds the last
    /// byte.
    fn map_behind(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let mut hole: Vec<MapExtent> =
            uniform_extent(range, ExtentKind::Hole).into_iter().map(MapExtent::of).collect();
        let Some(last) = self.inner_size.checked_sub(1) else { return Ok(hole) };
        let known = self.inner()?.map(device, last..self.inner_size)?.into_iter().next();
        if let Some(MapExtent { place: Some(place), present, depth, start, .. }) = known {
            for extent in &mut hole {
                let distance = extent.start.saturating_sub(start);
                let file_offset = place.file_offset.saturating_add(distance);
                (extent.present, extent.depth) = (present, depth);
                extent.place = Some(MapPlace { file_offset, ..place.clone() });
            }
        }
        Ok(hole)
    }

    /// Returns the part of a guest range that the image has; `None` if the range is behind its end.
    fn part(&self, device: DeviceId, range: &Range<u64>) -> Option<Range<u64>> {
        let end = if device == self.device { range.end.min(self.inner_size) } else { range.end };
        (range.start < end).then_some(range.start..end)
    }
}

impl ImageSource for Resized {
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

    fn damage(&self) -> Option<&Error> {
        self.image.damage()
    }
}

impl RandomAccess for Resized {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        match self.part(device, &range) {
            Some(part) => self.inner()?.extents(device, part),
            None => Ok(uniform_extent(range, ExtentKind::Hole)),
        }
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        match self.part(device, &range) {
            Some(part) => self.inner()?.map(device, part),
            None => self.map_behind(device, range),
        }
    }

    fn rough_extents(&self, device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        match self.part(device, &range) {
            Some(part) => self.inner()?.rough_extents(device, part, resolution),
            None => Ok(uniform_extent(range, ExtentKind::Hole)),
        }
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let range = guest_offset..guest_offset.saturating_add(buf.len() as u64);
        // At most the length of the buffer.
        let len = self.part(device, &range).map_or(0, |part| (part.end - part.start) as usize);
        let (inside, behind) = buf.split_at_mut(len);
        behind.fill(0);
        if inside.is_empty() { Ok(()) } else { self.inner()?.read_at(device, inside, guest_offset) }
    }

    fn read_granule(&self, device: DeviceId) -> u64 {
        self.inner().map_or(1, |inner| inner.read_granule(device))
    }

    fn reader_memory(&self, device: DeviceId) -> u64 {
        self.inner().map_or(0, |inner| inner.reader_memory(device))
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        self.inner().ok()?.locate(device, self.part(device, &range)?)
    }
}
