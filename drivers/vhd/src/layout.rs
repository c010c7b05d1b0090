//! The structures of the format: footer, dynamic header, BAT entries and sector bitmaps.

pub(crate) mod footer;
pub(crate) mod header;

/// Size of a disk sector in bytes, and the unit of file offsets in the BAT.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Width of an entry of the BAT in bytes.
pub(crate) const ENTRY_LEN: u64 = 4;

/// Entry of the BAT for a block that is not in the file (section "Block Allocation Table").
pub(crate) const ABSENT: u32 = u32::MAX;

/// Version 1.0 of the footer and of the dynamic header, major number in the high half.
const VERSION: u32 = 0x0001_0000;

/// Returns the length in bytes of the bitmap that precedes the data of a block: a bit for each sector, padded
/// to whole sectors.
pub(crate) fn bitmap_len(block_size: u64) -> u64 {
    block_size.div_ceil(SECTOR_SIZE * 8).next_multiple_of(SECTOR_SIZE)
}

/// Returns the checksum of a structure: the complement of the sum of its bytes, without the checksum itself.
fn checksum(bytes: &[u8], checksum_at: usize) -> u32 {
    let own = checksum_at..checksum_at + 4;
    let others = bytes.iter().enumerate().filter(|(at, _)| !own.contains(at));
    !others.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

/// Checks the checksum of a structure, `stored` at `checksum_at`, and the major version of the format.
fn check_integrity(bytes: &[u8], checksum_at: usize, stored: u32, version: u32) -> Result<(), Fault> {
    let computed = checksum(bytes, checksum_at);
    if computed != stored {
        return Err(Fault::Malformed(format!(
            "has checksum {stored:#010x}, but its content has {computed:#010x}"
        )));
    }
    if version >> 16 != VERSION >> 16 {
        return Err(Fault::Unsupported(format!("has version {}", version >> 16)));
    }
    Ok(())
}

/// A fault of a structure, worded to follow its name ("the footer …").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The signature is missing.
    NoSignature,
    /// The image needs a feature that this driver does not have.
    Unsupported(String),
    /// The structure is damaged or contradicts itself.
    Malformed(String),
}
