//! The block allocation table (section 2.5): which block stands where.
//!
//! The entry of a chunk's sector-bitmap block follows the entries of its `chunk_ratio` payload
//! blocks, in every type of file; only differencing files use it:
//!
//! ```text
//! P0 P1 … P(r-1) S0  Pr … P(2r-1) S1  …
//! ```

use super::MIB;

/// Sectors that one sector-bitmap block describes (section 2.4): 1 MiB of bits.
pub(crate) const SECTORS_PER_BITMAP: u64 = 1 << 23;
/// Bytes of a sector-bitmap block (section 2.4).
pub(crate) const SECTOR_BITMAP_LEN: u64 = MIB;
/// Bytes of an entry.
pub(crate) const ENTRY_LEN: u64 = 8;
/// Payload block sizes (section 2.6.2.1): powers of two between these.
pub(crate) const MIN_BLOCK_SIZE: u64 = MIB;
pub(crate) const MAX_BLOCK_SIZE: u64 = 256 * MIB;

/// Bits 0..3 of an entry: the state.
const STATE_MASK: u64 = 7;
/// Bits 20..64 of an entry: the file offset in MiB, that is the offset in bytes with low bits cut.
const OFFSET_MASK: u64 = !(MIB - 1);

/// An entry as it stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatEntry(pub(crate) u64);

/// State of a payload block (section 2.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PayloadState {
    /// 0: not in the file; in a differencing file the parent has it.
    NotPresent,
    /// 1: no defined content; we read zeros, never the parent.
    Undefined,
    /// 2: zeros.
    Zero,
    /// 3, and 5 in files after version 0.95 of the specification: given back by the guest; we read
    /// zeros, never the parent.
    Unmapped,
    /// 6: all of it is in the file.
    FullyPresent,
    /// 7: the sector bitmap says which sectors are in the file. Differencing files only.
    PartiallyPresent,
    /// Reserved.
    Reserved(u8),
}

/// State of a sector-bitmap block (section 2.5.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SectorBitmapState {
    /// 0
    NotPresent,
    /// 6
    Present,
    /// Reserved.
    Reserved(u8),
}

impl BatEntry {
    /// The entry of a payload block that is fully present at `file_offset`, a multiple of 1 MiB.
    pub(crate) fn fully_present(file_offset: u64) -> Self {
        Self((file_offset & OFFSET_MASK) | 6)
    }

    /// The file offset in bytes; means something only where the state says that a block is present.
    pub(crate) fn file_offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Its state as that of a payload block.
    pub(crate) fn payload_state(self) -> PayloadState {
        match self.0 & STATE_MASK {
            0 => PayloadState::NotPresent,
            1 => PayloadState::Undefined,
            2 => PayloadState::Zero,
            3 | 5 => PayloadState::Unmapped,
            6 => PayloadState::FullyPresent,
            7 => PayloadState::PartiallyPresent,
            other => PayloadState::Reserved(other as u8),
        }
    }

    /// Its state as that of a sector-bitmap block.
    pub(crate) fn sector_bitmap_state(self) -> SectorBitmapState {
        match self.0 & STATE_MASK {
            0 => SectorBitmapState::NotPresent,
            6 => SectorBitmapState::Present,
            other => SectorBitmapState::Reserved(other as u8),
        }
    }
}

/// How the BAT of a disk is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatShape {
    /// Bytes of a payload block.
    pub(crate) block_size: u64,
    /// Bytes of a logical sector.
    pub(crate) logical_sector_size: u64,
    /// Payload blocks for one sector-bitmap block.
    pub(crate) chunk_ratio: u64,
    /// Payload blocks of the disk.
    pub(crate) payload_blocks: u64,
}

impl BatShape {
    /// The shape for a disk; sizes are within the format's limits.
    pub(crate) fn new(virtual_size: u64, block_size: u64, logical_sector_size: u64) -> Self {
        Self {
            block_size,
            logical_sector_size,
            chunk_ratio: SECTORS_PER_BITMAP * logical_sector_size / block_size,
            payload_blocks: virtual_size.div_ceil(block_size),
        }
    }

    /// Sector-bitmap blocks of a differencing disk.
    pub(crate) fn sector_bitmap_blocks(&self) -> u64 {
        self.payload_blocks.div_ceil(self.chunk_ratio)
    }

    /// Entries in the table (section 2.5).
    pub(crate) fn entries(&self, differencing: bool) -> u64 {
        if differencing {
            self.sector_bitmap_blocks() * (self.chunk_ratio + 1)
        } else {
            self.payload_blocks + self.payload_blocks.saturating_sub(1) / self.chunk_ratio
        }
    }

    /// Index of the entry of a payload block.
    pub(crate) fn payload_bat_index(&self, payload_block: u64) -> u64 {
        payload_block + payload_block / self.chunk_ratio
    }

    /// Index of the entry of the sector-bitmap block that describes a payload block.
    pub(crate) fn sector_bitmap_bat_index(&self, payload_block: u64) -> u64 {
        let chunk = payload_block / self.chunk_ratio;
        (chunk + 1) * self.chunk_ratio + chunk
    }

    /// The first payload block whose entry stands at or behind `bat_index`.
    pub(crate) fn payload_block_from(&self, bat_index: u64) -> u64 {
        let per_chunk = self.chunk_ratio + 1;
        bat_index / per_chunk * self.chunk_ratio + (bat_index % per_chunk).min(self.chunk_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_entries_are_interleaved() {
        // 1 MiB blocks and 512-byte sectors: the entry of block 4096 (4 GiB) is pushed back by one.
        let shape = BatShape::new(10 << 30, MIB, 512);
        assert_eq!(shape.chunk_ratio, 4096);
        assert_eq!(shape.payload_bat_index(4095), 4095);
        assert_eq!(shape.payload_bat_index(4096), 4097);
        assert_eq!(shape.sector_bitmap_bat_index(0), 4096);
        assert_eq!(shape.sector_bitmap_bat_index(4096), 8193);
        assert_eq!(shape.entries(false), 10_240 + 2);
        assert_eq!(shape.entries(true), 3 * 4097);
        for block in [0, 1, 4095, 4096, 8191, 8192, 10_239] {
            assert_eq!(shape.payload_block_from(shape.payload_bat_index(block)), block);
        }
        assert_eq!(shape.payload_block_from(4096), 4096);
    }

    #[test]
    fn a_whole_number_of_chunks_needs_no_last_bitmap_entry() {
        let shape = BatShape::new(4 << 30, MIB, 512);
        assert_eq!(shape.entries(false), 4096);
        assert_eq!(shape.entries(true), 4097);
        assert_eq!(BatShape::new(0, MIB, 512).entries(false), 0);
    }
}
