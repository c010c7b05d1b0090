//! Entries of L1, L2 and refcount tables and of refcount blocks. The bit masks are private to this module.

use super::{SECTOR, SUBCLUSTERS};

/// Bits 9-55: a host offset. Specification, "L1 table entry" and "Standard Cluster Descriptor".
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount is exactly one. Specification, "L1 table entry" and "L2 table entry".
const COPIED: u64 = 1 << 63;
/// Bit 62: the cluster is compressed. Specification, "L2 table entry".
const COMPRESSED: u64 = 1 << 62;
/// Bit 0: the cluster reads as zeros. Specification, "Standard Cluster Descriptor".
const ZERO: u64 = 1;
/// Reserved bits of an L1 entry. Specification, "L1 table entry".
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of a standard L2 entry. Specification, "Standard Cluster Descriptor".
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Reserved bits of a refcount table entry. Specification, "Refcount table entry".
const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;

/// Shape of the two-level mapping: cluster size and entry format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// True if L2 entries have 16 bytes and describe subclusters.
    pub extended_l2: bool,
}

impl Shape {
    /// Returns the size in bytes of a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the number of entries in an L2 table, as a power of two.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Returns the number of entries in an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Returns the number of eight-byte words in an L2 entry.
    pub fn l2_entry_words(self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Returns the number of guest bytes that an L2 table describes, as a power of two: at most 39.
    pub fn l2_reach_bits(self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Returns the size in bytes of a subcluster, or of a cluster without extended L2 entries.
    pub fn subcluster_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// Returns the number of L1 entries that a disk of `virtual_size` bytes needs.
    pub fn l1_entries(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(1 << self.l2_reach_bits())
    }

    /// Returns the offset within its cluster of a guest or host `offset`.
    pub fn within_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Returns the number of bits of the host offset in a compressed cluster descriptor. Specification,
    /// "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
    fn compressed_offset_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}

/// Entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// Creates an entry for an L2 table with a refcount of one.
    pub fn new(l2_offset: u64) -> Self {
        Self(l2_offset | COPIED)
    }

    /// Returns the host offset of the L2 table; 0 if there is none.
    pub fn l2_offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// True if the entry claims a refcount of one for the L2 table.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Returns the entry with the claim of a refcount of one, or without it.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }

    /// Returns the reserved bits that are set.
    pub fn reserved(self) -> u64 {
        self.0 & L1_RESERVED
    }
}

/// First eight bytes of an L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// Host range of a compressed cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedRange {
    /// Host offset of the first byte, not necessarily aligned.
    pub host_offset: u64,
    /// Maximum length in bytes: the data ends somewhere in the last sector.
    pub max_len: u64,
}

impl L2Entry {
    /// Entry of a cluster that reads as zeros, in version 3 without extended L2 entries.
    pub const ZEROS: Self = Self(ZERO);

    /// Creates an entry for a data cluster with a refcount of one.
    pub fn data(host_offset: u64) -> Self {
        Self(host_offset | COPIED)
    }

    /// Creates an entry for a compressed cluster; `None` if `range` is empty or does not fit.
    pub fn compressed(shape: Shape, range: CompressedRange) -> Option<Self> {
        let bits = shape.compressed_offset_bits();
        if range.max_len == 0 || range.host_offset >> bits.min(56) != 0 {
            return None;
        }
        let last = range.host_offset.checked_add(range.max_len - 1)?;
        let additional = last / SECTOR - range.host_offset / SECTOR;
        (additional >> (62 - bits) == 0).then_some(Self(COMPRESSED | additional << bits | range.host_offset))
    }

    /// True if the cluster is compressed.
    pub fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// True if the entry claims a refcount of one for the cluster.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Returns the entry with the claim of a refcount of one, or without it.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }

    /// True if the zero flag of a standard cluster descriptor is set.
    pub fn reads_as_zeros(self) -> bool {
        self.0 & ZERO != 0
    }

    /// Returns the host offset of a standard cluster; 0 if there is none.
    pub fn host_offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Returns the reserved bits of a standard cluster descriptor that are set.
    pub fn reserved(self) -> u64 {
        self.0 & L2_RESERVED
    }

    /// Returns the host range of a compressed cluster.
    pub fn compressed_range(self, shape: Shape) -> CompressedRange {
        let bits = shape.compressed_offset_bits();
        let host_offset = self.0 & ((1 << bits) - 1);
        let additional = (self.0 & (COMPRESSED - 1)) >> bits;
        CompressedRange { host_offset, max_len: (additional + 1) * SECTOR - host_offset % SECTOR }
    }
}

/// Second eight bytes of an extended L2 entry: the status of each subcluster. Bits 0-31 mark data, bits 32-63
/// zeros. Specification, "Extended L2 Entries".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subclusters(pub u64);

/// Status of a subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubclusterStatus {
    /// Data in the host cluster.
    Allocated,
    /// Zeros.
    Zero,
    /// Content of the backing image, or zeros without one.
    Unallocated,
    /// Both bits are set, which the specification forbids.
    Invalid,
}

impl Subclusters {
    /// Bitmap with all subclusters marked as data.
    pub const ALL_ALLOCATED: Self = Self(0xffff_ffff);
    /// Bitmap with all subclusters marked as zeros.
    pub const ALL_ZERO: Self = Self(0xffff_ffff << 32);

    /// Returns the status of subcluster `index`, and the number of subclusters from there on that share it.
    pub fn run(self, index: u32) -> (SubclusterStatus, u32) {
        let allocated = (self.0 & 0xffff_ffff) as u32 >> index;
        let zero = (self.0 >> 32) as u32 >> index;
        let same = |bits: u32| if bits & 1 == 1 { bits.trailing_ones() } else { bits.trailing_zeros() };
        let len = same(allocated).min(same(zero)).min(SUBCLUSTERS as u32 - index);
        let status = match (allocated & 1, zero & 1) {
            (1, 1) => SubclusterStatus::Invalid,
            (1, _) => SubclusterStatus::Allocated,
            (_, 1) => SubclusterStatus::Zero,
            _ => SubclusterStatus::Unallocated,
        };
        (status, len)
    }

    /// Marks `count` subclusters from `first` on as data.
    pub fn allocate(&mut self, first: u32, count: u32) {
        let mask = ((1u64 << count) - 1) << first;
        self.0 = (self.0 | mask) & !(mask << 32);
    }

    /// Marks all subclusters without data as zeros.
    pub fn zero_the_rest(&mut self) {
        self.0 |= (!self.0 & 0xffff_ffff) << 32;
    }

    /// True if any subcluster is marked as data.
    pub fn any_allocated(self) -> bool {
        self.0 & 0xffff_ffff != 0
    }

    /// True if any subcluster has both bits set.
    pub fn is_invalid(self) -> bool {
        self.0 & (self.0 >> 32) & 0xffff_ffff != 0
    }
}

/// Entry of the refcount table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Returns the host offset of the refcount block; 0 if there is none.
    pub fn block_offset(self) -> u64 {
        self.0 & !REFCOUNT_TABLE_RESERVED
    }

    /// Returns the reserved bits that are set.
    pub fn reserved(self) -> u64 {
        self.0 & REFCOUNT_TABLE_RESERVED
    }
}

/// Returns the largest refcount of 2^order bits.
pub fn max_refcount(order: u32) -> u64 {
    if order == 6 { u64::MAX } else { (1 << (1u64 << order)) - 1 }
}

/// Returns entry `index` of a refcount block whose entries have `1 << order` bits; 0 beyond its end.
///
/// Entries narrower than a byte fill it from the least significant bit. Specification, "Refcount block
/// entry".
pub fn refcount(block: &[u8], order: u32, index: usize) -> u64 {
    if order >= 3 {
        let width = 1usize << (order - 3);
        let bytes = block.get(index * width..(index + 1) * width).unwrap_or_default();
        bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    } else {
        let per_byte = 8 >> order;
        let byte = block.get(index / per_byte).copied().unwrap_or_default();
        let shift = (index % per_byte) << order;
        u64::from(byte >> shift) & ((1 << (1 << order)) - 1)
    }
}

/// Sets entry `index` of a refcount block to `value`, which must fit into `1 << order` bits.
pub fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    if order >= 3 {
        let width = 1usize << (order - 3);
        let bytes = value.to_be_bytes();
        block[index * width..(index + 1) * width].copy_from_slice(&bytes[8 - width..]);
    } else {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = (((1u32 << (1 << order)) - 1) as u8) << shift;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !mask | (value as u8) << shift;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn compressed_descriptors_round_trip_in_sectors() {
        for cluster_bits in 9..=21 {
            let shape = Shape { cluster_bits, extended_l2: false };
            for (host_offset, max_len) in
                [(1u64 << 20, 1), ((1 << 20) + 511, 2), (777_777, 1 << cluster_bits)]
            {
                let entry = L2Entry::compressed(shape, CompressedRange { host_offset, max_len }).unwrap();
                let range = entry.compressed_range(shape);
                assert!(entry.is_compressed() && !entry.is_copied());
                assert_eq!(range.host_offset, host_offset);
                assert_eq!(
                    host_offset + range.max_len,
                    (host_offset + max_len).next_multiple_of(SECTOR),
                    "cluster_bits {cluster_bits}"
                );
            }
        }
        let shape = Shape { cluster_bits: 21, extended_l2: false };
        assert!(L2Entry::compressed(shape, CompressedRange { host_offset: 1 << 49, max_len: 9 }).is_none());
    }

    #[test]
    fn sets_and_reads_refcounts_of_every_width() {
        for order in 0..=6 {
            let mut block = vec![0u8; 512];
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            set_refcount(&mut block, order, 5, max);
            set_refcount(&mut block, order, 6, 1);
            assert_eq!(refcount(&block, order, 5), max);
            assert_eq!(refcount(&block, order, 6), 1);
            assert_eq!(refcount(&block, order, 4), 0);
            assert_eq!(refcount(&block, order, 7), 0);
            set_refcount(&mut block, order, 5, 0);
            assert_eq!(refcount(&block, order, 5), 0);
        }
        // A block of 2-bit refcounts as qemu-img writes it: five clusters with one reference each.
        assert_eq!((0..6).map(|i| refcount(&[0x55, 0x01], 1, i)).collect::<Vec<_>>(), [1, 1, 1, 1, 1, 0]);
    }

    #[test]
    fn finds_runs_of_equal_subclusters() {
        let mut bits = Subclusters::default();
        assert_eq!(bits.run(0), (SubclusterStatus::Unallocated, 32));
        bits.allocate(4, 2);
        assert_eq!(bits.run(0), (SubclusterStatus::Unallocated, 4));
        assert_eq!(bits.run(5), (SubclusterStatus::Allocated, 1));
        bits.zero_the_rest();
        assert_eq!(bits.run(6), (SubclusterStatus::Zero, 26));
        assert!(!bits.is_invalid());
        bits.allocate(0, 32);
        assert_eq!(bits, Subclusters::ALL_ALLOCATED);
        assert_eq!(bits.run(0), (SubclusterStatus::Allocated, 32));
        assert_eq!(Subclusters(1 << 32 | 1).run(0), (SubclusterStatus::Invalid, 1));
    }
}
