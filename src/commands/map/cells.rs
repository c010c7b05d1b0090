//! Cells of a drawing: a disk cut into parts of equal length, and how much of each kind is in each part.

use std::ops::Range;

use imgtool_core::MapExtent;

/// State of an extent, as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes that the image stores as they are.
    Data,
    /// Bytes that the image stores compressed.
    Compressed,
    /// Bytes that a backing or parent image stores.
    Backing,
    /// Zeros that the image stores or has an entry for.
    Zero,
    /// Nothing stored; reads as zeros.
    Hole,
}

impl Kind {
    /// Returns the state of an extent.
    pub fn of(extent: &MapExtent) -> Self {
        match extent {
            MapExtent { zero: true, present: true, .. } => Kind::Zero,
            MapExtent { zero: true, .. } => Kind::Hole,
            MapExtent { depth: 1.., .. } => Kind::Backing,
            MapExtent { compressed: true, .. } => Kind::Compressed,
            _ => Kind::Data,
        }
    }
}

/// Number of guest bytes of each kind. The rest of a cell is a hole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes of [`Kind::Data`].
    pub data: u64,
    /// Bytes of [`Kind::Compressed`].
    pub compressed: u64,
    /// Bytes of [`Kind::Backing`].
    pub backing: u64,
    /// Bytes of [`Kind::Zero`].
    pub zero: u64,
}

impl Counts {
    /// Returns the number of bytes that are not zeros, as far as the image knows.
    pub fn stored(&self) -> u64 {
        self.data + self.compressed + self.backing
    }

    /// Returns the kinds that occur in `len` bytes, each with its bytes.
    pub fn shares(&self, len: u64) -> Vec<(Kind, u64)> {
        let all = [
            (Kind::Data, self.data),
            (Kind::Compressed, self.compressed),
            (Kind::Backing, self.backing),
            (Kind::Zero, self.zero),
            (Kind::Hole, len.saturating_sub(self.stored() + self.zero)),
        ];
        all.into_iter().filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// Adds bytes of a kind.
    pub fn add(&mut self, kind: Kind, len: u64) {
        match kind {
            Kind::Data => self.data += len,
            Kind::Compressed => self.compressed += len,
            Kind::Backing => self.backing += len,
            Kind::Zero => self.zero += len,
            Kind::Hole => {}
        }
    }

    /// Adds the bytes of another cell.
    pub fn join(&mut self, other: &Self) {
        self.data += other.data;
        self.compressed += other.compressed;
        self.backing += other.backing;
        self.zero += other.zero;
    }
}

/// A guest range of a device as cells.
#[derive(Debug)]
pub struct Cells {
    /// The guest range.
    pub range: Range<u64>,
    /// Number of guest bytes in a cell, a power of two. The last cell may cover fewer.
    pub cell_len: u64,
    /// The cells, in the order of the guest.
    pub cells: Vec<Counts>,
    /// Sum of all cells.
    pub total: Counts,
}

impl Cells {
    /// Creates empty cells: at most `max_cells`, which must not be 0, each of at least `min_len` bytes.
    pub fn new(range: Range<u64>, max_cells: usize, min_len: u64) -> Self {
        let len = range.end.saturating_sub(range.start);
        let cell_len =
            len.div_ceil(max_cells as u64).checked_next_power_of_two().unwrap_or(1 << 63).max(min_len);
        // At most `max_cells`.
        let cells = vec![Counts::default(); len.div_ceil(cell_len) as usize];
        Self { range, cell_len, cells, total: Counts::default() }
    }

    /// Returns the length of the range.
    pub fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// Adds an extent, which must be inside the range.
    pub fn add(&mut self, start: u64, len: u64, kind: Kind) {
        self.total.add(kind, len);
        if kind == Kind::Hole {
            return;
        }
        let mut at = start.saturating_sub(self.range.start);
        let end = at.saturating_add(len);
        while at < end {
            let index = at / self.cell_len;
            let next = end.min((index + 1).saturating_mul(self.cell_len));
            if let Some(cell) = self.cells.get_mut(index as usize) {
                cell.add(kind, next - at);
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_have_round_sizes_and_fit() {
        for (len, max_cells, cell_len, cells) in [
            (64u64 << 20, 256, 256 << 10, 256),
            (65 << 20, 256, 512 << 10, 130),
            (512, 256, 512, 1),
            (0, 256, 512, 0),
            (u64::MAX, 256, 1 << 56, 256),
            (64 << 20, 64, 1 << 20, 64),
        ] {
            let made = Cells::new(0..len, max_cells, 512);
            assert_eq!((made.cell_len, made.cells.len()), (cell_len, cells), "{len}");
        }
    }

    #[test]
    fn extents_fill_their_cells() {
        let mut made = Cells::new(1024..1024 + 5 * 512, 256, 512);
        made.add(1024, 600, Kind::Data);
        made.add(1624, 424, Kind::Hole);
        made.add(2048, 512, Kind::Zero);
        made.add(2560, 256, Kind::Compressed);
        made.add(2816, 256, Kind::Backing);
        made.add(3072, 512, Kind::Hole);
        let filled: Vec<_> =
            made.cells.iter().map(|cell| (cell.data, cell.compressed, cell.backing, cell.zero)).collect();
        assert_eq!(filled, [(512, 0, 0, 0), (88, 0, 0, 0), (0, 0, 0, 512), (0, 256, 256, 0), (0, 0, 0, 0)]);
        assert_eq!((made.total.stored(), made.total.zero), (1112, 512));
        assert_eq!(made.total.shares(made.len()).last(), Some(&(Kind::Hole, 936)));
    }
}
