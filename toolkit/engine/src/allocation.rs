//! Compares allocation: finds the first place where only one of two images has data.

use imgtool_core::{Disk, Extent, Result, ResultExt};

use crate::compare::DevicePair;
use crate::open::Opened;

/// Returns the index of the pair and the guest offset of the first place where only one image has data;
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
            if one.is_data() != other.is_data() {
                return Ok(Some((index, position)));
            }
            position = one.end().min(other.end());
        }
    }
    Ok(None)
}

/// Iterates over the extents of a device.
struct Walk<'a> {
    image: &'a Opened,
    disk: Disk,
    known: std::vec::IntoIter<Extent>,
    current: Option<Extent>,
}

impl<'a> Walk<'a> {
    fn new(image: &'a Opened, device: imgtool_core::DeviceId) -> Result<Self> {
        let disk = Disk::new(image.image.clone(), device).in_file(&image.location)?;
        Ok(Self { image, disk, known: Vec::new().into_iter(), current: None })
    }

    /// Returns the extent that contains the guest byte at `position`, which must not decrease between calls.
    fn at(&mut self, position: u64) -> Result<Extent> {
        loop {
            match self.current {
                Some(extent) if extent.end() > position => return Ok(extent),
                _ => {}
            }
            self.current = match self.known.next() {
                Some(extent) => Some(extent),
                None => {
                    let extents = self.disk.extents(position..self.disk.size());
                    self.known = extents.in_file(&self.image.location)?.into_iter();
                    self.known.next()
                }
            };
        }
    }
}
