//! `compare --strict`: what holds data and what does not must be the same in both.

use imgtool_toolkit::{Device, Extent, Opened, RandomAccess, Result, ResultExt};

use super::Difference;
use super::sink::Pair;
use crate::images;

/// The first place where one image holds data and the other does not.
pub(super) fn allocation(first: &Opened, second: &Opened, pairs: &[Pair]) -> Result<Option<Difference>> {
    for pair in pairs {
        let mut a = Walk::new(first, &pair.first)?;
        let mut b = Walk::new(second, &pair.second)?;
        let mut position = 0;
        // Sizes are equal: that was looked at first.
        while position < pair.first.size {
            let (one, other) = (a.at(position)?, b.at(position)?);
            if one.is_data() != other.is_data() {
                return Ok(Some(Difference {
                    kind: "allocation",
                    device: pair.name.clone(),
                    offset: Some(position),
                    text: format!("Allocation mismatch at offset {position} of {}!", pair.name),
                }));
            }
            position = one.end().min(other.end());
        }
    }
    Ok(None)
}

/// The extents of a device, one after the other.
struct Walk<'a> {
    image: &'a Opened,
    random: &'a dyn RandomAccess,
    device: &'a Device,
    known: std::vec::IntoIter<Extent>,
    current: Option<Extent>,
}

impl<'a> Walk<'a> {
    fn new(image: &'a Opened, device: &'a Device) -> Result<Self> {
        let random = images::random(image)?;
        Ok(Self { image, random, device, known: Vec::new().into_iter(), current: None })
    }

    /// The extent at `position`, which never goes back.
    fn at(&mut self, position: u64) -> Result<Extent> {
        loop {
            match self.current {
                Some(extent) if extent.end() > position => return Ok(extent),
                _ => {}
            }
            self.current = match self.known.next() {
                Some(extent) => Some(extent),
                None => {
                    let range = position..self.device.size;
                    self.known =
                        self.random.extents(self.device.id, range).in_file(&self.image.path)?.into_iter();
                    self.known.next()
                }
            };
        }
    }
}
