//! On-disk structures of the specification "Qcow2 Image File Format" (QEMU's docs/interop/qcow2), and their
//! limits. All numbers are big-endian. These modules read only the first cluster, the snapshot table and the
//! bitmap directory.

pub mod bitmap;
pub mod entry;
pub mod extension;
pub mod header;
pub mod snapshot;
pub mod table;

/// Name of the format and of its driver.
pub const FORMAT: &str = "qcow2";

/// Size in bytes of a sector, the unit in which the length of a compressed cluster is stored. Specification,
/// "Compressed Clusters Descriptor".
pub const SECTOR: u64 = 512;

/// Maximum size in bytes of an L1 table. QEMU's limit.
pub const MAX_L1_BYTES: u64 = 32 << 20;

/// Maximum size in bytes of the refcount table. QEMU's limit.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Maximum length in bytes of a backing file's name. Specification, "backing_file_size".
pub const MAX_BACKING_NAME: u32 = 1023;

/// Maximum number of internal snapshots. QEMU's limit.
pub const MAX_SNAPSHOTS: u32 = 65_536;

/// Maximum memory in bytes for a list of snapshots or bitmaps; further entries are counted but not listed.
/// Our limit: about 16000 entries with short names, which take about 30 MiB as JSON.
pub const MAX_LISTED_BYTES: usize = 4 << 20;

/// Memory in bytes charged for a listed entry, in addition to its names.
pub const LISTED_ENTRY_BYTES: usize = 256;

/// Maximum size in bytes of the snapshot table. QEMU's limit.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// Maximum number of bitmaps. QEMU's limit.
pub const MAX_BITMAPS: u32 = 65_535;

/// Maximum size in bytes of the bitmap directory. QEMU's limit, 1 KiB for each of 65535 bitmaps, rounded up.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;

/// Maximum length in bytes of a bitmap's name. QEMU's limit.
pub const MAX_BITMAP_NAME: usize = 1023;

/// Maximum length in bytes of the bits of a bitmap. QEMU's limit.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;

/// Maximum length in bytes of the bits of all bitmaps that are copied. Our limit: bitmaps of a small file may
/// share their clusters, but each becomes a copy.
pub const MAX_COPIED_BITMAP_BYTES: u64 = 4 << 30;

/// Minimum cluster size as a power of two: 512 bytes. Specification, "cluster_bits".
pub const MIN_CLUSTER_BITS: u32 = 9;

/// Maximum cluster size as a power of two: 2 MiB. QEMU's limit.
pub const MAX_CLUSTER_BITS: u32 = 21;

/// Minimum cluster size with extended L2 entries, as a power of two: 16 KiB. Specification, "Extended L2
/// Entries".
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Number of subclusters in a cluster with extended L2 entries. Specification, "Extended L2 Entries".
pub const SUBCLUSTERS: u64 = 32;

/// Maximum length in bytes of a name in a header extension. Our limit, the same as for a backing file's name.
pub const MAX_EXTENSION_TEXT: usize = 1023;
