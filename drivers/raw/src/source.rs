//! Reading raw images: files and block devices at random, streams in one pass.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::{
    Access, BufferPool, Device, DeviceId, Error, Extent, FileRange, ImageInfo, ImageSource, Input, MapExtent,
    MapPlace, Piece, RandomAccess, RandomInput, Result, SequentialAccess, Stream,
};

/// The id of a raw image's only device.
const DISK: DeviceId = DeviceId(0);

/// Bytes read from a stream at a time. Our choice: 256 KiB fit a core's cache.
const STREAM_PIECE: usize = 256 * 1024;

/// Opens an image: a stream is read in one pass, anything else by position.
pub(crate) fn open(input: Input) -> Result<Box<dyn ImageSource>> {
    let mut disk = Device::disk(DISK.0, "disk", 0);
    if input.is_stream() {
        disk.open_ended = true;
        let stream = input.into_stream()?;
        let info = info(disk);
        return Ok(Box::new(RawStream { info, stream, final_size: None }));
    }
    let input = input.into_random()?;
    disk.size = input.len();
    Ok(Box::new(RawImage { info: info(disk), input }))
}

fn info(disk: Device) -> ImageInfo {
    ImageInfo { format: crate::FORMAT, devices: vec![disk], ..ImageInfo::default() }
}

/// A file or block device, read by position.
struct RawImage {
    info: ImageInfo,
    input: RandomInput,
}

impl ImageSource for RawImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        Access::Random(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        Some(self)
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
        let file: Arc<Path> = self.input.path().into();
        let describe = |extent: Extent| MapExtent {
            // Holes have a file offset, too: guest and file offsets are the same.
            present: true,
            place: Some(MapPlace { file: Arc::clone(&file), file_offset: extent.start }),
            ..MapExtent::of(extent)
        };
        Ok(self.extents(device, range)?.into_iter().map(describe).collect())
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        if device != DISK {
            return Err(Error::out_of_bounds(format!("a raw image has one device, {DISK}, not {device}")));
        }
        self.input.read_exact_at(buf, guest_offset)
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
    stream: Stream,
    /// Guest bytes; `None` until the stream ends.
    final_size: Option<u64>,
}

impl ImageSource for RawStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        Access::Sequential(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        None
    }
}

impl SequentialAccess for RawStream {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.final_size.is_some() {
            return Ok(None);
        }
        let start = self.stream.position();
        let mut buffer = pool.take(STREAM_PIECE);
        let filled = self.stream.read_full(&mut buffer)?;
        if filled < STREAM_PIECE {
            self.final_size = Some(self.stream.position());
        }
        if filled == 0 {
            return Ok(None);
        }
        buffer.truncate(filled);
        Ok(Some(Piece::data(DISK, start, buffer)))
    }

    fn final_size(&self, _device: DeviceId) -> Option<u64> {
        self.final_size
    }
}
