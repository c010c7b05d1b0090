//! The on-disk structures of MS-VHDX: constants, encoding and decoding, without I/O.
//!
//! Numbers are little-endian, as are the first three fields of a GUID. Reserved fields are written as zero
//! and ignored when read.

pub(crate) mod bat;
pub(crate) mod header;
pub(crate) mod log;
pub(crate) mod metadata;
pub(crate) mod region;

use uuid::Uuid;

/// One mebibyte in bytes: the alignment of everything after the header section (section 2.1).
pub(crate) const MIB: u64 = 1 << 20;

/// Length in bytes of the header section: the file type identifier, two headers and two copies of the region
/// table (section 2.2).
pub(crate) const HEADER_SECTION_LEN: u64 = MIB;

/// Maximum size of a virtual disk in bytes: 64 TiB (section 2.6.2.2).
pub(crate) const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// Returns the CRC-32C of a structure, computed as if its checksum field (the 4 bytes at `checksum_at`) were
/// zero.
pub(crate) fn checksum(structure: &[u8], checksum_at: usize) -> u32 {
    let (before, rest) = structure.split_at(checksum_at.min(structure.len()));
    let after = rest.get(4..).unwrap_or(&[]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, after)
}

/// Decodes a GUID from its on-disk bytes.
pub(crate) fn guid(bytes: [u8; 16]) -> Uuid {
    Uuid::from_bytes_le(bytes)
}
