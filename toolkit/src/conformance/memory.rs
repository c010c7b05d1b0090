//! A source over an image by description.

use std::ops::Range;

use super::image::{Content, Image, Order, mix};
use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::source::{Access, ImageInfo, ImageSource, Piece, RandomAccess, SequentialAccess};
use crate::zero;

/// Bytes of a piece of a stream: a VMA cluster.
const STREAM_PIECE: u64 = 65_536;

/// Pieces that a shuffled stream mixes with each other: 4 MiB, the distance by which guest writes during
/// a backup bring clusters out of order.
const SHUFFLE_WINDOW: usize = 64;

/// A source that computes its bytes from an [`Image`], whatever its size, without storing them.
pub struct MemorySource {
    info: ImageInfo,
    contents: Vec<Content>,
    sizes: Vec<u64>,
    order: Order,
    /// Index of the device and start of each remaining piece of a stream, last piece first.
    pieces: Vec<(usize, u64)>,
}

impl MemorySource {
    /// Creates a source over `image`.
    pub fn new(image: &Image) -> Self {
        let info = ImageInfo {
            format: "memory",
            devices: image.devices.iter().map(|(device, _)| device.clone()).collect(),
            attachments: image.attachments.clone(),
            ..ImageInfo::default()
        };
        Self {
            sizes: image.devices.iter().map(|(device, _)| device.size).collect(),
            contents: image.devices.iter().map(|(_, content)| content.clone()).collect(),
            info,
            order: image.order,
            pieces: stream_order(image),
        }
    }

    /// Hides the sizes until the end of the stream, as a pipe without a header does.
    #[must_use]
    pub fn open_ended(mut self) -> Self {
        for device in &mut self.info.devices {
            device.open_ended = true;
            device.size = 0;
        }
        self
    }

    fn content(&self, device: DeviceId) -> Result<(&Content, u64)> {
        let index = device.0 as usize;
        match (self.contents.get(index), self.sizes.get(index)) {
            (Some(content), Some(size)) => Ok((content, *size)),
            _ => Err(Error::out_of_bounds(format!("no device {device}"))),
        }
    }
}

/// Returns the pieces of a stream, last first.
fn stream_order(image: &Image) -> Vec<(usize, u64)> {
    if image.order == Order::Random {
        return Vec::new();
    }
    let starts = |size: u64| (0..size).step_by(STREAM_PIECE as usize);
    let mut pieces: Vec<(usize, u64)> = image
        .devices
        .iter()
        .enumerate()
        .flat_map(|(index, (device, _))| starts(device.size).map(move |start| (index, start)))
        .collect();
    if image.order == Order::Shuffled {
        pieces.sort_by_key(|(index, start)| (*start, *index));
        for window in pieces.chunks_mut(SHUFFLE_WINDOW) {
            window.sort_by_key(|(index, start)| mix(*start ^ (*index as u64) << 40));
        }
    }
    pieces.reverse();
    pieces
}

impl ImageSource for MemorySource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        match self.order {
            Order::Random => Access::Random(self),
            Order::Stream | Order::Shuffled => Access::Sequential(self),
        }
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        match self.order {
            Order::Random => Some(self),
            Order::Stream | Order::Shuffled => None,
        }
    }
}

impl RandomAccess for MemorySource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        Ok(self.content(device)?.0.extents(range))
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let (content, size) = self.content(device)?;
        if guest_offset.checked_add(buf.len() as u64).is_none_or(|end| end > size) {
            return Err(Error::out_of_bounds(format!("{} bytes at {guest_offset} of {size}", buf.len())));
        }
        content.read(buf, guest_offset);
        Ok(())
    }
}

impl SequentialAccess for MemorySource {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        let Some((index, start)) = self.pieces.pop() else { return Ok(None) };
        let len = STREAM_PIECE.min(self.sizes[index] - start);
        let device = DeviceId(u32::try_from(index).expect("a handful of devices"));
        let content = &self.contents[index];
        if content.is_zero(&(start..start + len)) {
            return Ok(Some(Piece::zero(device, start, len)));
        }
        let mut buffer = pool.take(len as usize);
        content.read(&mut buffer, start);
        let mut runs = Vec::new();
        zero::push_nonzero_runs(&buffer, 0..buffer.len(), zero::ZERO_GRANULARITY, &mut runs);
        Ok(Some(Piece { runs, ..Piece::data(device, start, buffer) }))
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        let open_ended = self.info.device(device).is_some_and(|device| device.open_ended);
        self.sizes.get(device.0 as usize).copied().filter(|_| open_ended)
    }
}
