//! [`Front`], the first bytes of the only disk of an image.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{
    Access, DeviceId, Error, Extent, FileRange, ImageInfo, ImageSource, Loss, MapExtent, RandomAccess, Result,
};

/// An image whose only disk ends early.
pub(crate) struct Front {
    image: Arc<dyn ImageSource>,
    info: ImageInfo,
}

impl Front {
    /// Cuts the disk of `image` after `size` bytes, if it is longer.
    pub(crate) fn new(image: Arc<dyn ImageSource>, size: u64) -> Self {
        let mut info = image.info().clone();
        for device in &mut info.devices {
            device.size = device.size.min(size);
        }
        Self { image, info }
    }

    fn whole(&self) -> Result<&dyn RandomAccess> {
        self.image.access().random().ok_or_else(|| Error::unsupported("a stream has no front"))
    }
}

impl ImageSource for Front {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        self.image.losses()
    }

    fn verify(&self) -> Result<()> {
        self.image.verify()
    }
}

impl RandomAccess for Front {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.whole()?.extents(device, range)
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.whole()?.map(device, range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.whole()?.read_at(device, buf, guest_offset)
    }

    fn read_granule(&self, device: DeviceId) -> u64 {
        self.whole().map_or(1, |whole| whole.read_granule(device))
    }

    fn reader_memory(&self, device: DeviceId) -> u64 {
        self.whole().map_or(0, |whole| whole.reader_memory(device))
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        self.whole().ok()?.locate(device, range)
    }
}
