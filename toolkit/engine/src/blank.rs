//! [`Blank`], an image in memory whose disk holds only zeros: the source of a new, empty image.

use std::ops::Range;

use imgtool_core::source::uniform_extent;
use imgtool_core::{
    Access, Device, DeviceId, Extent, ExtentKind, ImageInfo, ImageSource, RandomAccess, Result,
};

/// An image of one disk that holds only zeros.
pub struct Blank(ImageInfo);

impl Blank {
    /// Creates an image with a disk of `size` bytes.
    pub fn new(name: &str, size: u64) -> Self {
        Self(ImageInfo {
            format: "blank",
            devices: vec![Device::disk(0, name, size)],
            ..ImageInfo::default()
        })
    }
}

impl ImageSource for Blank {
    fn info(&self) -> &ImageInfo {
        &self.0
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
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
