//! The archive on disk: constants and structures, offset for offset.
//!
//! All integers are big endian, except the two-byte length in front of a blob, which is little
//! endian. An archive is a header of `header_size` bytes and then extents, back to back until the end
//! of the file: no index, no trailer, no padding.

use md5::{Digest, Md5};
use zerocopy::big_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first four bytes of an archive.
pub const MAGIC: [u8; 4] = *b"VMA\0";
/// The first four bytes of an extent.
pub const EXTENT_MAGIC: [u8; 4] = *b"VMAE";
/// The only version.
pub const VERSION: u32 = 1;

/// The unit that is stored or left out: 4 KiB.
pub const SUB_BLOCK: u64 = 4096;
/// Sub-blocks of a cluster.
pub const SUB_BLOCKS_PER_CLUSTER: u64 = 16;
/// The unit that a slot describes: 64 KiB.
pub const CLUSTER: u64 = SUB_BLOCK * SUB_BLOCKS_PER_CLUSTER;
/// Slots of an extent.
pub const CLUSTERS_PER_EXTENT: usize = 59;
/// Most sub-blocks that an extent can hold: 944.
pub const MAX_BLOCK_COUNT: u64 = CLUSTERS_PER_EXTENT as u64 * SUB_BLOCKS_PER_CLUSTER;

/// The fixed part of the header.
pub const HEADER_FIXED: usize = 12_288;
/// An extent's header.
pub const EXTENT_HEADER: usize = 512;
/// The longest extent: header and 944 sub-blocks.
pub const MAX_EXTENT: u64 = EXTENT_HEADER as u64 + MAX_BLOCK_COUNT * SUB_BLOCK;

/// The longest header that is read. Ours: the field allows 2 GiB, the reference program writes at
/// most 512 KiB, and all of it is held in memory.
pub const MAX_HEADER_READ: u32 = 16 << 20;
/// The longest header that is written: the reference program's own limit.
pub const MAX_HEADER_WRITTEN: usize = 524_288;
/// Clusters of a device: cluster numbers have 32 bits (256 TiB).
pub const MAX_CLUSTERS: u64 = 1 << 32;
/// The largest device, bytes.
pub const MAX_DEVICE_SIZE: u64 = MAX_CLUSTERS * CLUSTER;
/// Zero clusters past the end of a device are taken up to the next multiple of this: the reference
/// program keeps its map of clusters in words of 64 bits.
pub const CLUSTER_MAP_UNIT: u64 = 64;

/// Entries of each table of the header.
pub const TABLE_ENTRIES: usize = 256;
/// The highest `dev_id` that holds content; 0 means an empty slot, 255 is reserved.
pub const MAX_DEV_ID: u8 = 254;
/// The name that marks the state of a running guest.
pub const VMSTATE_NAME: &str = "vmstate";
/// The longest blob: its length has 16 bits.
pub const MAX_BLOB: usize = 65_535;

/// An entry of the device table.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceInfoLayout {
    /// +0: blob offset of the name.
    pub name_offset: U32,
    /// +4: ignored.
    pub reserved: U32,
    /// +8: bytes.
    pub device_size: U64,
    /// +16: ignored.
    pub reserved_tail: [u8; 16],
}

/// The fixed part of the header.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct HeaderLayout {
    /// +0: [`MAGIC`].
    pub magic: [u8; 4],
    /// +4: [`VERSION`].
    pub version: U32,
    /// +8: repeated in every extent.
    pub uuid: [u8; 16],
    /// +24: seconds since 1970.
    pub ctime: I64,
    /// +32: MD5 of the whole header with this field zero.
    pub md5: [u8; 16],
    /// +48: where the blobs begin, at least [`HEADER_FIXED`].
    pub blob_buffer_offset: U32,
    /// +52: bytes of blobs, not rounded.
    pub blob_buffer_size: U32,
    /// +56: bytes of the whole header.
    pub header_size: U32,
    /// +60: ignored.
    pub reserved: [u8; 1984],
    /// +2044: blob offsets of the names of configurations.
    pub config_names: [U32; TABLE_ENTRIES],
    /// +3068: blob offsets of their content.
    pub config_data: [U32; TABLE_ENTRIES],
    /// +4092: ignored.
    pub reserved_tail: [u8; 4],
    /// +4096: the devices; the index is the `dev_id`.
    pub dev_info: [DeviceInfoLayout; TABLE_ENTRIES],
}

/// A slot of an extent.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockInfoLayout {
    /// +0: bit *i* set: sub-block *i* of the cluster is stored.
    pub mask: U16,
    /// +2: ignored.
    pub reserved: u8,
    /// +3: 0 for an empty slot.
    pub dev_id: u8,
    /// +4: cluster number within the device.
    pub cluster_num: U32,
}

/// The header of an extent.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtentLayout {
    /// +0: [`EXTENT_MAGIC`].
    pub magic: [u8; 4],
    /// +4: must be 0.
    pub reserved1: U16,
    /// +6: sub-blocks that follow the header.
    pub block_count: U16,
    /// +8: the archive's.
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

/// MD5 of `bytes` with the sixteen bytes at `field` taken as zero. `bytes` reaches past the field.
pub fn md5_without_field(bytes: &[u8], field: usize) -> [u8; 16] {
    let mut md5 = Md5::new();
    md5.update(&bytes[..field]);
    md5.update([0; 16]);
    md5.update(&bytes[field + 16..]);
    md5.finalize().into()
}

/// MD5 of a whole archive header, at least [`HEADER_FIXED`] bytes.
pub fn header_md5(header: &[u8]) -> [u8; 16] {
    md5_without_field(header, std::mem::offset_of!(HeaderLayout, md5))
}

/// MD5 of an extent's header.
pub fn extent_md5(header: &[u8; EXTENT_HEADER]) -> [u8; 16] {
    md5_without_field(header, std::mem::offset_of!(ExtentLayout, md5))
}

/// Clusters that a device of `size` bytes needs.
pub fn clusters_of(size: u64) -> u64 {
    size.div_ceil(CLUSTER)
}
