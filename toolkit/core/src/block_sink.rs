//! [`BlockSink`], a writer of images that store their disk in blocks of one size and list their places in a
//! table.
//!
//! In a dynamic image, the sink allocates a block at the end of the file when the block's first data arrives.
//! The file grows by the whole block, but only the data is written; the rest of the block is a hole, or
//! zeroed if the target already exists. In a fixed image, every block has its place from the start. An image
//! over a parent contains the blocks that differ from the parent, as a whole. A driver implements
//! [`BlockLayout`]: the offsets, the entries of its table, and its headers.

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;

use crate::base::{self, Base};
use crate::buffer::BufferPool;
use crate::device::{Device, OutputId, SinkDevice};
use crate::driver::Measure;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::output::Output;
use crate::sink::{Bytes, Consumer, Geometry, ImageSink, Part, Prepared, Sharing, WriteList};
use crate::source::{ImageSource, SinkPiece, for_each_extent};
use crate::sync::lock;
use crate::table::TableWriter;
use crate::zero::ZERO_GRANULARITY;

/// Length in bytes of a piece. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;

/// The layout of a new image: where its blocks, its table and its headers are.
pub trait BlockLayout: Send + Sync {
    /// Returns the size of a block in guest bytes.
    fn block_size(&self) -> u64;

    /// Returns the file offset of the data of a block. `position` counts the blocks in the file from 0.
    fn data_offset(&self, position: u64) -> u64;

    /// Returns the bytes that precede the data of every block in the file, such as a bitmap of its sectors.
    fn block_head(&self) -> &[u8] {
        &[]
    }

    /// True if the data of blocks is aligned well enough for a file system to share it with a source.
    fn is_aligned(&self) -> bool;

    /// Returns the position in the file of the block `index` of the disk, from its entry in the table;
    /// `None` if the block is not allocated.
    ///
    /// # Errors
    /// Any error of the table.
    fn position(&self, table: &mut TableWriter, index: u64) -> Result<Option<u64>>;

    /// Enters the block `index` of the disk into the table.
    ///
    /// # Errors
    /// Any error of the table.
    fn allocate(&self, table: &mut TableWriter, index: u64, position: u64) -> Result<()>;

    /// Enters the block `index` of the disk as zeros, which hide the parent. Called only with
    /// [`BlockSink::over`].
    ///
    /// # Errors
    /// Any error of the table; [`crate::ErrorKind::Unsupported`] by default.
    fn set_zero(&self, _table: &mut TableWriter, index: u64) -> Result<()> {
        Err(Error::unsupported(format!("the format has no entry for block {index} of zeros")))
    }

    /// Writes everything but the blocks and the table: the headers, the first bytes of the file last. The
    /// file contains `blocks` blocks; its length is the end of the last one.
    ///
    /// # Errors
    /// Any error of writing.
    fn finish(&self, output: &Output, blocks: u64, fingerprint: &Fingerprint) -> Result<()>;

    /// Returns notes for the user about the image.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// An image being written.
pub struct BlockSink<L> {
    outputs: [Output; 1],
    /// Size of the device in bytes, before the format rounds it up.
    device_size: u64,
    /// True if the image contains every block, in the order of the disk.
    fixed: bool,
    /// Length in bytes of the shortest run of zeros that becomes a hole; `None` if all zeros are stored.
    zero_unit: Option<u64>,
    /// Content of the parent, for an image that stores only what differs.
    base: Option<Base>,
    layout: L,
    fingerprint: Fingerprint,
    allocation: Mutex<Allocation>,
}

impl<L> fmt::Debug for BlockSink<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockSink").field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

/// The blocks allocated so far.
struct Allocation {
    table: TableWriter,
    blocks: u64,
}

/// Settings of a new image that all formats have.
#[derive(Debug, Clone, Copy)]
pub struct BlockSettings {
    /// Size of the device in bytes, before the format rounds it up.
    pub device_size: u64,
    /// True if the image contains every block, in the order of the disk.
    pub fixed: bool,
    /// Length in bytes of the shortest run of zeros that becomes a hole: a power of two from 4 KiB to 2 MiB.
    /// `None` if all zeros are stored like data.
    pub zero_unit: Option<u64>,
}

/// Predicts the size of an image of blocks created from the device of `source`. `file_len` returns the length
/// in bytes of a file with this number of blocks. For a dynamic image, `required` includes every block that a
/// data extent of the source touches, even if the block contains only zeros.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] for a stream, whose extents are unknown; any error of the source.
pub fn measure(
    source: &dyn ImageSource,
    device: &Device,
    settings: BlockSettings,
    block_size: u64,
    file_len: impl Fn(u64) -> u64,
) -> Result<Measure> {
    let fully_allocated = file_len(device.size.div_ceil(block_size));
    if settings.zero_unit.is_none() {
        return Ok(Measure {
            required: fully_allocated,
            fully_allocated,
            occupied: device.size,
            ..Measure::default()
        });
    }
    let Some(random) = source.access().random() else {
        if settings.fixed {
            return Ok(Measure {
                required: fully_allocated,
                fully_allocated,
                occupied: 0,
                ..Measure::default()
            });
        }
        return Err(Error::unsupported("a stream can't be measured").hint("save it to a file first"));
    };
    let (mut blocks, mut next_block, mut occupied) = (0, 0, 0);
    for_each_extent(random, device.id, 0..device.size, |extent| {
        if extent.is_data() {
            occupied += extent.len;
            let first = (extent.start / block_size).max(next_block);
            let end = extent.end().div_ceil(block_size);
            blocks += end.saturating_sub(first);
            next_block = next_block.max(end);
        }
        Ok(())
    })?;
    // Unwritten parts of blocks are holes, even in a fixed file.
    let required = if settings.fixed { fully_allocated } else { file_len(blocks) };
    Ok(Measure { required, fully_allocated, occupied, ..Measure::default() })
}

impl<L: BlockLayout> BlockSink<L> {
    /// Creates a sink that writes to `output`. `table` lists no block yet.
    pub fn new(output: Output, table: TableWriter, layout: L, settings: BlockSettings) -> Self {
        let BlockSettings { device_size, fixed, zero_unit } = settings;
        let allocation = Mutex::new(Allocation { table, blocks: 0 });
        let fingerprint = Fingerprint::default();
        Self { outputs: [output], device_size, fixed, zero_unit, base: None, layout, fingerprint, allocation }
    }

    /// Leaves out the blocks in which the disk equals `base`, unless all zeros are stored. Blocks have at most
    /// 2 MiB.
    pub fn over(self, base: Base) -> Self {
        Self { base: Some(base).filter(|_| self.zero_unit.is_some()), ..self }
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    fn add_to_fingerprint(&self, piece: &SinkPiece, nonzero: &[Range<usize>]) {
        let Some(data) = &piece.data else { return };
        for run in nonzero {
            self.fingerprint.add(piece.start + run.start as u64, &data[run.clone()]);
        }
    }

    /// Adds the content to the fingerprint, and returns the piece with the runs to store. The fingerprint
    /// depends on the content alone, not on which zeros are stored.
    fn runs_to_store(&self, piece: SinkPiece, pool: &BufferPool) -> (SinkPiece, Vec<Range<usize>>) {
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        self.add_to_fingerprint(&piece, &nonzero);
        match self.zero_unit {
            None => {
                let piece = piece.with_zeros_as_data(pool);
                let runs = piece.runs.clone();
                (piece, runs)
            }
            Some(unit) if unit as usize > ZERO_GRANULARITY => {
                let runs = piece.nonzero_runs(unit as usize);
                (piece, runs)
            }
            Some(_) => (piece, nonzero),
        }
    }

    /// Cuts a run of the piece that starts at guest offset `start` into parts. Neighbouring blocks may be far
    /// apart in the file, so no part crosses the end of a block.
    fn cut(&self, start: u64, run: Range<usize>, parts: &mut Vec<Part>) {
        let block_size = self.layout.block_size();
        let mut at = run.start;
        while at < run.end {
            let guest = start + at as u64;
            let block_rest = block_size - guest % block_size;
            let len = usize::try_from(block_rest).unwrap_or(usize::MAX).min(run.end - at);
            parts.push(Part { guest: guest..guest + len as u64, bytes: Bytes::Data(at..at + len) });
            at += len;
        }
    }

    /// Returns the file offset of the data of the block `index` of the disk. Allocates the block at the end
    /// of the file if the file does not contain it.
    fn block_data(&self, allocation: &mut Allocation, index: u64, writes: &mut WriteList) -> Result<u64> {
        if self.fixed {
            return Ok(self.layout.data_offset(index));
        }
        if let Some(position) = self.layout.position(&mut allocation.table, index)? {
            return Ok(self.layout.data_offset(position));
        }
        let position = allocation.blocks;
        allocation.blocks += 1;
        self.layout.allocate(&mut allocation.table, index, position)?;
        let data_offset = self.layout.data_offset(position);
        if self.output().needs_zeros() {
            // Zero the block now: other threads may write data to it as soon as it has an offset.
            self.output().write_zeros_at(data_offset, self.layout.block_size())?;
        }
        let head = self.layout.block_head();
        if !head.is_empty() {
            writes.push(OutputId::MAIN, data_offset - head.len() as u64, Bytes::Owned(head.to_vec()));
        }
        Ok(data_offset)
    }
}

impl<L: BlockLayout> Consumer for BlockSink<L> {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let piece_len = PIECE_LEN.max(self.zero_unit.unwrap_or(0));
        // A unit of zero detection is stored or left out as a whole.
        let granule = self.zero_unit.unwrap_or(0).max(ZERO_GRANULARITY as u64);
        if self.base.is_some() {
            // So is a block over a parent.
            let granule = granule.max(self.layout.block_size());
            let piece_len = piece_len.max(granule);
            let max_zero_len = base::MAX_ZERO_LEN;
            return Geometry { granule, granule_required: true, piece_len, max_zero_len, ordered: true };
        }
        Geometry {
            granule,
            granule_required: false,
            piece_len,
            max_zero_len: if self.zero_unit.is_some() { u64::MAX } else { piece_len },
            ordered: !self.fixed,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        if let (Some(base), Some(zero_unit)) = (&self.base, self.zero_unit) {
            self.add_to_fingerprint(&piece, &piece.nonzero_runs(ZERO_GRANULARITY));
            let block_size = self.layout.block_size();
            // At most 2 MiB.
            let parts = base.differences(&piece, block_size, zero_unit.max(block_size) as usize, pool)?;
            let parts = without_zeros(parts, piece.start, &piece.nonzero_runs(zero_unit as usize));
            return Ok(Prepared { parts: base::cut(parts, block_size), ..Prepared::new(piece) });
        }
        let (piece, runs) = self.runs_to_store(piece, pool);
        let (start, end) = (piece.start, piece.end());
        let mut parts = Vec::new();
        for run in runs {
            self.cut(start, run, &mut parts);
        }
        if self.fixed && self.output().needs_zeros() {
            parts = fill_gaps(parts, start, end);
        }
        Ok(Prepared { parts, ..Prepared::new(piece) })
    }

    fn worker_memory(&self) -> u64 {
        // A piece is compared with a buffer of the base, of a block or a unit of zeros.
        let buffer = self.layout.block_size().max(self.zero_unit.unwrap_or(0));
        self.base.as_ref().map_or(0, |base| base.reader_memory() + buffer)
    }
}

impl<L: BlockLayout> ImageSink for BlockSink<L> {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        if self.fixed || self.zero_unit.is_none() || !self.layout.is_aligned() {
            Sharing::Never
        } else {
            Sharing::Parts(OutputId::MAIN)
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let block_size = self.layout.block_size();
        let mut allocation = lock(&self.allocation);
        for part in &prepared.parts {
            let index = part.guest.start / block_size;
            if self.base.is_some() && matches!(part.bytes, Bytes::Zero(_)) {
                self.layout.set_zero(&mut allocation.table, index)?;
                continue;
            }
            let data_offset = self.block_data(&mut allocation, index, writes)?;
            writes.push(OutputId::MAIN, data_offset + part.guest.start % block_size, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut allocation = lock(&self.allocation);
        if self.fixed {
            allocation.blocks = self.device_size.div_ceil(self.layout.block_size());
            for index in 0..allocation.blocks {
                self.layout.allocate(&mut allocation.table, index, index)?;
            }
        }
        allocation.table.finish()?;
        let blocks = allocation.blocks;
        // The offset of the block after the last, without its head.
        let end = self.layout.data_offset(blocks) - self.layout.block_head().len() as u64;
        if self.fixed {
            let data_end = self.layout.data_offset(0) + self.device_size;
            self.output().write_zeros_at(data_end, end - data_end)?;
        }
        self.output().set_len(end)?;
        self.layout.finish(self.output(), blocks, &self.fingerprint)
    }

    fn notes(&self) -> Vec<String> {
        self.layout.notes()
    }
}

/// Limits the data of `parts` to `runs`, which count from the start of the piece at guest offset `start`. The
/// rest of a stored block reads as zeros.
fn without_zeros(parts: Vec<Part>, start: u64, runs: &[Range<usize>]) -> Vec<Part> {
    let mut kept = Vec::new();
    for part in parts {
        let Bytes::Data(data) = &part.bytes else {
            kept.push(part);
            continue;
        };
        let first = runs.partition_point(|run| run.end <= data.start);
        for run in runs[first..].iter().take_while(|run| run.start < data.end) {
            let run = run.start.max(data.start)..run.end.min(data.end);
            let guest = start + run.start as u64..start + run.end as u64;
            kept.push(Part { guest, bytes: Bytes::Data(run) });
        }
    }
    kept
}

/// Fills the gaps around `parts`, from guest offset `start` to `end`, with parts of zeros.
fn fill_gaps(parts: Vec<Part>, start: u64, end: u64) -> Vec<Part> {
    let zeros = |guest: Range<u64>| Part { bytes: Bytes::Zero(guest.end - guest.start), guest };
    let mut filled = Vec::new();
    let mut position = start;
    for part in parts {
        if position < part.guest.start {
            filled.push(zeros(position..part.guest.start));
        }
        position = part.guest.end;
        filled.push(part);
    }
    if position < end {
        filled.push(zeros(position..end));
    }
    filled
}
