//! Log entries (section 2.3): header, descriptors and data sectors, in a ring of 4 KiB sectors.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::guid;

/// Size in bytes of a log sector, and of the page of the file that a data sector restores (section 2.3.1).
pub(crate) const LOG_SECTOR: u64 = 4096;
/// A page of the file, as restored from a data sector.
pub(crate) type LogPage = [u8; LOG_SECTOR as usize];
/// Length in bytes of an entry's header (section 2.3.1.1).
pub(crate) const ENTRY_HEADER_LEN: u64 = 64;
/// Length in bytes of a descriptor (sections 2.3.1.2, 2.3.1.3).
pub(crate) const DESCRIPTOR_LEN: u64 = 32;
/// Offset of the checksum in an entry, in bytes.
pub(crate) const ENTRY_CHECKSUM_AT: u64 = 4;
/// Signature of an entry.
pub(crate) const ENTRY_SIGNATURE: &[u8; 4] = b"loge";

const ZERO_SIGNATURE: &[u8; 4] = b"zero";
const DATA_DESCRIPTOR_SIGNATURE: &[u8; 4] = b"desc";
const DATA_SECTOR_SIGNATURE: &[u8; 4] = b"data";

/// VHDX_LOG_ENTRY_HEADER (section 2.3.1.1).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntryHeader {
    /// 0
    signature: [u8; 4],
    /// 4: CRC-32C of the whole entry
    checksum: U32,
    /// 8: bytes, a multiple of 4 KiB
    entry_length: U32,
    /// 12: bytes from the start of the log to the first entry of the sequence that this entry ends
    tail: U32,
    /// 16
    sequence_number: U64,
    /// 24
    descriptor_count: U32,
    /// 28
    reserved: U32,
    /// 32: equal to the file header's, unless the entry is stale
    log_guid: [u8; 16],
    /// 48: length in bytes of the file when the entry was written
    flushed_file_offset: U64,
    /// 56: minimum length in bytes of the file after replay
    last_file_offset: U64,
}
const _: () = assert!(size_of::<RawEntryHeader>() as u64 == ENTRY_HEADER_LEN);

/// A decoded entry header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryHeader {
    /// CRC-32C of the whole entry.
    pub(crate) checksum: u32,
    /// Length of the entry in bytes.
    pub(crate) entry_length: u32,
    /// Distance in bytes from the start of the log to the first entry of the sequence that this entry ends.
    pub(crate) tail: u32,
    /// Sequence number, one more than the preceding entry's.
    pub(crate) sequence_number: u64,
    /// Number of descriptors.
    pub(crate) descriptor_count: u32,
    /// GUID of the log that the entry belongs to.
    pub(crate) log_guid: Uuid,
    /// Length of the file in bytes when the entry was written.
    pub(crate) flushed_file_offset: u64,
    /// Minimum length of the file after replay, in bytes.
    pub(crate) last_file_offset: u64,
}

impl EntryHeader {
    /// Decodes the header at the start of a log sector; `None` if the signature is missing.
    pub(crate) fn decode(sector: &[u8]) -> Option<Self> {
        let (raw, _) = RawEntryHeader::ref_from_prefix(sector).ok()?;
        (&raw.signature == ENTRY_SIGNATURE).then(|| Self {
            checksum: raw.checksum.get(),
            entry_length: raw.entry_length.get(),
            tail: raw.tail.get(),
            sequence_number: raw.sequence_number.get(),
            descriptor_count: raw.descriptor_count.get(),
            log_guid: guid(raw.log_guid),
            flushed_file_offset: raw.flushed_file_offset.get(),
            last_file_offset: raw.last_file_offset.get(),
        })
    }

    /// Returns the number of sectors that the header and the descriptors occupy; the data sectors follow.
    pub(crate) fn descriptor_sectors(&self) -> u64 {
        (ENTRY_HEADER_LEN + u64::from(self.descriptor_count) * DESCRIPTOR_LEN).div_ceil(LOG_SECTOR)
    }
}

/// VHDX_LOG_ZERO_DESCRIPTOR and VHDX_LOG_DATA_DESCRIPTOR (sections 2.3.1.2, 2.3.1.3), which differ in
/// the first 16 bytes.
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    /// 0
    signature: [u8; 4],
    /// 4: the page's last 4 bytes; reserved in a zero descriptor
    trailing_bytes: [u8; 4],
    /// 8: the page's first 8 bytes; in a zero descriptor the number of bytes to zero
    leading_bytes: [u8; 8],
    /// 16: a multiple of 4 KiB
    file_offset: U64,
    /// 24: equal to the entry's
    sequence_number: U64,
}
const _: () = assert!(size_of::<RawDescriptor>() as u64 == DESCRIPTOR_LEN);

/// One change to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// Zeroes `len` bytes of the file.
    Zero { file_offset: u64, len: u64 },
    /// Overwrites a page of the file. `leading` and `trailing` are the page's first and last bytes; the next
    /// data sector of the entry contains the rest.
    Data { file_offset: u64, leading: [u8; 8], trailing: [u8; 4] },
}

impl Descriptor {
    /// Decodes a descriptor of the entry with `sequence_number`; `None` if it is not valid.
    pub(crate) fn decode(bytes: &[u8], sequence_number: u64) -> Option<Self> {
        let (raw, _) = RawDescriptor::ref_from_prefix(bytes).ok()?;
        let file_offset = raw.file_offset.get();
        if raw.sequence_number.get() != sequence_number || !file_offset.is_multiple_of(LOG_SECTOR) {
            return None;
        }
        match &raw.signature {
            ZERO_SIGNATURE => {
                let len = u64::from_le_bytes(raw.leading_bytes);
                let fits = file_offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
                (fits && len.is_multiple_of(LOG_SECTOR)).then_some(Self::Zero { file_offset, len })
            }
            DATA_DESCRIPTOR_SIGNATURE => {
                let fits = i64::try_from(file_offset).is_ok_and(|at| at <= i64::MAX - LOG_SECTOR as i64);
                fits.then_some(Self::Data {
                    file_offset,
                    leading: raw.leading_bytes,
                    trailing: raw.trailing_bytes,
                })
            }
            _ => None,
        }
    }
}

/// Encodes an entry that overwrites each of `pages`, with the file offset of each, in a file of `file_len` bytes.
/// The entry is a sequence of its own, at the start of the log. An entry with 254 pages fits into 1 MiB.
pub(crate) fn encode_entry(
    log_guid: Uuid,
    sequence_number: u64,
    pages: &[(u64, Box<LogPage>)],
    file_len: u64,
) -> Vec<u8> {
    let count = pages.len() as u64;
    let descriptors = (ENTRY_HEADER_LEN + count * DESCRIPTOR_LEN).div_ceil(LOG_SECTOR);
    let len = (descriptors + count) * LOG_SECTOR;
    let header = RawEntryHeader {
        signature: *ENTRY_SIGNATURE,
        checksum: U32::ZERO,
        // The caller keeps the entry within the log, whose length has 32 bits.
        entry_length: (len as u32).into(),
        tail: U32::ZERO,
        sequence_number: sequence_number.into(),
        descriptor_count: (count as u32).into(),
        reserved: U32::ZERO,
        log_guid: log_guid.to_bytes_le(),
        flushed_file_offset: file_len.into(),
        last_file_offset: file_len.into(),
    };
    let mut bytes = header.as_bytes().to_vec();
    for (file_offset, page) in pages {
        let (mut leading, mut trailing) = ([0; 8], [0; 4]);
        leading.copy_from_slice(&page[..8]);
        trailing.copy_from_slice(&page[4092..]);
        let descriptor = RawDescriptor {
            signature: *DATA_DESCRIPTOR_SIGNATURE,
            trailing_bytes: trailing,
            leading_bytes: leading,
            file_offset: (*file_offset).into(),
            sequence_number: sequence_number.into(),
        };
        bytes.extend_from_slice(descriptor.as_bytes());
    }
    bytes.resize((descriptors * LOG_SECTOR) as usize, 0);
    let number = sequence_number.to_le_bytes();
    for (_, page) in pages {
        let start = bytes.len();
        bytes.extend_from_slice(&page[..]);
        bytes[start..start + 4].copy_from_slice(DATA_SECTOR_SIGNATURE);
        bytes[start + 4..start + 8].copy_from_slice(&number[4..]);
        bytes[start + 4092..].copy_from_slice(&number[..4]);
    }
    let crc = super::checksum(&bytes, ENTRY_CHECKSUM_AT as usize);
    bytes[ENTRY_CHECKSUM_AT as usize..ENTRY_CHECKSUM_AT as usize + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Restores a page from its data descriptor and data sector (section 2.3.1.4); `None` if the sector is not
/// valid. The descriptor contains the page's first 8 and last 4 bytes, because the sector has its signature
/// and the entry's sequence number in their place.
pub(crate) fn restore_page(
    sector: &[u8],
    sequence_number: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
) -> Option<Box<LogPage>> {
    let sector: &LogPage = sector.try_into().ok()?;
    let high = u32::from_le_bytes([sector[4], sector[5], sector[6], sector[7]]);
    let low = u32::from_le_bytes([sector[4092], sector[4093], sector[4094], sector[4095]]);
    let number = u64::from(high) << 32 | u64::from(low);
    if &sector[..4] != DATA_SECTOR_SIGNATURE || number != sequence_number {
        return None;
    }
    let mut page = Box::new(*sector);
    page[..8].copy_from_slice(&leading);
    page[4092..].copy_from_slice(&trailing);
    Some(page)
}
