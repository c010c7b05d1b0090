//! Reading raw images: files and block devices by position, streams in one pass.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, ErrorKind, Extent, FileRange, ImageInfo, ImageSource, Input,
    Location, Loss, Losses, MapExtent, MapPlace, OpenOptions, Piece, RandomAccess, RandomInput, Result,
    Stream, StreamAccess,
};

/// The id of a raw image's only device.
const DISK: DeviceId = DeviceId(0);

/// Number of bytes read from a stream at a time. Our choice: 256 KiB fits into a core's cache.
const STREAM_PIECE: usize = 256 * 1024;

/// Opens an image: a stream is read in one pass, anything else by position.
///
/// With `salvage`, sectors of a file or block device that can't be read become zeros and are listed. A failed
/// read of a stream is an error: what follows can't be reached.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let mut disk = Device::disk(DISK.0, "disk", 0);
    if input.is_stream() {
        disk.open_ended = true;
        let stream = input.into_stream()?;
        let info = info(disk);
        return Ok(Arc::new(RawStream {
            info,
            pass: Mutex::new(Pass { stream, final_size: None, finished: false }),
        }));
    }
    let input = input.into_random()?;
    disk.size = input.len();
    let losses = options.salvage.then(Losses::default);
    Ok(Arc::new(RawImage { info: info(disk), input, losses }))
}

fn info(disk: Device) -> ImageInfo {
    ImageInfo { format: crate::FORMAT, devices: vec![disk], ..ImageInfo::default() }
}

/// A file or block device, read by position.
struct RawImage {
    info: ImageInfo,
    input: RandomInput,
    /// Sectors that salvage could not read; `None` without salvage.
    losses: Option<Losses>,
}

impl ImageSource for RawImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        self.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default()
    }
}

impl RandomAccess for RawImage {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.input.extents(range)
    }

    fn rough_extents(&self, _device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.input.extents_by(range, |position| {
            self.input.rough_run(position, (position / resolution + 1).saturating_mul(resolution))
        })
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let file: Arc<Location> = Arc::new(self.input.location().clone());
        let describe = |extent: Extent| MapExtent {
            // A hole has a file offset, as data does: guest and file offsets are equal.
            present: true,
            place: Some(MapPlace { file: Arc::clone(&file), file_offset: extent.start }),
            ..MapExtent::of(extent)
        };
        Ok(self.extents(device, range)?.into_iter().map(describe).collect())
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let read = self.input.read_exact_at(buf, guest_offset);
        let (Err(error), Some(losses)) = (&read, &self.losses) else { return read };
        if error.kind() != ErrorKind::Cancelled {
            self.input.read_salvage(buf, guest_offset, |lost, error| {
                losses.add(guest_offset + lost.start as u64..guest_offset + lost.end as u64, &error);
            });
            return Ok(());
        }
        read
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        self.input.granule()
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let file = self.input.file()?;
        Some(FileRange { file, file_offset: range.start, len: range.end - range.start })
    }
}

/// A pipe or a compressed file, read in one pass.
struct RawStream {
    info: ImageInfo,
    pass: Mutex<Pass>,
}

/// State of the one pass over a stream.
struct Pass {
    stream: Stream,
    /// Virtual size in bytes; `None` until the stream ends.
    final_size: Option<u64>,
    /// True once the caller has received the end of the stream.
    finished: bool,
}

impl ImageSource for RawStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }
}

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.finished {
            return Err(second_pass());
        }
        if self.final_size.is_some() {
            self.finished = true;
            return Ok(None);
        }
        let start = self.stream.position();
        let mut buffer = pool.take(STREAM_PIECE);
        let filled = self.stream.read_full(&mut buffer)?;
        if filled < STREAM_PIECE {
            self.final_size = Some(self.stream.position());
        }
        if filled == 0 {
            self.finished = true;
            return Ok(None);
        }
        buffer.truncate(filled);
        Ok(Some(Piece::data(DISK, start, buffer)))
    }

    fn in_order(&self) -> bool {
        true
    }

    fn final_size(&self, _device: DeviceId) -> Option<u64> {
        self.final_size
    }
}
