//! The structures of a qcow2 file as the specification ("Qcow2 Image File Format", QEMU's
//! docs/interop/qcow2) defines them. Everything is big-endian. No I/O happens here except reading
//! the header's own cluster.

use imgtool_toolkit::{RandomInput, Result};

pub mod bitmap;
pub mod entry;
pub mod extension;
pub mod header;
pub mod snapshot;

/// Specification: a sector, the unit in which the length of compressed data is counted.
pub const SECTOR: u64 = 512;

/// QEMU's limit on the bytes of an L1 table.
pub const MAX_L1_BYTES: u64 = 32 << 20;

/// QEMU's limit on the bytes of the refcount table.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Specification, "backing_file_size": the longest name.
pub const MAX_BACKING_NAME: u32 = 1023;

/// QEMU's limit on internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65_536;

/// Bytes that a list of snapshots or of bitmaps may come to; beyond, they are only counted. Ours: 16000
/// with short names, whose facts as JSON take some 30 MiB.
pub const MAX_LISTED_BYTES: usize = 4 << 20;

/// What one costs in such a list beside its names.
pub const LISTED_ENTRY_BYTES: usize = 256;

/// QEMU's limit on the bytes of the snapshot table.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// QEMU's limit on bitmaps.
pub const MAX_BITMAPS: u32 = 65_535;

/// Ours: the bytes of a bitmap directory that are read; QEMU's own limit is 64 MiB for 65535 bitmaps.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;

/// Specification: the smallest cluster is 2^9 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;

/// QEMU's limit: the largest cluster is 2^21 bytes.
pub const MAX_CLUSTER_BITS: u32 = 21;

/// Specification: extended L2 entries need clusters of at least 2^14 bytes.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Specification: subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;

/// Ours: the longest text of a header extension; QEMU's own limits are below.
pub const MAX_EXTENSION_TEXT: usize = 1023;

/// Reads `len` bytes, which the caller has bounded, as if the file went on with zeros: what is
/// damaged is looked at as far as it goes.
pub fn read_zero_filled(input: &RandomInput, position: u64, len: usize) -> Result<Vec<u8>> {
    let there = input.len().saturating_sub(position).min(len as u64);
    let mut bytes = vec![0; len];
    if there > 0 {
        // Not above `len`.
        input.read_exact_at(&mut bytes[..there as usize], position)?;
    }
    Ok(bytes)
}

/// A number from eight big-endian bytes at `at`; `None` beyond the end.
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(field.try_into().ok()?))
}

/// A number from four big-endian bytes at `at`; `None` beyond the end.
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// A number from two big-endian bytes at `at`; `None` beyond the end.
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(field.try_into().ok()?))
}

/// A table of eight-byte entries.
pub fn decode_table(bytes: &[u8]) -> Vec<u64> {
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
}

/// The bytes of a table of eight-byte entries.
pub fn encode_table(entries: &[u64], bytes: &mut Vec<u8>) {
    bytes.reserve(entries.len() * 8);
    for entry in entries {
        bytes.extend_from_slice(&entry.to_be_bytes());
    }
}
