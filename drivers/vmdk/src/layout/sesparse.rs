//! The headers and entries of an SE sparse file, the sparse extent of VMFS 6 (SESPARSE).

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Fault, MAX_SECTORS};

pub(crate) const MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();
/// Length of a header in bytes.
pub(crate) const HEADER_LEN: usize = 512;
/// Number of sectors of a grain: 4 KiB, the only size in use.
pub(crate) const GRAIN_SECTORS: u64 = 8;
/// Number of sectors of a grain table.
pub(crate) const TABLE_SECTORS: u64 = 64;
/// Number of entries of a grain table.
pub(crate) const TABLE_ENTRIES: u64 = TABLE_SECTORS * 512 / 8;

const VERSION: u64 = 0x2_0000_0001;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Maximum number of entries of the grain directory. Our limit: 64 TiB.
const MAX_DIRECTORY_ENTRIES: u64 = 1 << 22;

/// A structure of the file.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawArea {
    /// Sectors.
    offset: U64,
    /// Sectors.
    size: U64,
}

/// The constant header as stored. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: U64,
    /// 8
    version: U64,
    /// 16: sectors
    capacity: U64,
    /// 24: sectors
    grain_size: U64,
    /// 32: sectors
    table_size: U64,
    /// 40
    flags: U64,
    /// 48
    reserved: [U64; 4],
    /// 80
    volatile_header: RawArea,
    /// 96
    journal_header: RawArea,
    /// 112
    journal: RawArea,
    /// 128
    directory: RawArea,
    /// 144
    tables: RawArea,
    /// 160
    free_bitmap: RawArea,
    /// 176
    backmap: RawArea,
    /// 192
    grains: RawArea,
}

/// The volatile header as stored.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawVolatileHeader {
    magic: U64,
    free_table: U64,
    next_transaction: U64,
    replay_journal: U64,
}

/// A range of the file, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// A decoded and checked header. Offsets and lengths are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) capacity: u64,
    /// Sector of the volatile header.
    pub(crate) volatile_header: u64,
    pub(crate) directory: Area,
    pub(crate) tables: Area,
    pub(crate) grains: Area,
    /// Number of entries of the grain directory that the capacity needs.
    pub(crate) directory_entries: u64,
}

impl Header {
    /// Decodes and checks the header of a file of `file_sectors` sectors. `bytes` begins with the magic number.
    pub(crate) fn decode(bytes: &[u8], file_sectors: u64) -> Result<Self, Fault> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(Fault::Malformed("is cut short".to_owned()));
        };
        if raw.version.get() != VERSION || raw.flags.get() != 0 {
            return Err(Fault::Unsupported(format!(
                "has version {:#x} and flags {:#x}; only version {VERSION:#x} without flags is supported",
                raw.version, raw.flags
            )));
        }
        if raw.grain_size.get() != GRAIN_SECTORS || raw.table_size.get() != TABLE_SECTORS {
            return Err(Fault::Unsupported(format!(
                "has grains of {} sectors and tables of {}; only {GRAIN_SECTORS} and {TABLE_SECTORS} are \
                 supported",
                raw.grain_size, raw.table_size
            )));
        }
        let capacity = raw.capacity.get();
        let directory_entries = capacity.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
        if capacity >= MAX_SECTORS || directory_entries > MAX_DIRECTORY_ENTRIES {
            return Err(Fault::Malformed(format!(
                "has a capacity of {capacity} sectors; the limit is 64 TiB"
            )));
        }
        let area = |raw: RawArea, name: &str| {
            let (offset, size) = (raw.offset.get(), raw.size.get());
            match offset.checked_add(size) {
                Some(end) if end <= file_sectors && offset > 0 => Ok(Area { offset, size }),
                _ => Err(Fault::Malformed(format!(
                    "has {size} sectors of {name} at {offset}, but the file has {file_sectors}"
                ))),
            }
        };
        let directory = area(raw.directory, "directory")?;
        if directory.size.saturating_mul(64) < directory_entries {
            return Err(Fault::Malformed(format!(
                "has a directory of {} sectors, too small for {directory_entries} entries",
                directory.size
            )));
        }
        Ok(Self {
            capacity,
            volatile_header: area(raw.volatile_header, "volatile header")?.offset,
            directory,
            tables: area(raw.tables, "tables")?,
            // The last grain may end behind the file's end if the disk does.
            grains: Area { offset: raw.grains.offset.get(), size: raw.grains.size.get() },
            directory_entries,
        })
    }

    /// Checks the volatile header.
    pub(crate) fn check_volatile(bytes: &[u8]) -> Result<(), Fault> {
        let Ok((raw, _)) = RawVolatileHeader::ref_from_prefix(bytes) else {
            return Err(Fault::Malformed("is cut short".to_owned()));
        };
        if raw.magic.get() != VOLATILE_MAGIC {
            return Err(Fault::Malformed(format!("has the magic number {:#x}", raw.magic)));
        }
        if raw.replay_journal.get() != 0 {
            return Err(Fault::Unsupported(
                "asks for a replay of the journal, which was not closed".to_owned(),
            ));
        }
        Ok(())
    }
}

/// Decodes an entry of the grain directory to the number of a table; `None` if there is none.
pub(crate) fn directory_entry(entry: u64) -> Result<Option<u64>, Fault> {
    match (entry >> 32, entry & 0xffff_ffff) {
        (0, 0) => Ok(None),
        (0x1000_0000, table) => Ok(Some(table)),
        _ => Err(Fault::Malformed(format!("is {entry:#x}"))),
    }
}

/// State of a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Not in this file.
    Absent,
    /// Zeros. Unmapped grains count as such: the guest has discarded them.
    Zero,
    /// The grain with this number.
    Data(u64),
}

/// Decodes an entry of a grain table.
pub(crate) fn table_entry(entry: u64) -> Result<Grain, Fault> {
    match entry >> 60 {
        0 if entry == 0 => Ok(Grain::Absent),
        1 | 2 => Ok(Grain::Zero),
        3 => Ok(Grain::Data(entry >> 48 & 0xfff | (entry & ((1 << 48) - 1)) << 12)),
        _ => Err(Fault::Malformed(format!("is {entry:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_decode_by_their_kind() {
        assert_eq!(table_entry(0), Ok(Grain::Absent));
        assert_eq!(table_entry(1 << 60), Ok(Grain::Zero));
        assert_eq!(table_entry(2 << 60), Ok(Grain::Zero));
        assert_eq!(table_entry(0x3005_0000_0000_0002), Ok(Grain::Data(0x2005)));
        assert!(table_entry(7).is_err() && table_entry(4 << 60).is_err());
        assert_eq!(directory_entry(0x1000_0000_0000_0003), Ok(Some(3)));
        assert_eq!(directory_entry(0), Ok(None));
        assert!(directory_entry(3).is_err());
    }
}
