//! A disk of nothing but zeros: what `create` makes and `measure --size` measures.

use std::ops::Range;

use imgtool_toolkit::source::uniform_extent;
use imgtool_toolkit::{
    Access, Device, DeviceId, Extent, ExtentKind, ImageInfo, ImageSource, RandomAccess, Result,
};

/// An empty disk.
pub struct Blank(ImageInfo);

impl Blank {
    /// Of `size` bytes.
    pub fn new(name: &str, size: u64) -> Self {
        Self(ImageInfo { format: "raw", devices: vec![Device::disk(0, name, size)], ..ImageInfo::default() })
    }
}

impl ImageSource for Blank {
    fn info(&self) -> &ImageInfo {
        &self.0
    }

    fn access(&mut self) -> Access<'_> {
        Access::Random(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        Some(self)
    }
}

impl RandomAccess for Blank {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        Ok(uniform_extent(range, ExtentKind::Hole))
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], _guest_offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
}
