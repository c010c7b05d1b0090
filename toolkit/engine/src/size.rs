//! Another size for a disk on its way: zeros are added, and only zeros are cut off.
//!
//! A disk that is read by position is checked before the copy. A stream is checked while it passes, so the
//! error comes before the outputs get their names.

use std::sync::Arc;

use imgtool_core::{
    BufferPool, CancelToken, Device, DeviceId, Disk, Error, ImageSource, Piece, Result, StreamAccess, zero,
};

use crate::filtered::{Filter, Filtered};
use crate::resized::Resized;

/// Length in bytes of a read. Our choice: fits into the cache of one core.
const STEP: u64 = 256 * 1024;

/// Maximum length in bytes of a piece of zeros. Our limit: a sink that accepts 256 KiB at a time queues 2^18
/// parts of a piece.
const MAX_ZERO_PIECE: u64 = 64 << 30;

/// Returns `image` with `size` bytes for the disk `device`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the rest of the disk holds data. A stream fails so when it is
/// read.
pub fn change(
    image: Arc<dyn ImageSource>,
    device: DeviceId,
    size: u64,
    cancel: &CancelToken,
) -> Result<Arc<dyn ImageSource>> {
    if image.access().is_stream() {
        return Ok(of_stream(image, device, size));
    }
    let disk = Disk::new(Arc::clone(&image), device)?;
    if let Some(offset) = first_data(&disk, size, cancel)? {
        return Err(holds_data(disk.name(), size, offset));
    }
    // Salvage fills what it can't read with zeros.
    let lost = image.losses().into_iter().find(|loss| loss.device == device && loss.guest.end > size);
    if let Some(loss) = lost {
        return Err(Error::refused(format!("what would be cut off beyond {size} bytes can't be read"))
            .device(disk.name())
            .guest(loss.guest)
            .hint("keep the size: that part may hold data"));
    }
    Ok(Arc::new(Resized::new(image, device, size)))
}

fn of_stream(image: Arc<dyn ImageSource>, device: DeviceId, size: u64) -> Arc<dyn ImageSource> {
    let mut info = image.info().clone();
    let mut resizer = Resizer { device, name: String::new(), size, known: None, read: 0, padding: None };
    for known in info.devices.iter_mut().filter(|known| known.id == device) {
        resizer.name.clone_from(&known.name);
        resizer.known = (!known.open_ended).then_some(known.size);
        *known = Device { size, open_ended: false, ..known.clone() };
    }
    Arc::new(Filtered::new(image, info, resizer))
}

/// Returns the error for data behind the new end of a disk.
fn holds_data(name: &str, size: u64, offset: u64) -> Error {
    Error::refused(format!("the disk holds data beyond {size} bytes, at guest byte {offset}"))
        .device(name)
        .hint("shrink its partitions and file systems in the guest first")
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
                if let Some(first) = first_nonzero(part) {
                    return Ok(Some(at + first as u64));
                }
                at += len;
            }
            position = extent.end();
        }
    }
    Ok(None)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if zero::is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

/// Changes the size of a disk of a stream.
struct Resizer {
    device: DeviceId,
    name: String,
    /// New size in bytes.
    size: u64,
    /// Size in bytes that the disk has in the stream; `None` if only the end of the stream tells it.
    known: Option<u64>,
    /// Size of the disk as far as it was read.
    read: u64,
    /// Offset from which zeros are still to be added; `None` before the end of the stream.
    padding: Option<u64>,
}

impl Resizer {
    /// Returns the part of a piece before the new end, if there is one. The rest must be zero.
    fn front(&self, mut piece: Piece) -> Result<Option<Piece>> {
        let kept = self.size.saturating_sub(piece.start).min(piece.len);
        if let Some(data) = &mut piece.data {
            // A piece fits into memory.
            let end = usize::try_from(kept).unwrap_or(usize::MAX).min(data.len());
            if let Some(first) = first_nonzero(&data[end..]) {
                return Err(holds_data(&self.name, self.size, piece.start + kept + first as u64));
            }
            data.truncate(end);
            piece.runs.retain(|run| run.start < end);
            piece.runs.iter_mut().for_each(|run| run.end = run.end.min(end));
        }
        piece.len = kept;
        Ok((kept > 0).then_some(piece))
    }

    /// Returns the next zeros behind the end of a disk that is too short.
    fn pad(&mut self) -> Option<Piece> {
        let start = *self.padding.get_or_insert(self.known.unwrap_or(self.read).min(self.size));
        let len = self.size.saturating_sub(start).min(MAX_ZERO_PIECE);
        self.padding = Some(start + len);
        (len > 0).then(|| Piece::zero(self.device, start, len))
    }
}

impl Filter for Resizer {
    fn next_piece(&mut self, stream: &mut dyn StreamAccess, pool: &BufferPool) -> Result<Option<Piece>> {
        while self.padding.is_none() {
            let Some(piece) = stream.next_piece(pool)? else { break };
            if piece.device != self.device {
                return Ok(Some(piece));
            }
            self.read = self.read.max(piece.end());
            if let Some(piece) = self.front(piece)? {
                return Ok(Some(piece));
            }
        }
        Ok(self.pad())
    }

    fn final_size(&self, device: DeviceId, told: Option<u64>) -> Option<u64> {
        told.filter(|_| device != self.device)
    }

    fn notes(&self) -> Vec<String> {
        let (old, new) = (self.read, self.size);
        if self.known.is_some() || old == new {
            return Vec::new();
        }
        vec![match old > new {
            true => format!("the disk was cut from {old} to {new} bytes; the rest was zero"),
            false => format!("the disk grew from {old} to {new} bytes"),
        }]
    }
}
