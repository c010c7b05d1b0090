//! Extent headers: decoding, encoding, and the layout of the data after them.

use imgtool_core::{Error, Result};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::layout::{
    BlockInfoLayout, CLUSTERS_PER_EXTENT, EXTENT_HEADER, EXTENT_MAGIC, ExtentLayout, SUB_BLOCK, extent_md5,
};
use crate::reference::ChecksumMismatch;

/// A slot of an extent header: the stored sub-blocks of one cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockInfo {
    /// Bit *i* is set if sub-block *i* is stored.
    pub mask: u16,
    /// Id of the cluster's device; 0 marks an empty slot.
    pub dev_id: u8,
    /// Cluster number within the device.
    pub cluster_num: u32,
}

impl BlockInfo {
    /// Returns the number of sub-blocks that the slot stores: 0 for an empty slot, whatever its mask.
    pub fn stored(&self) -> u32 {
        if self.dev_id == 0 { 0 } else { self.mask.count_ones() }
    }
}

/// Content of an extent header, without the magic number, the UUID and the checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentHeader {
    /// Number of sub-blocks that follow the header.
    pub block_count: u16,
    /// All slots, empty ones included.
    pub slots: [BlockInfo; CLUSTERS_PER_EXTENT],
    /// True if a reserved byte of a slot, which readers ignore, is not zero.
    pub reserved_used: bool,
}

impl ExtentHeader {
    /// Returns a header without clusters.
    pub fn empty() -> Self {
        Self { block_count: 0, slots: [BlockInfo::default(); CLUSTERS_PER_EXTENT], reserved_used: false }
    }

    /// Decodes an extent header of the archive with the UUID `uuid`.
    ///
    /// # Errors
    /// Fails if the checksum, the UUID, the magic number or the first reserved field is wrong. The checks run
    /// in this order.
    pub fn parse(raw: &[u8; EXTENT_HEADER], uuid: &[u8; 16]) -> Result<Self> {
        // The conversion never fails: layout.rs asserts that the sizes are equal.
        let Ok(layout) = ExtentLayout::ref_from_bytes(raw) else {
            return Err(Error::malformed("an extent header has a wrong length"));
        };
        if layout.md5 != extent_md5(raw) {
            return Err(ChecksumMismatch::ExtentHeader.error());
        }
        if layout.uuid != *uuid {
            return Err(Error::corrupt("wrong vma extent uuid"));
        }
        if layout.magic != EXTENT_MAGIC || layout.reserved1.get() != 0 {
            return Err(Error::malformed("wrong vma extent header magic"));
        }
        let slots = layout.blockinfo.map(|slot| BlockInfo {
            mask: slot.mask.get(),
            dev_id: slot.dev_id,
            cluster_num: slot.cluster_num.get(),
        });
        let reserved_used = layout.blockinfo.iter().any(|slot| slot.reserved != 0);
        Ok(Self { block_count: layout.block_count.get(), slots, reserved_used })
    }

    /// Encodes the header for the archive with the UUID `uuid`.
    pub fn encode(&self, uuid: &[u8; 16]) -> [u8; EXTENT_HEADER] {
        let mut layout = ExtentLayout::new_zeroed();
        layout.magic = EXTENT_MAGIC;
        layout.block_count = self.block_count.into();
        layout.uuid = *uuid;
        layout.blockinfo = self.slots.map(|slot| BlockInfoLayout {
            mask: slot.mask.into(),
            reserved: 0,
            dev_id: slot.dev_id,
            cluster_num: slot.cluster_num.into(),
        });
        let mut raw = [0; EXTENT_HEADER];
        raw.copy_from_slice(layout.as_bytes());
        let md5 = extent_md5(&raw);
        raw[24..40].copy_from_slice(&md5);
        raw
    }

    /// Returns the length in bytes of the data after the header.
    pub fn data_len(&self) -> u64 {
        u64::from(self.block_count) * SUB_BLOCK
    }

    /// Returns, for each slot, the number of sub-blocks stored before its own.
    pub fn first_blocks(&self) -> [u32; CLUSTERS_PER_EXTENT] {
        let mut before = 0;
        self.slots.map(|slot| {
            let first = before;
            before += slot.stored();
            first
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = *b"0123456789abcdef";

    fn sample() -> ExtentHeader {
        let mut header = ExtentHeader::empty();
        header.slots[0] = BlockInfo { mask: 0x8001, dev_id: 1, cluster_num: 7 };
        header.slots[1] = BlockInfo { mask: 0xffff, dev_id: 0, cluster_num: 9 };
        header.slots[58] = BlockInfo { mask: 0x0010, dev_id: 254, cluster_num: u32::MAX };
        header.block_count = 3;
        header
    }

    #[test]
    fn parse_inverts_encode() {
        let header = sample();
        let raw = header.encode(&UUID);
        assert_eq!(&raw[..8], b"VMAE\0\0\0\x03");
        assert_eq!(&raw[40..48], &[0x80, 0x01, 0, 1, 0, 0, 0, 7]);
        assert_eq!(ExtentHeader::parse(&raw, &UUID).expect("parse"), header);
        assert_eq!(header.first_blocks()[58], 2);
    }

    #[test]
    fn parse_detects_any_flipped_bit() {
        let raw = sample().encode(&UUID);
        for bit in 0..EXTENT_HEADER * 8 {
            let mut flipped = raw;
            flipped[bit / 8] ^= 1 << (bit % 8);
            let error = ExtentHeader::parse(&flipped, &UUID).expect_err("a flipped bit");
            assert_eq!(error.message(), "wrong vma extent header checksum", "bit {bit}");
        }
    }
}
