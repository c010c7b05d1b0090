//! Compares allocation: finds the first place that two images store in different ways.

use imgtool_core::{Disk, Error, MapExtent, Result, ResultExt};

use crate::compare::DevicePair;
use crate::open::Opened;

/// Returns the index of the pair and the guest offset of the first place that the images store in different ways;
/// `None` if there is no difference. The devices of a pair must have equal sizes.
///
/// # Errors
/// If an image can't be read, or is a stream.
pub fn first_difference(
    first: &Opened,
    second: &Opened,
    pairs: &[DevicePair],
) -> Result<Option<(usize, u64)>> {
    for (index, pair) in pairs.iter().enumerate() {
        let mut a = Walk::new(first, pair.first.id)?;
        let mut b = Walk::new(second, pair.second.id)?;
        let mut position = 0;
        while position < pair.first.size {
            let (one, other) = (a.at(position)?, b.at(position)?);
            if Status::of(one, first.driver.name()) != Status::of(other, second.driver.name()) {
                return Ok(Some((index, position)));
            }
            position = one.end().min(other.end());
        }
    }
    Ok(None)
}

/// Way in which an image stores an extent: what qemu-img compares in its strict mode, as `qemu-img map` shows it.
/// The depth in a chain and the place in the file do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status {
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    has_place: bool,
    /// Format, for zeros that no file stores: each format describes them in its own way, and to qemu-img those of
    /// two formats are different.
    format: Option<&'static str>,
}

impl Status {
    fn of(extent: &MapExtent, format: &'static str) -> Self {
        let MapExtent { present, zero, data, compressed, ref place, .. } = *extent;
        let has_place = place.is_some();
        let format = (!has_place && !data).then_some(format);
        Self { present, zero, data, compressed, has_place, format }
    }
}

/// Iterates over the extents of a device.
struct Walk<'a> {
    image: &'a Opened,
    disk: Disk,
    known: std::vec::IntoIter<MapExtent>,
    current: Option<MapExtent>,
}

impl<'a> Walk<'a> {
    fn new(image: &'a Opened, device: imgtool_core::DeviceId) -> Result<Self> {
        let disk = Disk::new(image.image.clone(), device).in_file(&image.location)?;
        Ok(Self { image, disk, known: Vec::new().into_iter(), current: None })
    }

    /// Returns the extent that contains the guest byte at `position`, which must not decrease between calls.
    fn at(&mut self, position: u64) -> Result<&MapExtent> {
        while self.current.as_ref().is_none_or(|extent| extent.end() <= position) {
            self.current = self.known.next();
            if self.current.is_none() {
                let extents = self.disk.map(position..self.disk.size());
                self.known = extents.in_file(&self.image.location)?.into_iter();
            }
        }
        self.current.as_ref().ok_or_else(|| Error::malformed("the map of the image ends early"))
    }
}
