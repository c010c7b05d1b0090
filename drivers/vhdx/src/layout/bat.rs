//! The block allocation table, BAT (section 2.5): the state and file offset of every block.
//!
//! The payload blocks form chunks of r = `chunk_ratio` blocks. The entries of a chunk's payload blocks (P)
//! are followed by the entry of its sector-bitmap block (S). Every type of file has these S entries, but only
//! differencing files use them:
//!
//! ```text
//! P0 P1 … P(r-1) S0  Pr … P(2r-1) S1  …
//! ```

use super::MIB;

/// Number of logical sectors that a sector-bitmap block describes: one per bit of its 1 MiB (section 2.4).
pub(crate) const SECTORS_PER_BITMAP: u64 = 1 << 23;
/// Size in bytes of a sector-bitmap block (section 2.4).
pub(crate) const SECTOR_BITMAP_LEN: u64 = MIB;
/// Length in bytes of a BAT entry (section 2.5.1).
pub(crate) const ENTRY_LEN: u64 = 8;
/// Minimum size in bytes of a payload block; every size is a power of two (section 2.6.2.1).
pub(crate) const MIN_BLOCK_SIZE: u64 = MIB;
/// Maximum size in bytes of a payload block (section 2.6.2.1).
pub(crate) const MAX_BLOCK_SIZE: u64 = 256 * MIB;

/// Bits 0..3 of an entry: the state (section 2.5.1).
const STATE_MASK: u64 = 7;
/// Bits 20..64 of an entry: the file offset in MiB. Masked but not shifted, they are the offset in bytes.
const OFFSET_MASK: u64 = !(MIB - 1);

/// A BAT entry as stored in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatEntry(pub(crate) u64);

/// State of a payload block (section 2.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PayloadState {
    /// 0: not in this file; zeros, or the parent's content in a differencing file.
    NotPresent,
    /// 1: content undefined; read as zeros, never from the parent.
    Undefined,
    /// 2: zeros.
    Zero,
    /// 3, or 5 in files written to version 0.95 of the specification: discarded by the guest; read as zeros,
    /// never from the parent.
    Unmapped,
    /// 6: the whole block is in this file.
    FullyPresent,
    /// 7: some sectors are in this file, as the sector bitmap says; differencing files only.
    PartiallyPresent,
    /// 4: reserved.
    Reserved(u8),
}

/// State of a sector-bitmap block (section 2.5.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SectorBitmapState {
    /// 0: not in this file.
    NotPresent,
    /// 6: in this file.
    Present,
    /// Any other state: reserved.
    Reserved(u8),
}

impl BatEntry {
    /// Creates the entry of a payload block that is fully present at `file_offset`, a multiple of 1 MiB, or
    /// of a sector-bitmap block there, whose state has the same number.
    pub(crate) fn fully_present(file_offset: u64) -> Self {
        Self((file_offset & OFFSET_MASK) | 6)
    }

    /// Entry of a payload block of zeros.
    pub(crate) const ZERO: Self = Self(2);

    /// Creates the entry of a payload block of which some sectors are at `file_offset`, a multiple of 1 MiB.
    pub(crate) fn partially_present(file_offset: u64) -> Self {
        Self((file_offset & OFFSET_MASK) | 7)
    }

    /// Returns the block's file offset in bytes; meaningful only if the block is present.
    pub(crate) fn file_offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Decodes the state bits as the state of a payload block.
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

    /// Decodes the state bits as the state of a sector-bitmap block.
    pub(crate) fn sector_bitmap_state(self) -> SectorBitmapState {
        match self.0 & STATE_MASK {
            0 => SectorBitmapState::NotPresent,
            6 => SectorBitmapState::Present,
            other => SectorBitmapState::Reserved(other as u8),
        }
    }
}

/// Dimensions of a disk's BAT. They determine the index of every entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatShape {
    /// Size in bytes of a payload block.
    pub(crate) block_size: u64,
    /// Size in bytes of a logical sector.
    pub(crate) logical_sector_size: u64,
    /// Number of payload blocks per sector-bitmap block (section 2.5).
    pub(crate) chunk_ratio: u64,
    /// Number of payload blocks of the disk.
    pub(crate) payload_blocks: u64,
}

impl BatShape {
    /// Computes the shape for a disk. Sizes are in bytes and must be within the format's limits.
    pub(crate) fn new(virtual_size: u64, block_size: u64, logical_sector_size: u64) -> Self {
        Self {
            block_size,
            logical_sector_size,
            chunk_ratio: SECTORS_PER_BITMAP * logical_sector_size / block_size,
            payload_blocks: virtual_size.div_ceil(block_size),
        }
    }

    /// Returns the number of sector-bitmap blocks of a differencing disk.
    pub(crate) fn sector_bitmap_blocks(&self) -> u64 {
        self.payload_blocks.div_ceil(self.chunk_ratio)
    }

    /// Returns the number of entries in the table (section 2.5).
    pub(crate) fn entries(&self, differencing: bool) -> u64 {
        if differencing {
            self.sector_bitmap_blocks() * (self.chunk_ratio + 1)
        } else {
            self.payload_blocks + self.payload_blocks.saturating_sub(1) / self.chunk_ratio
        }
    }

    /// Returns the index of a payload block's entry.
    pub(crate) fn payload_bat_index(&self, payload_block: u64) -> u64 {
        payload_block + payload_block / self.chunk_ratio
    }

    /// Returns the index of the entry of the sector-bitmap block that covers a payload block.
    pub(crate) fn sector_bitmap_bat_index(&self, payload_block: u64) -> u64 {
        let chunk = payload_block / self.chunk_ratio;
        (chunk + 1) * self.chunk_ratio + chunk
    }

    /// Returns the first payload block whose entry is at or after `bat_index`.
    pub(crate) fn payload_block_from(&self, bat_index: u64) -> u64 {
        let per_chunk = self.chunk_ratio + 1;
        bat_index / per_chunk * self.chunk_ratio + (bat_index % per_chunk).min(self.chunk_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaves_bitmap_entries() {
        // With 1 MiB blocks and 512-byte sectors, the first bitmap entry precedes the entry of block 4096.
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
    fn omits_the_bitmap_entry_of_a_full_last_chunk() {
        let shape = BatShape::new(4 << 30, MIB, 512);
        assert_eq!(shape.entries(false), 4096);
        assert_eq!(shape.entries(true), 4097);
        assert_eq!(BatShape::new(0, MIB, 512).entries(false), 0);
    }
}
