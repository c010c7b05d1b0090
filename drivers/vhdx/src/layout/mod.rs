//! The on-disk structures of MS-VHDX: encoding and decoding, no I/O.
//!
//! Numbers are little-endian; GUIDs have their first three fields little-endian. What is "reserved"
//! in the specification is written as zero and not looked at when reading.

pub(crate) mod bat;
pub(crate) mod header;
pub(crate) mod log;
pub(crate) mod metadata;
pub(crate) mod region;

use uuid::Uuid;

/// Bytes in a mebibyte: everything behind the header section is aligned to it (section 2.1).
pub(crate) const MIB: u64 = 1 << 20;

/// The header section: identifier, two headers, two region tables (section 2.2).
pub(crate) const HEADER_SECTION_LEN: u64 = MIB;

/// The largest virtual disk (section 2.6.2.2).
pub(crate) const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// CRC-32C of a structure, computed with its checksum field (4 bytes at `checksum_at`) as zero.
pub(crate) fn checksum(structure: &[u8], checksum_at: usize) -> u32 {
    let (before, rest) = structure.split_at(checksum_at.min(structure.len()));
    let after = rest.get(4..).unwrap_or(&[]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, after)
}

/// A GUID as it stands in a file.
pub(crate) fn guid(bytes: [u8; 16]) -> Uuid {
    Uuid::from_bytes_le(bytes)
}
