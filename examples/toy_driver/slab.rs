//! Driver of a custom format: *slab*, invented for this example.
//!
//! A slab image is a header and, at file offset 4096, the disk in one piece; zeros are holes of the file.
//! The header is the magic `SLABIMG1` and the size of the disk in bytes, a little-endian `u64`.

use std::ops::Range;

use imgtool_toolkit::{
    Access, BufferPool, Capabilities, Confidence, CreateOptions, Device, DeviceId, Driver, Error, Extent,
    Geometry, ImageInfo, ImageSink, ImageSource, Input, Manifest, OpenOptions, Output, Piece, Prepared,
    RandomAccess, RandomInput, Result, WriteList,
};

const MAGIC: &[u8; 8] = b"SLABIMG1";
/// File offset of the disk.
const SLAB: u64 = 4096;

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
        Capabilities { read: true, write: true, max_devices: 1, size_multiple: 1, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(MAGIC).then_some(Confidence::Magic)
    }

    /// Parses, validates and constructs, in this order: no value from the file is used unchecked.
    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
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
        Ok(Box::new(SlabImage { info, input, size }))
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        let disk = manifest.single("slab")?;
        if options.compress.is_some() || disk.open_ended || output.is_stream() {
            return Err(Error::unsupported("slab: no compression, no pipes, no disks of unknown size"));
        }
        Ok(Box::new(SlabSink { output, size: disk.size }))
    }
}

/// An open image. Many threads read it concurrently, through `&self`.
struct SlabImage {
    info: ImageInfo,
    input: RandomInput,
    size: u64,
}

impl ImageSource for SlabImage {
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

impl RandomAccess for SlabImage {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let in_file = self.input.extents(range.start + SLAB..range.end + SLAB)?;
        Ok(in_file.into_iter().map(|extent| Extent { start: extent.start - SLAB, ..extent }).collect())
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset.checked_add(buf.len() as u64);
        if device != DeviceId(0) || end.is_none_or(|end| end > self.size) {
            return Err(Error::out_of_bounds(format!("device {device} ends at {}", self.size)));
        }
        self.input.read_exact_at(buf, SLAB + guest_offset)
    }
}

/// A new image. It says what to write where; the pipeline writes.
struct SlabSink {
    output: Output,
    size: u64,
}

impl ImageSink for SlabSink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        let (granule, piece_len) = (SLAB, 64 * SLAB);
        Geometry { granule, granule_required: false, piece_len, max_zero_len: u64::MAX, ordered: false }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    /// Finds the bytes to write. Many threads call this concurrently, without shared state.
    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        let runs = piece.nonzero_runs(SLAB as usize);
        Ok(Prepared::sparse(piece, runs, self.output.needs_zeros()))
    }

    /// Assigns file offsets. Calls come in the order of the source.
    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        prepared.parts.iter().for_each(|part| writes.push(SLAB + part.guest.start, part.bytes.clone()));
        Ok(())
    }

    /// Writes the header last, so that an unfinished file is not a valid image.
    fn finish(&self) -> Result<()> {
        self.output.set_len(SLAB + self.size)?;
        self.output.write_at(&[*MAGIC, self.size.to_le_bytes()].concat(), 0)
    }
}
