//! The driver of a format of one's own: *slab*, made up for this example.
//!
//! A slab image is a header, the 64 KiB slabs of the disk that hold anything, one after another in
//! the order in which they came, and a table that says where each slab of the disk stands. All
//! numbers are little-endian.
//!
//! | file offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic `SLABIMG1` |
//! | 8 | 8 | size of the disk in bytes |
//! | 16 | 8 | file offset of the table: one `u32` for each 64 KiB of the disk; 0 is a hole, *n* says that the slab stands at file offset *n* × 64 KiB |

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use imgtool_toolkit::{
    Access, BufferPool, Bytes, Capabilities, Confidence, CreateOptions, Device, DeviceId, Driver, Error,
    Extent, ExtentKind, ExtentList, Geometry, ImageInfo, ImageSink, ImageSource, Input, Manifest,
    OpenOptions, Output, Part, Piece, Prepared, RandomAccess, RandomInput, Result, WriteList,
};

const MAGIC: &[u8; 8] = b"SLABIMG1";
const HEADER_LEN: usize = 24;
const SLAB: u64 = 64 * 1024;
/// The largest disk. Ours: its table takes 64 MiB, and memory is to be bounded.
const MAX_DISK_SIZE: u64 = 1 << 40;
const DISK: DeviceId = DeviceId(0);

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

    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
        Ok(Box::new(SlabImage::open(input.into_random()?)?))
    }

    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>> {
        Ok(Box::new(SlabSink::create(output, manifest, options)?))
    }
}

/// An image that is read: by many threads at once, through `&self`.
struct SlabImage {
    info: ImageInfo,
    input: RandomInput,
    size: u64,
    table: Vec<u32>,
}

impl SlabImage {
    /// Parses, then validates, then constructs: nothing from the file is used before it is checked.
    fn open(input: RandomInput) -> Result<Self> {
        let header = input.read_vec(0, HEADER_LEN)?;
        let (magic, numbers) = header.split_at(8);
        if magic != MAGIC {
            return Err(Error::wrong_format("no slab image: another magic number").at(0));
        }
        let (words, _) = numbers.as_chunks::<8>();
        let [size, table_offset] = [u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])];
        if size > MAX_DISK_SIZE {
            return Err(Error::limit(format!("a disk of {size} bytes, at most {MAX_DISK_SIZE}")).at(8));
        }
        let table_len = size.div_ceil(SLAB) as usize * 4;
        let bytes = input.read_vec(table_offset, table_len)?;
        let table = bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
        let devices = vec![Device::disk(DISK.0, "disk", size)];
        let info = ImageInfo { format: "slab", devices, cluster_size: Some(SLAB), ..ImageInfo::default() };
        Ok(Self { info, input, size, table })
    }
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
        let mut extents = ExtentList::new();
        let mut at = range.start;
        while at < range.end && !extents.is_full() {
            let end = ((at / SLAB + 1) * SLAB).min(range.end);
            let is_hole = self.table[(at / SLAB) as usize] == 0;
            extents.push(at, end - at, if is_hole { ExtentKind::Hole } else { ExtentKind::Data });
            at = end;
        }
        Ok(extents.into_vec())
    }

    fn read_at(&self, device: DeviceId, mut buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset.checked_add(buf.len() as u64);
        if device != DISK || end.is_none_or(|end| end > self.size) {
            return Err(Error::out_of_bounds(format!("device {device} ends at {}", self.size)));
        }
        let mut at = guest_offset;
        while !buf.is_empty() {
            let within = at % SLAB;
            let len = buf.len().min((SLAB - within) as usize);
            let (part, rest) = buf.split_at_mut(len);
            match self.table[(at / SLAB) as usize] {
                0 => part.fill(0),
                slot => self.input.read_exact_at(part, u64::from(slot) * SLAB + within)?,
            }
            (buf, at) = (rest, at + len as u64);
        }
        Ok(())
    }
}

/// An image that is made: it says what is to be written where, the pipeline writes.
struct SlabSink {
    output: Output,
    size: u64,
    /// The table, and how many slabs it has placed.
    placed: Mutex<(Vec<u32>, u32)>,
}

impl SlabSink {
    fn create(output: Output, manifest: &Manifest, options: &CreateOptions) -> Result<Self> {
        let disk = manifest.single("slab")?;
        if options.compress.is_some() || disk.open_ended || output.is_stream() {
            return Err(Error::unsupported("slab: no compression, no pipes, no disks of unknown size"));
        }
        if disk.size > MAX_DISK_SIZE {
            return Err(Error::limit(format!("a disk of {} bytes, at most {MAX_DISK_SIZE}", disk.size)));
        }
        let table = vec![0; disk.size.div_ceil(SLAB) as usize];
        Ok(Self { output, size: disk.size, placed: Mutex::new((table, 0)) })
    }
}

impl ImageSink for SlabSink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: SLAB,
            granule_required: true,
            piece_len: 4 * SLAB,
            max_zero_len: u64::MAX,
            ordered: true,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    /// By many threads, without shared state: which slabs hold anything?
    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        let runs = piece.nonzero_runs(SLAB as usize);
        let mut prepared = Prepared::new(piece);
        for run in runs {
            for start in run.clone().step_by(SLAB as usize) {
                let bytes = start..run.end.min(start + SLAB as usize);
                let guest = prepared.start + start as u64..prepared.start + bytes.end as u64;
                prepared.parts.push(Part { guest, bytes: Bytes::Data(bytes) });
            }
        }
        Ok(prepared)
    }

    /// In the order of the source, so that the image is the same for any number of threads.
    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let (table, count) = &mut *placed;
        for part in &prepared.parts {
            *count += 1;
            table[(part.guest.start / SLAB) as usize] = *count;
            writes.push(u64::from(*count) * SLAB, part.bytes.clone());
        }
        Ok(())
    }

    /// The table, then the header: an image without one is no image.
    fn finish(&self) -> Result<()> {
        let placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let table: Vec<u8> = placed.0.iter().flat_map(|slot| slot.to_le_bytes()).collect();
        let table_offset = (u64::from(placed.1) + 1) * SLAB;
        self.output.set_len(table_offset + table.len() as u64)?;
        self.output.write_at(&table, table_offset)?;
        let header = [*MAGIC, self.size.to_le_bytes(), table_offset.to_le_bytes()].concat();
        self.output.write_at(&header, 0)
    }
}
