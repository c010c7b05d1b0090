//! [`ChildSink`], a writer of differencing images: the blocks of the disk in which it differs from its
//! parent, and bitmaps of the sectors that are in the image.
//!
//! The sink allocates a block at the end of the file when the first difference in it arrives. A sector whose
//! bit is clear comes from the parent. Where the disk is zero and the parent is not, the sink sets the bits
//! and writes nothing, or enters the whole block as zeros if the format can. A driver implements
//! [`ChildLayout`].

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;

use crate::base::{self, Base};
use crate::buffer::BufferPool;
use crate::cache::Cache;
use crate::device::{OutputId, SinkDevice};
use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::memory::TableMemory;
use crate::output::Output;
use crate::sink::{Bytes, Consumer, Geometry, ImageSink, Part, Prepared, WriteList};
use crate::source::SinkPiece;
use crate::sync::lock;
use crate::table::TableWriter;
use crate::zero::ZERO_GRANULARITY;

/// Length in bytes of a piece. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;

/// Memory in bytes for the bitmaps of a new image. Our choice: a source in guest order needs one at a time,
/// of 1 MiB at most.
const BITMAP_MEMORY: u64 = 4 << 20;

/// Origin of the content of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// The parent, as for every block at first.
    Parent,
    /// Zeros.
    Zero,
    /// The sectors whose bit is set are at this file offset, the others in the parent.
    Stored(u64),
}

/// Place of the bits of a block.
#[derive(Debug, Clone, Copy)]
pub struct BitmapPlace {
    /// File offset of the bitmap.
    pub file_offset: u64,
    /// Number of the bit of the block's first sector.
    pub first_bit: u64,
}

/// The layout of a new differencing image.
pub trait ChildLayout: Send + Sync {
    /// Returns the size of a block in guest bytes.
    fn block_size(&self) -> u64;

    /// Returns the size of a sector, for which a bitmap has one bit.
    fn sector_size(&self) -> u64;

    /// Returns the unit in bytes, a power of two, that is in the image as a whole or not at all.
    fn unit(&self) -> u64 {
        self.sector_size()
    }

    /// Returns the virtual size in bytes.
    fn virtual_size(&self) -> u64;

    /// Returns the length of a bitmap in bytes, at most 1 MiB.
    fn bitmap_len(&self) -> usize;

    /// True if the most significant bit of a byte is its first sector's.
    fn is_msb_first(&self) -> bool;

    /// True if a block can be zeros without being stored.
    fn has_zero_blocks(&self) -> bool;

    /// Returns the origin of the block `index`, from its entry in the table.
    ///
    /// # Errors
    /// Any error of the table.
    fn block(&self, table: &mut TableWriter, index: u64) -> Result<Block>;

    /// Allocates the block `index`, and its bitmap if there is none, at `end`, the end of the file. Returns
    /// the file offset of the data, and the new end.
    ///
    /// # Errors
    /// Any error of the table; if the format has no entry for a block there.
    fn allocate(&self, table: &mut TableWriter, index: u64, end: u64) -> Result<(u64, u64)>;

    /// Enters the block `index` as zeros. Called only with [`ChildLayout::has_zero_blocks`].
    ///
    /// # Errors
    /// Any error of the table.
    fn set_zero(&self, table: &mut TableWriter, index: u64) -> Result<()>;

    /// Returns the place of the bits of the block `index`, whose data is at the file offset `data`.
    ///
    /// # Errors
    /// Any error of the table.
    fn bitmap(&self, table: &mut TableWriter, index: u64, data: u64) -> Result<BitmapPlace>;

    /// Writes everything but the blocks, the bitmaps and the table: the headers, the first bytes of the file
    /// last. `end` is the end of the blocks, and of the file.
    ///
    /// # Errors
    /// Any error of writing.
    fn finish(&self, output: &Output, end: u64, fingerprint: &Fingerprint) -> Result<()>;

    /// Returns notes for the user about the image.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Settings of a new differencing image that all formats have.
#[derive(Debug, Clone)]
pub struct ChildSettings {
    /// Size of the device in bytes, before the format rounds it up.
    pub device_size: u64,
    /// Virtual size of the parent in bytes.
    pub parent_size: u64,
    /// Content of the parent; `None` for a new image without content of its own.
    pub base: Option<Base>,
    /// Length in bytes of the shortest run of zeros that is not stored; `None` if the whole disk is stored.
    pub zero_unit: Option<u64>,
    /// File offset of the first block or bitmap.
    pub blocks_start: u64,
}

/// A differencing image being written.
pub struct ChildSink<L> {
    outputs: [Output; 1],
    settings: ChildSettings,
    layout: L,
    fingerprint: Fingerprint,
    state: Mutex<State>,
}

impl<L> fmt::Debug for ChildSink<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildSink").field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

/// The blocks allocated so far.
struct State {
    table: TableWriter,
    /// End of the file.
    end: u64,
    /// Bitmaps in memory by file offset. The file contains all others.
    bitmaps: Cache<u64, Vec<u8>>,
    /// Zeros from the start of a block on that are not marked yet, since they may turn out to be all of it.
    pending: Option<Range<u64>>,
}

/// Returns the memory for a table of `len` bytes and the bitmaps.
pub fn table_memory(len: u64) -> TableMemory {
    let TableMemory { least, most } = TableWriter::memory(len);
    TableMemory { least: least + BITMAP_MEMORY, most: most + BITMAP_MEMORY }
}

/// Returns the part of `memory`, the share of an image, that is for its table.
pub fn table_share(memory: Option<u64>) -> Option<u64> {
    memory.map(|memory| memory.saturating_sub(BITMAP_MEMORY))
}

impl<L: ChildLayout> ChildSink<L> {
    /// Creates a sink that writes to `output`. `table` lists no block yet.
    pub fn new(output: Output, table: TableWriter, layout: L, settings: ChildSettings) -> Self {
        // From 4 to 8192.
        let count = (BITMAP_MEMORY / layout.bitmap_len().max(512) as u64) as usize;
        let bitmaps = Cache::new(count.max(1));
        let state = State { table, end: settings.blocks_start, bitmaps, pending: None };
        let fingerprint = Fingerprint::default();
        Self { outputs: [output], settings, layout, fingerprint, state: Mutex::new(state) }
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    /// Returns the guest range of the block `index` that is part of the disk.
    fn block_range(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(self.layout.block_size());
        start..start.saturating_add(self.layout.block_size()).min(self.layout.virtual_size())
    }

    /// Returns the parts of a piece to store.
    fn parts(&self, piece: &SinkPiece, pool: &BufferPool) -> Result<Vec<Part>> {
        let parts = match (&self.settings.base, self.settings.zero_unit) {
            (Some(base), Some(zero_unit)) => {
                // At most 2 MiB.
                base.differences(piece, self.layout.unit(), zero_unit as usize, pool)?
            }
            // `prepare` has made data of all zeros.
            _ => vec![Part { guest: piece.start..piece.end(), bytes: Bytes::Data(0..piece.len as usize) }],
        };
        let parts = base::cut(parts, self.layout.block_size());
        let is_zeros = piece.data.is_none() && self.layout.has_zero_blocks();
        Ok(if is_zeros { self.widen(parts, piece.start..piece.end()) } else { parts })
    }

    /// Extends the zeros of a piece of zeros to all of the piece in the blocks that they touch: such a block
    /// is in the image anyway, and can be entered as zeros if it consists of them.
    fn widen(&self, parts: Vec<Part>, piece: Range<u64>) -> Vec<Part> {
        let mut wide: Vec<Part> = Vec::new();
        for part in parts {
            let block = self.block_range(part.guest.start / self.layout.block_size());
            let guest = piece.start.max(block.start)..piece.end.min(block.end);
            if wide.last().is_none_or(|last| last.guest != guest) {
                wide.push(Part { bytes: Bytes::Zero(guest.end - guest.start), guest });
            }
        }
        wide
    }

    /// Returns the file offset of the data of the block `index`; allocates it if the file does not contain
    /// it.
    fn block_data(&self, state: &mut State, index: u64) -> Result<u64> {
        let known = self.layout.block(&mut state.table, index)?;
        if let Block::Stored(data) = known {
            return Ok(data);
        }
        let start = state.end;
        let (data, end) = self.layout.allocate(&mut state.table, index, start)?;
        state.end = end;
        // Zero the block now: other threads may write data to it as soon as it has an offset.
        self.output().write_zeros_at(start, end - start)?;
        if known == Block::Zero {
            self.set_bits(state, index, data, self.block_range(index))?;
        }
        Ok(data)
    }

    /// Marks the sectors of `guest`, within the block `index`, as being in the image. Returns the file offset
    /// of the block's data.
    fn mark(&self, state: &mut State, index: u64, guest: Range<u64>) -> Result<u64> {
        let data = self.block_data(state, index)?;
        self.set_bits(state, index, data, guest)?;
        Ok(data)
    }

    fn set_bits(&self, state: &mut State, index: u64, data: u64, guest: Range<u64>) -> Result<()> {
        let BitmapPlace { file_offset, first_bit } = self.layout.bitmap(&mut state.table, index, data)?;
        if state.bitmaps.get(&file_offset).is_none() {
            let mut bitmap = vec![0; self.layout.bitmap_len()];
            self.output().read_exact_at(&mut bitmap, file_offset)?;
            if let Some((evicted, bytes)) = state.bitmaps.insert(file_offset, bitmap) {
                self.output().write_at(&bytes, evicted)?;
            }
        }
        let (unit, sector_size) = (self.layout.unit(), self.layout.sector_size());
        let block_start = self.block_range(index).start;
        let first = first_bit + (guest.start - block_start) / sector_size;
        // The disk may end within a unit.
        let end = first_bit + (guest.end - block_start).next_multiple_of(unit) / sector_size;
        if let Some(bitmap) = state.bitmaps.get(&file_offset) {
            fill_bits(bitmap, first..end, self.layout.is_msb_first());
        }
        Ok(())
    }

    /// Enters zeros over data of the parent, within one block.
    fn place_zeros(&self, state: &mut State, guest: Range<u64>) -> Result<()> {
        let index = guest.start / self.layout.block_size();
        let block = self.block_range(index);
        let joined = match &state.pending {
            Some(pending) if pending.end == guest.start && guest.start != block.start => {
                pending.start..guest.end
            }
            _ => {
                self.flush_zeros(state)?;
                guest
            }
        };
        state.pending = None;
        let can_be_whole = self.layout.has_zero_blocks()
            && joined.start == block.start
            && self.layout.block(&mut state.table, index)? == Block::Parent;
        if !can_be_whole {
            self.mark(state, index, joined)?;
        } else if joined.end >= block.end.min(self.settings.device_size) {
            self.layout.set_zero(&mut state.table, index)?;
        } else {
            state.pending = Some(joined);
        }
        Ok(())
    }

    /// Marks the zeros that wait for the rest of their block.
    fn flush_zeros(&self, state: &mut State) -> Result<()> {
        if let Some(guest) = state.pending.take() {
            self.mark(state, guest.start / self.layout.block_size(), guest)?;
        }
        Ok(())
    }

    /// Enters zeros in `range` where nothing has been stored, whatever a reader has below it.
    fn hide(&self, state: &mut State, range: Range<u64>) -> Result<()> {
        let block_size = self.layout.block_size();
        let mut at = range.start;
        while at < range.end {
            let index = at / block_size;
            let block = self.block_range(index);
            let guest = at..block.end.min(range.end);
            at = guest.end;
            if self.layout.block(&mut state.table, index)? == Block::Zero {
                continue;
            }
            let is_whole = guest == block && self.layout.has_zero_blocks();
            if is_whole && self.layout.block(&mut state.table, index)? == Block::Parent {
                self.layout.set_zero(&mut state.table, index)?;
            } else {
                self.mark(state, index, guest)?;
            }
        }
        Ok(())
    }

    /// Enters the zeros that follow the device, and those past the end of the parent, where readers differ.
    fn hide_ends(&self, state: &mut State) -> Result<()> {
        let virtual_size = self.layout.virtual_size();
        let unit = self.layout.unit();
        let parent_size = self.settings.parent_size.min(virtual_size);
        // The rest of the last unit has been compared with it.
        let device_end = self.settings.device_size.next_multiple_of(unit).min(parent_size);
        if let Some(base) = &self.settings.base
            && device_end < parent_size
            && !base.is_zero(device_end..parent_size, &BufferPool::new())?
        {
            self.hide(state, device_end..parent_size)?;
        }
        self.hide(state, parent_size..virtual_size)?;
        self.mark_past_end(state)
    }

    /// Marks the sectors of the last block that lie past the end of the disk, if the block is stored. Readers
    /// that read whole pages (dissect.hypervisor 3.21) would look for them in the parent, which may end
    /// there.
    fn mark_past_end(&self, state: &mut State) -> Result<()> {
        let (size, block_size) = (self.layout.virtual_size(), self.layout.block_size());
        let index = size / block_size;
        if size.is_multiple_of(block_size) {
            return Ok(());
        }
        match self.layout.block(&mut state.table, index)? {
            Block::Stored(data) => self.set_bits(state, index, data, size..(index + 1) * block_size),
            Block::Parent | Block::Zero => Ok(()),
        }
    }
}

/// Sets the bits of `range`, most or least significant bits of a byte first.
fn fill_bits(bitmap: &mut [u8], range: Range<u64>, msb_first: bool) {
    let mut bit = range.start;
    while bit < range.end {
        // The bitmap is in memory.
        let Some(byte) = bitmap.get_mut((bit / 8) as usize) else { return };
        if bit.is_multiple_of(8) && range.end - bit >= 8 {
            *byte = 0xff;
            bit += 8;
            continue;
        }
        let shift = if msb_first { 7 - bit % 8 } else { bit % 8 };
        *byte |= 1 << shift;
        bit += 1;
    }
}

impl<L: ChildLayout> Consumer for ChildSink<L> {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let zero_unit = self.settings.zero_unit;
        let piece_len = PIECE_LEN.max(zero_unit.unwrap_or(0));
        Geometry {
            // A unit of zero detection is stored or left out as a whole.
            granule: zero_unit.unwrap_or(0).max(ZERO_GRANULARITY as u64),
            granule_required: false,
            piece_len,
            max_zero_len: if zero_unit.is_some() { base::MAX_ZERO_LEN } else { piece_len },
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        if let Some(data) = &piece.data {
            for run in piece.nonzero_runs(ZERO_GRANULARITY) {
                self.fingerprint.add(piece.start + run.start as u64, &data[run]);
            }
        }
        let compares = self.settings.base.is_some() && self.settings.zero_unit.is_some();
        let piece = if compares { piece } else { piece.with_zeros_as_data(pool) };
        let parts = self.parts(&piece, pool)?;
        Ok(Prepared { parts, ..Prepared::new(piece) })
    }

    fn worker_memory(&self) -> u64 {
        self.settings.base.as_ref().map_or(0, Base::reader_memory)
    }
}

impl<L: ChildLayout> ImageSink for ChildSink<L> {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let block_size = self.layout.block_size();
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            if matches!(part.bytes, Bytes::Zero(_)) {
                self.place_zeros(&mut state, part.guest.clone())?;
                continue;
            }
            self.flush_zeros(&mut state)?;
            let data = self.mark(&mut state, part.guest.start / block_size, part.guest.clone())?;
            writes.push(OutputId::MAIN, data + part.guest.start % block_size, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut state = lock(&self.state);
        self.flush_zeros(&mut state)?;
        self.hide_ends(&mut state)?;
        let mut bitmaps: Vec<(u64, Vec<u8>)> = state.bitmaps.drain().collect();
        bitmaps.sort_unstable_by_key(|(file_offset, _)| *file_offset);
        for (file_offset, bytes) in bitmaps {
            self.output().write_at(&bytes, file_offset)?;
        }
        state.table.finish()?;
        self.output().set_len(state.end)?;
        self.layout.finish(self.output(), state.end, &self.fingerprint)
    }

    fn notes(&self) -> Vec<String> {
        self.layout.notes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_bits_in_both_orders() {
        for (range, msb_first, expected) in [
            (1..2, true, [0x40, 0, 0]),
            (1..2, false, [0x02, 0, 0]),
            (6..17, true, [0x03, 0xff, 0x80]),
            (6..17, false, [0xc0, 0xff, 0x01]),
            (8..24, true, [0, 0xff, 0xff]),
            (20..90, false, [0, 0, 0xf0]),
        ] {
            let mut bitmap = [0; 3];
            fill_bits(&mut bitmap, range.clone(), msb_first);
            assert_eq!(bitmap, expected, "{range:?}");
        }
    }
}
