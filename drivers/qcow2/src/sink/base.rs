//! Backing file of a new image, of which only the difference is stored.

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{DeviceId, Error, ImageSource, Result, zero};

/// Backing file, if the caller opened it. If not, everything is stored, zeros included, as the content
/// of the backing file is unknown.
pub struct Base {
    image: Option<BaseImage>,
}

/// Opened backing file.
struct BaseImage {
    source: Arc<dyn ImageSource>,
    device: DeviceId,
    size: u64,
}

impl Base {
    /// Creates the base from the opened backing file, which must hold one device.
    pub fn new(source: Option<Arc<dyn ImageSource>>) -> Result<Self> {
        let Some(source) = source else { return Ok(Self { image: None }) };
        let device = match source.info().devices.as_slice() {
            [device] if source.random().is_some() => device.clone(),
            _ => {
                return Err(Error::unsupported(
                    "the backing file must hold one device and be readable at random",
                ));
            }
        };
        Ok(Self { image: Some(BaseImage { source, device: device.id, size: device.size }) })
    }

    /// Returns the guest offset in `range` up to which the base reads as zeros: `range.start` if its content
    /// is unknown, `range.end` if all of it does.
    pub fn zeros_until(&self, range: Range<u64>) -> Result<u64> {
        let Some((image, random)) = self.image.as_ref().and_then(|o| Some((o, o.source.random()?))) else {
            return Ok(range.start);
        };
        let mut reached = range.start;
        while reached < range.end.min(image.size) {
            for extent in random.extents(image.device, reached..range.end.min(image.size))? {
                if extent.is_data() {
                    return Ok(reached);
                }
                reached = extent.end();
            }
        }
        Ok(range.end)
    }

    /// True if the base reads as `expected` (`None` for zeros) in `range`. `scratch` is a buffer of the
    /// range's length.
    pub fn matches(&self, range: Range<u64>, expected: Option<&[u8]>, scratch: &mut [u8]) -> Result<bool> {
        let Some((image, random)) = self.image.as_ref().and_then(|o| Some((o, o.source.random()?))) else {
            return Ok(false);
        };
        let covered = range.end.min(image.size).saturating_sub(range.start);
        // At most the length of `scratch`.
        let (known, beyond) = scratch.split_at_mut(covered as usize);
        beyond.fill(0);
        if !known.is_empty() {
            random.read_at(image.device, known, range.start)?;
        }
        Ok(match expected {
            Some(expected) => *scratch == *expected,
            None => zero::is_zero(scratch),
        })
    }
}
