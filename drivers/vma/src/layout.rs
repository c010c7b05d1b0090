//! Constants and structures of the on-disk format, from the VMA specification.
//!
//! Integers are big endian, except the two-byte length before a blob, which is little endian. An
//! archive is a header of `header_size` bytes followed by extents, back to back to the end of the
//! file: no index, no trailer, no padding.

use md5::{Digest, Md5};
use zerocopy::big_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of an archive.
pub const MAGIC: [u8; 4] = *b"VMA\0";
/// First four bytes of an extent.
pub const EXTENT_MAGIC: [u8; 4] = *b"VMAE";
/// The only version of the format.
pub const VERSION: u32 = 1;

/// Size in bytes of a sub-block, the unit that is stored or omitted: 4 KiB. The specification calls it a
/// block.
pub const SUB_BLOCK: u64 = 4096;
/// Number of sub-blocks in a cluster, one for each bit of a mask.
pub const SUB_BLOCKS_PER_CLUSTER: u64 = 16;
/// Size in bytes of a cluster, the unit that a slot describes: 64 KiB.
pub const CLUSTER: u64 = SUB_BLOCK * SUB_BLOCKS_PER_CLUSTER;
/// Number of slots in an extent, one per cluster.
pub const CLUSTERS_PER_EXTENT: usize = 59;
/// Maximum number of sub-blocks in an extent: 944.
pub const MAX_BLOCK_COUNT: u64 = CLUSTERS_PER_EXTENT as u64 * SUB_BLOCKS_PER_CLUSTER;

/// Length in bytes of the fixed part of the archive header; the blobs follow it.
pub const HEADER_FIXED: usize = 12_288;
/// Length in bytes of an extent header.
pub const EXTENT_HEADER: usize = 512;
/// Length in bytes of the longest extent: a header and 944 sub-blocks.
pub const MAX_EXTENT: u64 = EXTENT_HEADER as u64 + MAX_BLOCK_COUNT * SUB_BLOCK;

/// Maximum length in bytes of an archive header that the driver reads. Our limit, because the driver keeps
/// the whole header in memory; the reference program reads up to 2 GiB and writes at most 512 KiB.
pub const MAX_HEADER_READ: u32 = 16 << 20;
/// Maximum length in bytes of an archive header that the driver writes: the reference program's limit.
pub const MAX_HEADER_WRITTEN: usize = 524_288;
/// Maximum number of clusters in a device (256 TiB): cluster numbers have 32 bits.
pub const MAX_CLUSTERS: u64 = 1 << 32;
/// Size in bytes of the largest device.
pub const MAX_DEVICE_SIZE: u64 = MAX_CLUSTERS * CLUSTER;
/// Number of clusters in a word of the reference program's cluster bitmap. Like that program, the driver
/// accepts zero clusters past the end of a disk up to the next multiple of this number.
pub const CLUSTER_MAP_UNIT: u64 = 64;

/// Number of entries in each table of the archive header.
pub const TABLE_ENTRIES: usize = 256;
/// Highest `dev_id` of a device; 0 marks an empty slot, 255 is reserved.
pub const MAX_DEV_ID: u8 = 254;
/// Name of the device that contains the state of a running guest.
pub const VMSTATE_NAME: &str = "vmstate";
/// Maximum length in bytes of a blob: the length field has 16 bits.
pub const MAX_BLOB: usize = 65_535;

/// Entry of the device table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceInfoLayout {
    /// +0: offset of the name in the blob area; 0 means none.
    pub name_offset: U32,
    /// +4: ignored.
    pub reserved: U32,
    /// +8: size in bytes of the device.
    pub device_size: U64,
    /// +16: ignored.
    pub reserved_tail: [u8; 16],
}

/// Fixed part of the archive header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct HeaderLayout {
    /// +0: [`MAGIC`].
    pub magic: [u8; 4],
    /// +4: [`VERSION`].
    pub version: U32,
    /// +8: UUID in RFC byte order, repeated in every extent.
    pub uuid: [u8; 16],
    /// +24: creation time, in seconds since 1970.
    pub ctime: I64,
    /// +32: MD5 of the whole header with this field zero.
    pub md5: [u8; 16],
    /// +48: archive offset of the blob area, at least [`HEADER_FIXED`].
    pub blob_buffer_offset: U32,
    /// +52: size in bytes of the blob area, without the padding after it.
    pub blob_buffer_size: U32,
    /// +56: length in bytes of the whole header.
    pub header_size: U32,
    /// +60: ignored.
    pub reserved: [u8; 1984],
    /// +2044: offsets of the configurations' names in the blob area; 0 means none.
    pub config_names: [U32; TABLE_ENTRIES],
    /// +3068: offsets of the configurations' content in the blob area; 0 means none.
    pub config_data: [U32; TABLE_ENTRIES],
    /// +4092: ignored.
    pub reserved_tail: [u8; 4],
    /// +4096: device table; the index is the `dev_id`.
    pub dev_info: [DeviceInfoLayout; TABLE_ENTRIES],
}

/// Slot of an extent header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockInfoLayout {
    /// +0: bit *i* is set if sub-block *i* of the cluster is stored.
    pub mask: U16,
    /// +2: ignored.
    pub reserved: u8,
    /// +3: id of the cluster's device; 0 marks an empty slot.
    pub dev_id: u8,
    /// +4: cluster number within the device.
    pub cluster_num: U32,
}

/// Extent header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtentLayout {
    /// +0: [`EXTENT_MAGIC`].
    pub magic: [u8; 4],
    /// +4: must be 0.
    pub reserved1: U16,
    /// +6: number of sub-blocks after the header.
    pub block_count: U16,
    /// +8: UUID of the archive.
    pub uuid: [u8; 16],
    /// +24: MD5 of this header with this field zero.
    pub md5: [u8; 16],
    /// +40: the slots.
    pub blockinfo: [BlockInfoLayout; CLUSTERS_PER_EXTENT],
}

const _: () = assert!(size_of::<DeviceInfoLayout>() == 32);
const _: () = assert!(size_of::<HeaderLayout>() == HEADER_FIXED);
const _: () = assert!(std::mem::offset_of!(HeaderLayout, md5) == 32);
const _: () = assert!(std::mem::offset_of!(HeaderLayout, config_names) == 2044);
const _: () = assert!(std::mem::offset_of!(HeaderLayout, config_data) == 3068);
const _: () = assert!(std::mem::offset_of!(HeaderLayout, dev_info) == 4096);
const _: () = assert!(size_of::<BlockInfoLayout>() == 8);
const _: () = assert!(size_of::<ExtentLayout>() == EXTENT_HEADER);
const _: () = assert!(std::mem::offset_of!(ExtentLayout, md5) == 24);
const _: () = assert!(std::mem::offset_of!(ExtentLayout, blockinfo) == 40);

/// Returns the MD5 of `bytes`, computed as if the sixteen bytes at `field` were zero.
///
/// # Panics
/// Panics if `bytes` ends before the field does.
pub fn md5_without_field(bytes: &[u8], field: usize) -> [u8; 16] {
    let mut md5 = Md5::new();
    md5.update(&bytes[..field]);
    md5.update([0; 16]);
    md5.update(&bytes[field + 16..]);
    md5.finalize().into()
}

/// Returns the MD5 of a whole archive header, which must be at least [`HEADER_FIXED`] bytes long.
pub fn header_md5(header: &[u8]) -> [u8; 16] {
    md5_without_field(header, std::mem::offset_of!(HeaderLayout, md5))
}

/// Returns the MD5 of an extent header.
pub fn extent_md5(header: &[u8; EXTENT_HEADER]) -> [u8; 16] {
    md5_without_field(header, std::mem::offset_of!(ExtentLayout, md5))
}

/// Returns the number of clusters in a device of `size` bytes, including a partial last one.
pub fn clusters_of(size: u64) -> u64 {
    size.div_ceil(CLUSTER)
}
