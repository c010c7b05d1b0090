//! The image below a new one: what it holds already is not stored again.

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{DeviceId, Error, ImageSource, Result, zero};

/// The backing file, if the caller opened it. Without it everything is stored, zeros as well, as
/// something else could show through.
pub struct Base {
    opened: Option<Opened>,
}

struct Opened {
    source: Arc<dyn ImageSource>,
    device: DeviceId,
    size: u64,
}

impl Base {
    /// Over an opened image, or over one of which nothing is known.
    pub fn new(source: Option<Arc<dyn ImageSource>>) -> Result<Self> {
        let Some(source) = source else { return Ok(Self { opened: None }) };
        let device = match source.info().devices.as_slice() {
            [device] if source.random().is_some() => device.clone(),
            _ => {
                return Err(Error::unsupported(
                    "the backing file must hold one device and be readable at random",
                ));
            }
        };
        Ok(Self { opened: Some(Opened { source, device: device.id, size: device.size }) })
    }

    /// Where, from `range.start` on, the base first differs from zeros that are to be stored; the
    /// answer is `range.start` itself when nothing is known.
    pub fn zeros_until(&self, range: Range<u64>) -> Result<u64> {
        let Some((opened, random)) = self.opened.as_ref().and_then(|o| Some((o, o.source.random()?))) else {
            return Ok(range.start);
        };
        let mut reached = range.start;
        while reached < range.end.min(opened.size) {
            for extent in random.extents(opened.device, reached..range.end.min(opened.size))? {
                if extent.is_data() {
                    return Ok(reached);
                }
                reached = extent.end();
            }
        }
        Ok(range.end)
    }

    /// Whether the base reads as `wanted` (`None`: zeros) in `range`; `scratch` holds as many bytes.
    pub fn matches(&self, range: Range<u64>, wanted: Option<&[u8]>, scratch: &mut [u8]) -> Result<bool> {
        let Some((opened, random)) = self.opened.as_ref().and_then(|o| Some((o, o.source.random()?))) else {
            return Ok(false);
        };
        let below = range.end.min(opened.size).saturating_sub(range.start);
        // `scratch` is as long as the range.
        let (known, beyond) = scratch.split_at_mut(below as usize);
        beyond.fill(0);
        if !known.is_empty() {
            random.read_at(opened.device, known, range.start)?;
        }
        Ok(match wanted {
            Some(wanted) => *scratch == *wanted,
            None => zero::is_zero(scratch),
        })
    }
}
