//! A source whose content is computed from a description.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::{
    Access, BufferPool, DeviceId, Error, Extent, ImageInfo, ImageSource, Piece, RandomAccess, Result,
    StreamAccess, zero,
};

use super::image::{Content, Image, Order, mix};

/// Length in bytes of a piece of a stream: one VMA cluster.
const STREAM_PIECE: u64 = 65_536;

/// Number of pieces within which a shuffled stream changes the order: 4 MiB, the distance by which guest
/// writes during a backup displace clusters.
const SHUFFLE_WINDOW: usize = 64;

/// A source that computes its bytes from an [`Image`] of any size, without storing them.
#[derive(Debug)]
pub struct MemorySource {
    info: ImageInfo,
    disks: Arc<[MemoryDisk]>,
    order: Order,
    stream: Mutex<MemoryStream>,
}

#[derive(Debug)]
struct MemoryDisk {
    size: u64,
    content: Content,
}

/// The remaining pieces of a stream.
#[derive(Debug)]
struct MemoryStream {
    disks: Arc<[MemoryDisk]>,
    /// Device index and start of each remaining piece, last piece first.
    pieces: Vec<(usize, u64)>,
    open_ended: bool,
    finished: bool,
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
        let disks = image.devices.iter();
        let disks: Arc<[MemoryDisk]> = disks
            .map(|(device, content)| MemoryDisk { size: device.size, content: content.clone() })
            .collect();
        let stream = MemoryStream {
            disks: Arc::clone(&disks),
            pieces: stream_order(image),
            open_ended: false,
            finished: false,
        };
        Self { info, disks, order: image.order, stream: Mutex::new(stream) }
    }

    /// Hides the sizes until the end of the stream, like a pipe without a header.
    #[must_use]
    pub fn open_ended(mut self) -> Self {
        for device in &mut self.info.devices {
            device.open_ended = true;
            device.size = 0;
        }
        imgtool_core::sync::get_mut(&mut self.stream).open_ended = true;
        self
    }

    fn content(&self, device: DeviceId) -> Result<&Content> {
        let disk = self.disks.get(device.0 as usize);
        disk.map(|disk| &disk.content).ok_or_else(|| Error::out_of_bounds(format!("no device {device}")))
    }
}

/// Returns the device index and start of each piece of a stream, last piece first. Empty if the image is read
/// by position.
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

    fn access(&self) -> Access<'_> {
        match self.order {
            Order::Random => Access::Random(self),
            Order::Stream | Order::Shuffled => Access::Stream(&self.stream),
        }
    }
}

impl RandomAccess for MemorySource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        Ok(self.content(device)?.extents(range))
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.content(device)?.read(buf, guest_offset);
        Ok(())
    }
}

impl StreamAccess for MemoryStream {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.finished {
            return Err(second_pass());
        }
        let Some((index, start)) = self.pieces.pop() else {
            self.finished = true;
            return Ok(None);
        };
        let disk = &self.disks[index];
        let len = STREAM_PIECE.min(disk.size - start);
        let device = DeviceId(u32::try_from(index).expect("a handful of devices"));
        if disk.content.is_zero(&(start..start + len)) {
            return Ok(Some(Piece::zero(device, start, len)));
        }
        let mut buffer = pool.take(len as usize);
        disk.content.read(&mut buffer, start);
        let mut runs = Vec::new();
        zero::push_nonzero_runs(&buffer, 0..buffer.len(), zero::ZERO_GRANULARITY, &mut runs);
        Ok(Some(Piece { runs, ..Piece::data(device, start, buffer) }))
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        self.disks.get(device.0 as usize).map(|disk| disk.size).filter(|_| self.open_ended)
    }
}
