//! On-disk structures of the specification "Qcow2 Image File Format" (QEMU's docs/interop/qcow2), and
//! the limits on them. All numbers are big-endian. These modules read only the first cluster, the
//! snapshot table and the bitmap directory.

pub mod bitmap;
pub mod entry;
pub mod extension;
pub mod header;
pub mod snapshot;
pub mod table;

/// Name of the format, and of the driver.
pub const FORMAT: &str = "qcow2";

/// Size in bytes of a sector, the unit of compressed lengths. Specification,
/// "Compressed Clusters Descriptor".
pub const SECTOR: u64 = 512;

/// Maximum size of an L1 table, in bytes. QEMU's limit.
pub const MAX_L1_BYTES: u64 = 32 << 20;

/// Maximum size of the refcount table, in bytes. QEMU's limit.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Maximum length of a backing file's name, in bytes. Specification, "backing_file_size".
pub const MAX_BACKING_NAME: u32 = 1023;

/// Maximum number of internal snapshots. QEMU's limit.
pub const MAX_SNAPSHOTS: u32 = 65_536;

/// Maximum memory for a list of snapshots or bitmaps, in bytes; further entries are only counted. Our limit:
/// about 16000 entries with short names, which take about 30 MiB as JSON.
pub const MAX_LISTED_BYTES: usize = 4 << 20;

/// Memory charged for a listed entry in addition to its names, in bytes.
pub const LISTED_ENTRY_BYTES: usize = 256;

/// Maximum size of the snapshot table, in bytes. QEMU's limit.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// Maximum number of bitmaps. QEMU's limit.
pub const MAX_BITMAPS: u32 = 65_535;

/// Maximum size of the bitmap directory, in bytes. QEMU's limit, for 65535 bitmaps.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;

/// Smallest cluster: 512 bytes. Specification, "cluster_bits".
pub const MIN_CLUSTER_BITS: u32 = 9;

/// Largest cluster: 2 MiB. QEMU's limit.
pub const MAX_CLUSTER_BITS: u32 = 21;

/// Smallest cluster with extended L2 entries: 16 KiB. Specification, "Extended L2 Entries".
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Number of subclusters in a cluster with extended L2 entries. Specification, "Extended L2 Entries".
pub const SUBCLUSTERS: u64 = 32;

/// Maximum length of a name in a header extension, in bytes. Our limit; QEMU's own limits are lower.
pub const MAX_EXTENSION_TEXT: usize = 1023;
