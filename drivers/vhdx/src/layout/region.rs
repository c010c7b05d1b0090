//! The region table ([MS-VHDX] section 2.2.3): the offsets and lengths of the BAT and the metadata. The file
//! has two copies of the table.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{HEADER_SECTION_LEN, MIB, checksum, guid};

/// File offsets of the two copies (section 2.2).
pub(crate) const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Length in bytes of a copy, all covered by its checksum (section 2.2.3).
pub(crate) const REGION_TABLE_LEN: usize = 64 << 10;
/// Maximum number of entries (section 2.2.3.1).
const MAX_ENTRIES: u32 = 2047;

/// GUID of the BAT region (section 2.2.3.2).
pub(crate) const BAT_REGION: Uuid = Uuid::from_u128(0x2DC2_7766_F623_4200_9D64_115E_9BFD_4A08);
/// GUID of the metadata region (section 2.2.3.2).
pub(crate) const METADATA_REGION: Uuid = Uuid::from_u128(0x8B7C_A206_4790_4B9A_B8FE_575F_050F_886E);

const SIGNATURE: &[u8; 4] = b"regi";
/// Offset of the checksum in the table, in bytes.
const CHECKSUM_AT: usize = 4;
/// Bit 0 of [`RawEntry::required`] (section 2.2.3.2).
const REQUIRED: u32 = 1;

/// VHDX_REGION_TABLE_HEADER (section 2.2.3.1).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTableHeader {
    /// 0
    signature: [u8; 4],
    /// 4: CRC-32C of all 64 KiB
    checksum: U32,
    /// 8
    entry_count: U32,
    /// 12
    reserved: U32,
}
const _: () = assert!(size_of::<RawTableHeader>() == 16);

/// VHDX_REGION_TABLE_ENTRY (section 2.2.3.2).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0
    guid: [u8; 16],
    /// 16: bytes, a multiple of 1 MiB, at least 1 MiB
    file_offset: U64,
    /// 24: bytes, a multiple of 1 MiB
    length: U32,
    /// 28: if bit 0 is set, a reader that does not know the region must not open the file
    required: U32,
}
const _: () = assert!(size_of::<RawEntry>() == 32);

/// A region of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// File offset of the region in bytes.
    pub(crate) file_offset: u64,
    /// Length of the region in bytes.
    pub(crate) length: u32,
}

impl Region {
    /// Returns the file offset one past the last byte of the region.
    pub(crate) fn end(&self) -> u64 {
        self.file_offset.saturating_add(u64::from(self.length))
    }

    /// True if `len` bytes at `file_offset` overlap the region.
    pub(crate) fn overlaps(&self, file_offset: u64, len: u64) -> bool {
        self.file_offset < file_offset.saturating_add(len) && file_offset < self.end()
    }
}

/// A decoded region table: the two regions that every file has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegionTable {
    pub(crate) bat: Region,
    pub(crate) metadata: Region,
}

/// Reason why a copy of the table is unusable, worded to follow "the region table".
#[derive(Debug, Clone)]
pub(crate) enum TableFault {
    /// The copy is damaged; the other may be intact.
    Damaged(String),
    /// The copy is intact, but requires an unknown region.
    Unsupported(String),
}

impl RegionTable {
    /// Decodes a copy of the table from its 64 KiB.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, TableFault> {
        let damaged = |text: String| Err(TableFault::Damaged(text));
        let Ok((header, rest)) = RawTableHeader::ref_from_prefix(bytes) else {
            return damaged("is cut short".to_owned());
        };
        if &header.signature != SIGNATURE {
            return damaged("has no signature".to_owned());
        }
        let computed = checksum(bytes, CHECKSUM_AT);
        if computed != header.checksum.get() {
            return damaged(format!(
                "has checksum {:#010x}, but its content has {computed:#010x}",
                header.checksum
            ));
        }
        let count = header.entry_count.get();
        let entries = match <[RawEntry]>::ref_from_prefix_with_elems(rest, count.min(MAX_ENTRIES) as usize) {
            Ok((entries, _)) if count <= MAX_ENTRIES => entries,
            _ => return damaged(format!("has {count} entries; the limit is {MAX_ENTRIES}")),
        };
        let (mut bat, mut metadata) = (None, None);
        for entry in entries {
            let id = guid(entry.guid);
            let slot = match id {
                BAT_REGION => &mut bat,
                METADATA_REGION => &mut metadata,
                _ if entry.required.get() & REQUIRED == 0 => continue,
                _ => return Err(TableFault::Unsupported(format!("requires the unknown region {id}"))),
            };
            let region = Region { file_offset: entry.file_offset.get(), length: entry.length.get() };
            if let Some(fault) = region_fault(&region) {
                return damaged(format!("places region {id} {fault}"));
            }
            if slot.replace(region).is_some() {
                return damaged(format!("lists region {id} twice"));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) if bat.overlaps(metadata.file_offset, metadata.length.into()) => {
                damaged(format!(
                    "has overlapping regions: the BAT at {} and the metadata at {}",
                    bat.file_offset, metadata.file_offset
                ))
            }
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            (None, _) => damaged("has no BAT region".to_owned()),
            (_, None) => damaged("has no metadata region".to_owned()),
        }
    }

    /// Encodes the table as a 64 KiB copy, checksum included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let header = RawTableHeader {
            signature: *SIGNATURE,
            checksum: U32::ZERO,
            entry_count: 2.into(),
            reserved: U32::ZERO,
        };
        let mut bytes = header.as_bytes().to_vec();
        for (id, region) in [(BAT_REGION, &self.bat), (METADATA_REGION, &self.metadata)] {
            let entry = RawEntry {
                guid: id.to_bytes_le(),
                file_offset: region.file_offset.into(),
                length: region.length.into(),
                required: REQUIRED.into(),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        bytes.resize(REGION_TABLE_LEN, 0);
        let crc = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// Describes an offset or length that breaks the format's rules, worded to follow "places region …".
/// Returns `None` if both are valid.
fn region_fault(region: &Region) -> Option<String> {
    let Region { file_offset, length } = *region;
    let aligned = file_offset.is_multiple_of(MIB) && u64::from(length).is_multiple_of(MIB) && length > 0;
    let fits = file_offset.checked_add(length.into()).is_some_and(|end| i64::try_from(end).is_ok());
    if aligned && file_offset >= HEADER_SECTION_LEN && fits {
        return None;
    }
    Some(format!(
        "at {file_offset} with {length} bytes; both must be multiples of 1 MiB, the offset at least 1 MiB"
    ))
}
