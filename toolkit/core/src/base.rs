//! [`Base`], the content below a new image that stores only its differences from it.

use std::ops::Range;

use crate::buffer::{Buffer, BufferPool};
use crate::disk::Disk;
use crate::error::Result;
use crate::sink::{Bytes, Part};
use crate::source::SinkPiece;
use crate::zero::{ZERO_GRANULARITY, is_zero};

/// Number of bytes of the base that are read at once below a piece of zeros. Our choice, as for pieces.
const READ_LEN: u64 = 256 << 10;

/// Maximum length in bytes of a piece of zeros of an image over a base, for
/// [`crate::Geometry::max_zero_len`]. Our limit: the parts of such a piece, one for every other sector at
/// most, take 1 MiB.
pub const MAX_ZERO_LEN: u64 = 16 << 20;

/// The disk below a new image.
#[derive(Debug, Clone)]
pub struct Base(Disk);

impl Base {
    /// Creates a base from its disk.
    pub fn new(disk: Disk) -> Self {
        Self(disk)
    }

    /// Returns the size in bytes. Past it, the base counts as zeros.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Returns the memory in bytes that a thread needs for reads besides its buffers.
    pub fn reader_memory(&self) -> u64 {
        self.0.reader_memory()
    }

    /// True if the base reads as zeros in `range`.
    ///
    /// # Errors
    /// Any error of reading the base.
    pub fn is_zero(&self, range: Range<u64>, pool: &BufferPool) -> Result<bool> {
        let mut all_zero = true;
        self.for_each_data(range, ZERO_GRANULARITY as u64, pool, |_, bytes| {
            all_zero = is_zero(bytes);
            all_zero
        })?;
        Ok(all_zero)
    }

    /// Returns the parts of a piece that differ from the base, in units of `unit` bytes, a power of two:
    /// data, and zeros over data of the base. Zeros count as data if they are shorter than `zero_unit` bytes.
    /// The piece starts at a multiple of the unit. If it does not end at one, it is the disk's last, and
    /// zeros follow it.
    ///
    /// # Errors
    /// Any error of reading the base.
    pub fn differences(
        &self,
        piece: &SinkPiece,
        unit: u64,
        zero_unit: usize,
        pool: &BufferPool,
    ) -> Result<Vec<Part>> {
        let mut parts = Parts { unit, piece_start: piece.start, piece_end: piece.end(), list: Vec::new() };
        let Some(data) = &piece.data else {
            let whole = piece.start..piece.end().next_multiple_of(unit);
            self.for_each_data(whole, unit.max(ZERO_GRANULARITY as u64), pool, |at, below| {
                parts.push_zeros(at, below);
                true
            })?;
            return Ok(parts.list);
        };
        let below = self.read(piece.start, piece.len.next_multiple_of(unit), pool)?;
        let mut position = 0;
        for run in piece.nonzero_runs(zero_unit) {
            parts.push_zeros(piece.start + position as u64, &below[position..run.start]);
            parts.push_data(data, &below, run.clone());
            position = run.end;
        }
        if position < data.len() {
            parts.push_zeros(piece.start + position as u64, &below[position..]);
        }
        Ok(parts.list)
    }

    /// Reads `len` bytes at `start`, with zeros past the end of the base.
    fn read(&self, start: u64, len: u64, pool: &BufferPool) -> Result<Buffer> {
        // A piece, which is in memory.
        let mut buffer = pool.take(len as usize);
        let known = self.size().saturating_sub(start).min(len) as usize;
        let (inside, past_end) = buffer.split_at_mut(known);
        past_end.fill(0);
        if !inside.is_empty() {
            self.0.read_at(inside, start)?;
        }
        Ok(buffer)
    }

    /// Calls `visit` with the start and the content of parts of `range` that together contain all data of the
    /// base, in order, until it returns false. They start at multiples of `alignment`, or with the range.
    fn for_each_data(
        &self,
        range: Range<u64>,
        alignment: u64,
        pool: &BufferPool,
        mut visit: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<()> {
        let read_len = READ_LEN.max(alignment);
        let known_end = range.end.min(self.size());
        let (mut at, mut visited) = (range.start, range.start);
        while at < known_end {
            for extent in self.0.rough_extents(at..known_end, READ_LEN)? {
                at = extent.end();
                if !extent.is_data() {
                    continue;
                }
                let data_end = extent.end().next_multiple_of(alignment).min(range.end);
                visited = visited.max(extent.start - extent.start % alignment);
                while visited < data_end {
                    let len = read_len.min(data_end - visited);
                    if !visit(visited, &self.read(visited, len, pool)?) {
                        return Ok(());
                    }
                    visited += len;
                }
            }
        }
        Ok(())
    }
}

/// The parts found so far.
struct Parts {
    unit: u64,
    piece_start: u64,
    piece_end: u64,
    list: Vec<Part>,
}

impl Parts {
    /// Adds the units of the guest range from `start` on, where the new image has zeros and the base `below`
    /// has data.
    fn push_zeros(&mut self, start: u64, below: &[u8]) {
        // At most a few KiB.
        let unit = self.unit as usize;
        let mut at = start;
        for bytes in below.chunks(unit) {
            let end = (at + bytes.len() as u64).min(self.piece_end);
            if !is_zero(bytes) {
                self.push(at..end, |range| Bytes::Zero(range.end - range.start));
            }
            at = end;
        }
    }

    /// Adds the units of `run` in which `data` differs from `below`; both count from the piece's start.
    fn push_data(&mut self, data: &[u8], below: &[u8], run: Range<usize>) {
        let unit = self.unit as usize;
        let mut at = run.start;
        while at < run.end {
            let unit_end = at + unit;
            let end = unit_end.min(run.end);
            // Zeros follow the disk.
            let differs = data[at..end] != below[at..end] || !is_zero(&below[end..unit_end]);
            if differs {
                let start = self.piece_start;
                let guest = start + at as u64..start + end as u64;
                self.push(guest, |range| {
                    Bytes::Data((range.start - start) as usize..(range.end - start) as usize)
                });
            }
            at = end;
        }
    }

    /// Adds a part, or extends the last one if it has the same kind and ends where the part starts.
    fn push(&mut self, guest: Range<u64>, bytes: impl Fn(&Range<u64>) -> Bytes) {
        let mut new = Part { bytes: bytes(&guest), guest };
        if let Some(last) = self.list.last_mut()
            && last.guest.end == new.guest.start
            && matches!(last.bytes, Bytes::Zero(_)) == matches!(new.bytes, Bytes::Zero(_))
        {
            new.guest.start = last.guest.start;
            new.bytes = bytes(&new.guest);
            *last = new;
            return;
        }
        self.list.push(new);
    }
}

/// Cuts parts at multiples of `block_size` in the guest. Only zeros and data of the piece itself can be cut.
pub fn cut(parts: Vec<Part>, block_size: u64) -> Vec<Part> {
    let mut cut = Vec::with_capacity(parts.len());
    for part in parts {
        let whole = part.guest.clone();
        let mut at = whole.start;
        while at < whole.end {
            let end = (at - at % block_size).saturating_add(block_size).min(whole.end);
            let bytes = match &part.bytes {
                Bytes::Zero(_) => Bytes::Zero(end - at),
                Bytes::Data(range) => {
                    let from = range.start + (at - whole.start) as usize;
                    Bytes::Data(from..from + (end - at) as usize)
                }
                other => other.clone(),
            };
            cut.push(Part { guest: at..end, bytes });
            at = end;
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_parts_at_blocks() {
        let parts = vec![
            Part { guest: 3..10, bytes: Bytes::Data(0..7) },
            Part { guest: 10..13, bytes: Bytes::Zero(3) },
        ];
        let found: Vec<(Range<u64>, u64)> =
            cut(parts, 4).into_iter().map(|part| (part.guest, part.bytes.len())).collect();
        assert_eq!(found, [(3..4, 1), (4..8, 4), (8..10, 2), (10..12, 2), (12..13, 1)]);
    }
}
