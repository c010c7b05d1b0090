//! Units of a compressed output, cut by guest position.
//!
//! The source decides the pieces: it may have holes, large clusters, or be a stream. So that equal content gives
//! equal bytes, frames must not follow the pieces. A *unit* is the output for a fixed guest range. A unit with
//! data becomes a frame. A unit without data consists of zeros (raw) or of an extent header (VMA); such units
//! are joined if they are adjacent and in the same *group* of 128 units, counted from the start of the device.

use std::ops::Range;

use imgtool_core::Prepared;

use super::frames::Chunk;

/// Number of units in a group. Our choice: frames of 64 KiB for VMA, which compress as well as longer ones. The
/// frames on both sides of a run of zeros are compressed one at a time, so they must be short.
pub(super) const GROUP_UNITS: u64 = 128;

/// A unit, or adjacent units without data.
pub(super) enum Unit<'a> {
    /// Output of one unit with data.
    Data(Vec<Chunk<'a>>),
    /// Units without data.
    Empty(Empty),
}

/// Adjacent units of one group, without data.
#[derive(Debug, PartialEq)]
pub(super) struct Empty {
    /// Guest range in bytes.
    pub(super) guest: Range<u64>,
    pub(super) plain: Plain,
}

/// Output of units without data.
#[derive(Debug, PartialEq)]
pub(super) enum Plain {
    /// Number of zeros.
    Zeros(u64),
    /// Bytes that represent no guest data.
    Bytes(Vec<u8>),
}

impl Plain {
    /// Returns the bytes; none for zeros.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Plain::Zeros(_) => &[],
            Plain::Bytes(bytes) => bytes,
        }
    }
}

impl Empty {
    /// True if the units are a whole group.
    pub(super) fn is_whole(&self, group_len: u64) -> bool {
        self.guest.start.is_multiple_of(group_len) && self.guest.end - self.guest.start == group_len
    }

    /// Appends `next` if it is adjacent and in the same group. Returns it otherwise.
    pub(super) fn join(&mut self, next: Self, group_len: u64) -> Option<Self> {
        let is_near = self.guest.end == next.guest.start && !next.guest.start.is_multiple_of(group_len);
        match (&mut self.plain, &next.plain) {
            (Plain::Zeros(zeros), Plain::Zeros(more)) if is_near => *zeros += more,
            (Plain::Bytes(bytes), Plain::Bytes(more)) if is_near => bytes.extend_from_slice(more),
            _ => return Some(next),
        }
        self.guest.end = next.guest.end;
        None
    }
}

/// Cuts the parts of a prepared piece into units.
pub(super) fn cut(prepared: &Prepared, unit_len: u64, group_len: u64) -> Vec<Unit<'_>> {
    let piece = prepared.start..prepared.start + prepared.len;
    let mut cutter = Cutter { unit_len, group_len, piece, open: None, units: Vec::new() };
    for part in prepared.parts.iter().filter(|part| !part.bytes.is_empty()) {
        let chunk = prepared.bytes(&part.bytes).map_or(Chunk::Zero(part.bytes.len()), Chunk::Data);
        cutter.add(part.guest.clone(), chunk);
    }
    cutter.close();
    cutter.units
}

/// The unit that is being cut.
struct Open<'a> {
    /// Guest range of the unit, or of several units of zeros.
    guest: Range<u64>,
    chunks: Vec<Chunk<'a>>,
    /// True if every chunk so far represents guest zeros.
    is_zero: bool,
    /// True if no chunk so far represents guest bytes.
    is_overhead: bool,
}

struct Cutter<'a> {
    unit_len: u64,
    group_len: u64,
    /// Guest range of the piece.
    piece: Range<u64>,
    open: Option<Open<'a>>,
    units: Vec<Unit<'a>>,
}

impl<'a> Cutter<'a> {
    /// Adds a part that represents the guest range `guest`, split at the boundaries of units.
    fn add(&mut self, guest: Range<u64>, mut chunk: Chunk<'a>) {
        // Only a part with the bytes of the guest can be split.
        let is_divisible = chunk.len() == guest.end - guest.start;
        let mut start = guest.start;
        loop {
            let unit = self.units_at(start, &guest, matches!(chunk, Chunk::Zero(_)));
            let end = if is_divisible { unit.end.min(guest.end) } else { guest.end };
            if end == guest.end {
                return self.add_within(unit, end > start, chunk);
            }
            // A part in memory fits into a usize, and a group of zeros does too.
            let (first, rest) = chunk.split_at((end - start) as usize);
            self.add_within(unit, true, first);
            (start, chunk) = (end, rest);
        }
    }

    /// Returns the guest range of the unit at `start`, or of all whole units up to the end of the group if the
    /// part `guest` fills them with zeros.
    fn units_at(&self, start: u64, guest: &Range<u64>, is_zero: bool) -> Range<u64> {
        let unit = start - start % self.unit_len;
        let mut end = unit + self.unit_len;
        let is_open = self.open.as_ref().is_some_and(|open| open.guest.contains(&start));
        if is_zero && !is_open && start == unit {
            let group_end = (unit - unit % self.group_len).saturating_add(self.group_len);
            let zeros_end = guest.end.min(group_end);
            end = end.max(zeros_end - zeros_end % self.unit_len);
        }
        unit..end
    }

    /// Adds a chunk within the unit `unit`.
    fn add_within(&mut self, unit: Range<u64>, has_guest: bool, chunk: Chunk<'a>) {
        if self.open.as_ref().is_none_or(|open| !open.guest.contains(&unit.start)) {
            self.close();
            self.open = Some(Open { guest: unit, chunks: Vec::new(), is_zero: true, is_overhead: true });
        }
        let Some(open) = &mut self.open else { return };
        open.is_zero &= has_guest && matches!(chunk, Chunk::Zero(_));
        open.is_overhead &= !has_guest;
        open.chunks.push(chunk);
    }

    /// Finishes the open unit.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if !open.is_zero && !open.is_overhead {
            return self.units.push(Unit::Data(open.chunks));
        }
        let plain = if open.is_zero {
            Plain::Zeros(open.chunks.iter().map(Chunk::len).sum())
        } else {
            let mut bytes = Vec::new();
            let slices = open.chunks.iter().flat_map(|chunk| chunk.slices());
            slices.for_each(|slice| bytes.extend_from_slice(slice));
            Plain::Bytes(bytes)
        };
        let guest = open.guest.start.max(self.piece.start)..open.guest.end.min(self.piece.end);
        let next = Empty { guest, plain };
        let next = match self.units.last_mut() {
            Some(Unit::Empty(last)) => last.join(next, self.group_len),
            _ => Some(next),
        };
        self.units.extend(next.map(Unit::Empty));
    }
}

#[cfg(test)]
mod tests {
    use imgtool_core::{BufferPool, Bytes, Part, SinkDevice, SinkPiece};

    use super::*;

    const UNIT: u64 = 100;
    const GROUP: u64 = UNIT * GROUP_UNITS;

    /// Returns a piece at `start` with one part for each of `lens`, which are alternately zeros and data.
    fn piece(start: u64, lens: &[u64]) -> Prepared {
        let len: u64 = lens.iter().sum();
        let mut prepared =
            Prepared::new(SinkPiece::data(SinkDevice(0), start, BufferPool::new().take(len as usize)));
        let mut at = 0;
        for (number, len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            let bytes = match number % 2 {
                0 => Bytes::Zero(*len),
                _ => Bytes::Data(at as usize..(at + len) as usize),
            };
            prepared.parts.push(Part { guest: start + at..start + at + len, bytes });
            at += len;
        }
        prepared
    }

    /// Returns the length of each unit with data, and the guest range of empty ones.
    fn summary(prepared: &Prepared) -> Vec<Result<u64, Range<u64>>> {
        let of = |unit: Unit<'_>| match unit {
            Unit::Data(chunks) => Ok(chunks.iter().map(Chunk::len).sum()),
            Unit::Empty(empty) => {
                assert_eq!(empty.plain, Plain::Zeros(empty.guest.end - empty.guest.start));
                Err(empty.guest)
            }
        };
        cut(prepared, UNIT, GROUP).into_iter().map(of).collect()
    }

    #[test]
    fn cuts_by_guest_position() {
        assert_eq!(summary(&piece(0, &[250, 10, 340])), [Err(0..200), Ok(100), Err(300..600)]);
        assert_eq!(summary(&piece(200, &[0, 150, 100, 25])), [Ok(100), Ok(100), Ok(75)]);
        assert_eq!(summary(&piece(100, &[130])), [Err(100..230)]);
        let long = piece(GROUP - 200, &[GROUP + 300]);
        assert_eq!(
            summary(&long),
            [Err(GROUP - 200..GROUP), Err(GROUP..2 * GROUP), Err(2 * GROUP..2 * GROUP + 100)]
        );
    }

    #[test]
    fn overhead_alone_is_empty_and_joins_its_neighbours() {
        let mut prepared = Prepared::new(SinkPiece::zero(SinkDevice(0), 0, 3 * UNIT));
        let mut encoded = BufferPool::new().take(3);
        encoded.copy_from_slice(b"abc");
        prepared.encoded = Some(encoded);
        for unit in 0..3 {
            let at = unit as u64 * UNIT;
            prepared.parts.push(Part { guest: at..at, bytes: Bytes::Encoded(unit..unit + 1) });
        }
        let units = cut(&prepared, UNIT, GROUP);
        let [Unit::Empty(empty)] = units.as_slice() else { panic!("one run") };
        assert_eq!(*empty, Empty { guest: 0..300, plain: Plain::Bytes(b"abc".to_vec()) });
        // Stored zeros are data of the unit.
        prepared.parts.push(Part { guest: 210..300, bytes: Bytes::Zero(90) });
        let units = cut(&prepared, UNIT, GROUP);
        assert!(matches!(units.as_slice(), [Unit::Empty(_), Unit::Data(chunks)] if chunks.len() == 2));
    }

    #[test]
    fn joins_neighbours_within_a_group() {
        let zeros = |guest: Range<u64>| Empty { plain: Plain::Zeros(guest.end - guest.start), guest };
        let mut first = zeros(GROUP - 300..GROUP - 200);
        assert_eq!(first.join(zeros(GROUP - 200..GROUP), GROUP), None);
        assert_eq!(first, zeros(GROUP - 300..GROUP));
        assert_eq!(first.join(zeros(GROUP..GROUP + 100), GROUP), Some(zeros(GROUP..GROUP + 100)));
        assert!(zeros(GROUP..2 * GROUP).is_whole(GROUP));
        assert!(!first.is_whole(GROUP));
    }
}
