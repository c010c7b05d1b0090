//! Reading an archive in one pass: from a pipe, or through a decompressor.
//!
//! Pieces come in the archive's order: runs of consecutive clusters of one device within one extent.
//! Data is read straight into the piece's buffer.

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{Buffer, BufferPool, OpenOptions, Piece, Result, SequentialAccess, Stream};

use crate::bytes::ArchiveBytes;
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};
use crate::tracker::Placed;
use crate::walker::{Entered, Walker};

/// Clusters of a piece with data: 1 MiB, so that buffers stay in a core's cache.
pub(crate) const PIECE_CLUSTERS: usize = 16;

/// The rest of an archive behind its header.
pub(crate) struct ArchiveStream {
    walker: Walker<Stream>,
    /// The extent whose data is being read.
    extent: Option<Entered>,
    /// Index of the next slot among those that own something.
    next_slot: usize,
    ended: bool,
}

impl ArchiveStream {
    pub(crate) fn new(stream: Stream, header: &Arc<ArchiveHeader>, options: &OpenOptions) -> Self {
        let walker = Walker::new(stream, header, options);
        Self { walker, extent: None, next_slot: 0, ended: false }
    }
}

impl SequentialAccess for ArchiveStream {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        while !self.ended {
            let Some(extent) = self.extent else {
                self.extent = self.walker.enter()?;
                self.ended = self.extent.is_none();
                self.next_slot = 0;
                continue;
            };
            let group = group_at(&self.walker.placed, self.next_slot);
            let Some(first) = self.walker.placed.get(group.start).copied() else {
                self.extent = None;
                continue;
            };
            self.next_slot = group.end;
            if first.is_beyond() {
                if self.walker.bytes.skip(first.stored_len())? < first.stored_len() {
                    return Err(self.walker.short(extent));
                }
                continue;
            }
            let slots = &self.walker.placed[group];
            let len: u64 = slots.iter().map(|placed| placed.len).sum();
            if first.mask == 0 {
                return Ok(Some(Piece::zero(first.device, first.start, len)));
            }
            let mut buffer = pool.take(slots.len() * CLUSTER as usize);
            let layout = stored_ranges(slots);
            if !fill(&mut self.walker.bytes, &mut buffer, &layout)? {
                return Err(self.walker.short(extent));
            }
            return Ok(Some(piece(&first, len, buffer, layout)));
        }
        Ok(None)
    }
}

/// The slots from `from` on that make one piece.
pub(crate) fn group_at(placed: &[Placed], from: usize) -> Range<usize> {
    let Some(first) = placed.get(from) else { return from..from };
    let limit = if first.mask == 0 { usize::MAX } else { PIECE_CLUSTERS };
    let mut end = from + 1;
    while let (Some(last), Some(next)) = (placed.get(end - 1), placed.get(end)) {
        let alike = (last.mask == 0) == (next.mask == 0) && !next.is_beyond();
        if !alike || !last.joins(next) || end - from >= limit {
            break;
        }
        end += 1;
    }
    from..end
}

/// Where the stored sub-blocks of consecutive clusters belong in a buffer that holds the clusters;
/// ascending, joined.
pub(crate) fn stored_ranges(slots: &[Placed]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let unit = SUB_BLOCK as usize;
    for (number, placed) in slots.iter().enumerate() {
        for bit in (0..SUB_BLOCKS_PER_CLUSTER as usize).filter(|bit| placed.mask >> bit & 1 == 1) {
            let start = number * CLUSTER as usize + bit * unit;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += unit,
                _ => ranges.push(start..start + unit),
            }
        }
    }
    ranges
}

/// Reads the stored ranges and zeroes the rest; false when the data ends early.
fn fill(bytes: &mut impl ArchiveBytes, buffer: &mut [u8], stored: &[Range<usize>]) -> Result<bool> {
    let mut filled = 0;
    for range in stored {
        buffer[filled..range.start].fill(0);
        if bytes.read_full(&mut buffer[range.clone()])? < range.len() {
            return Ok(false);
        }
        filled = range.end;
    }
    buffer[filled..].fill(0);
    Ok(true)
}

/// A piece of `len` bytes: what lies past the device's end is cut off.
pub(crate) fn piece(first: &Placed, len: u64, mut buffer: Buffer, stored: Vec<Range<usize>>) -> Piece {
    let end = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    buffer.truncate(end);
    let runs =
        stored.into_iter().map(|run| run.start..run.end.min(end)).filter(|run| run.start < run.end).collect();
    Piece { device: first.device, start: first.start, len, data: Some(buffer), runs }
}
