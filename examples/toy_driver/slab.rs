//! Driver of a custom format: *slab*, invented for this example.
//!
//! A slab image is a header and, at file offset 4096, the disk in one piece; zeros are holes in the file. The
//! header is the magic number `SLABIMG1` and the size of the disk in bytes, a little-endian `u64`.

use std::ops::Range;
use std::sync::Arc;

use imgtool::contracts::{
    Access, BufferPool, Capabilities, Confidence, Consumer, CreateOptions, Device, DeviceId, Driver, Error,
    Extent, Geometry, ImageInfo, ImageSink, ImageSource, ImageWriter, Input, Manifest, OpenOptions, Output,
    OutputFactory, OutputId, Prepared, RandomAccess, RandomInput, Result, SinkDevice, SinkPiece, WriteList,
};

const MAGIC: &[u8; 8] = b"SLABIMG1";
const SLAB: u64 = 4096; // file offset of the disk

pub struct SlabDriver;

impl Driver for SlabDriver {
    fn name(&self) -> &'static str {
        "slab"
    }

    fn description(&self) -> &'static str {
        "slab image, the format of an example"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["slab"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, write: true, size_multiple: 1, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(MAGIC).then_some(Confidence::Magic)
    }

    /// Parses, validates and constructs, in this order: no value from the file is used unchecked.
    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        let input = input.into_random()?;
        let header = input.read_vec(0, 16)?;
        let Some((MAGIC, [size, ..])) = header.split_first_chunk().map(|(m, rest)| (m, rest.as_chunks().0))
        else {
            return Err(Error::wrong_format("not a slab image: wrong magic number").at(0));
        };
        let size = u64::from_le_bytes(*size);
        if size.checked_add(SLAB).is_none_or(|end| end > input.len()) {
            return Err(Error::corrupt(format!("a disk of {size} bytes does not fit the file")).at(8));
        }
        let devices = vec![Device::disk(0, "disk", size)];
        let info = ImageInfo { format: "slab", devices, ..ImageInfo::default() };
        Ok(Arc::new(SlabImage { info, input }))
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        match options.compress {
            None => Ok(Box::new(SlabDriver)),
            Some(_) => Err(Error::unsupported("slab has no compression")),
        }
    }
}

/// An open image. Many threads read it concurrently, through `&self` and only within the bounds of its disk.
struct SlabImage {
    info: ImageInfo,
    input: RandomInput,
}

impl ImageSource for SlabImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl RandomAccess for SlabImage {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let in_file = self.input.extents(range.start + SLAB..range.end + SLAB)?;
        Ok(in_file.into_iter().map(|extent| Extent { start: extent.start - SLAB, ..extent }).collect())
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.input.read_exact_at(buf, SLAB + guest_offset)
    }
}

/// Creates images. If a format has options, its writer is a separate type that stores them.
impl ImageWriter for SlabDriver {
    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let (disk, output) = (manifest.single("slab")?, outputs.main()?);
        if disk.open_ended || output.is_stream() {
            return Err(Error::unsupported("slab: no pipes, and no disks of unknown size"));
        }
        Ok(Box::new(SlabSink { outputs: [output], size: disk.size }))
    }
}

/// A new image. It decides which bytes go to which file offset; the pipeline writes them.
struct SlabSink {
    outputs: [Output; 1],
    size: u64,
}

impl Consumer for SlabSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let (granule, piece_len) = (SLAB, 64 * SLAB);
        Geometry { granule, granule_required: false, piece_len, max_zero_len: u64::MAX, ordered: false }
    }

    /// Finds the bytes to write. Worker threads call this concurrently, so there is no shared state.
    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        let runs = piece.nonzero_runs(SLAB as usize);
        Ok(Prepared::sparse(piece, runs, self.outputs[0].needs_zeros()))
    }
}

impl ImageSink for SlabSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Assigns file offsets. They follow from the guest offsets, so calls may come in any order.
    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let parts = prepared.parts.iter();
        parts.for_each(|part| writes.push(OutputId::MAIN, SLAB + part.guest.start, part.bytes.clone()));
        Ok(())
    }

    /// Writes the header last, so that an unfinished file is not a valid image.
    fn finish(&self) -> Result<()> {
        self.outputs[0].set_len(SLAB + self.size)?;
        self.outputs[0].write_at(&[*MAGIC, self.size.to_le_bytes()].concat(), 0)
    }
}
