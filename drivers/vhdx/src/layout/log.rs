//! The log (section 2.3): entries of 4 KiB sectors in a ring.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::guid;

/// Bytes of a log sector and of the page of the file that it stands for.
pub(crate) const LOG_SECTOR: u64 = 4096;
/// Bytes of an entry's header.
pub(crate) const ENTRY_HEADER_LEN: u64 = 64;
/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_LEN: u64 = 32;
/// Where the checksum of an entry stands in it.
pub(crate) const ENTRY_CHECKSUM_AT: u64 = 4;
/// Signature of an entry.
pub(crate) const ENTRY_SIGNATURE: &[u8; 4] = b"loge";

const ZERO_SIGNATURE: &[u8; 4] = b"zero";
const DATA_DESCRIPTOR_SIGNATURE: &[u8; 4] = b"desc";
const DATA_SECTOR_SIGNATURE: &[u8; 4] = b"data";

/// VHDX_LOG_ENTRY_HEADER (section 2.3.1.1).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntryHeader {
    /// 0
    signature: [u8; 4],
    /// 4: CRC-32C of the whole entry
    checksum: U32,
    /// 8: bytes, a multiple of 4 KiB
    entry_length: U32,
    /// 12: where in the log the sequence begins that ends with this entry, bytes
    tail: U32,
    /// 16
    sequence_number: U64,
    /// 24
    descriptor_count: U32,
    /// 28
    reserved: U32,
    /// 32: the header's, or the entry is an old one
    log_guid: [u8; 16],
    /// 48: the file was at least that long, and stable, when the entry was written
    flushed_file_offset: U64,
    /// 56: the file must be at least that long after replay
    last_file_offset: U64,
}
const _: () = assert!(size_of::<RawEntryHeader>() as u64 == ENTRY_HEADER_LEN);

/// An entry's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryHeader {
    pub(crate) checksum: u32,
    pub(crate) entry_length: u32,
    pub(crate) tail: u32,
    pub(crate) sequence_number: u64,
    pub(crate) descriptor_count: u32,
    pub(crate) log_guid: Uuid,
    pub(crate) flushed_file_offset: u64,
    pub(crate) last_file_offset: u64,
}

impl EntryHeader {
    /// The header at the start of a log sector, if one is there.
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

    /// Sectors of header and descriptors: data sectors follow.
    pub(crate) fn descriptor_sectors(&self) -> u64 {
        (ENTRY_HEADER_LEN + u64::from(self.descriptor_count) * DESCRIPTOR_LEN).div_ceil(LOG_SECTOR)
    }
}

/// VHDX_LOG_ZERO_DESCRIPTOR and VHDX_LOG_DATA_DESCRIPTOR (sections 2.3.1.2, 2.3.1.3), which differ in
/// the meaning of the first 16 bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    /// 0
    signature: [u8; 4],
    /// 4: data: the page's last 4 bytes
    trailing_bytes: [u8; 4],
    /// 8: data: the page's first 8 bytes; zero: bytes to zero
    leading_bytes: [u8; 8],
    /// 16: a multiple of 4 KiB
    file_offset: U64,
    /// 24: the entry's
    sequence_number: U64,
}
const _: () = assert!(size_of::<RawDescriptor>() as u64 == DESCRIPTOR_LEN);

/// What a descriptor does to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// Bytes become zero.
    Zero { file_offset: u64, len: u64 },
    /// A page is overwritten; the rest of it is in the next data sector.
    Data { file_offset: u64, leading: [u8; 8], trailing: [u8; 4] },
}

impl Descriptor {
    /// A descriptor of the entry with `sequence_number`; `None` when it is none.
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

/// The page that a data descriptor and its data sector stand for (section 2.3.1.4): the sector holds
/// the middle of the page between a signature and the two halves of the entry's sequence number.
pub(crate) fn page(
    sector: &[u8],
    sequence_number: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
) -> Option<Box<[u8; LOG_SECTOR as usize]>> {
    let sector: &[u8; LOG_SECTOR as usize] = sector.try_into().ok()?;
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
