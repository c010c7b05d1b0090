//! The dynamic header (section "Dynamic Disk Header Format").

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ENTRY_LEN, Fault, SECTOR_SIZE, VERSION, check_integrity, checksum};

const COOKIE: &[u8; 8] = b"cxsparse";
/// Length of the header in bytes.
pub(crate) const HEADER_LEN: usize = 1024;
/// Offset of the checksum in the header, in bytes.
const CHECKSUM_AT: usize = 36;

/// Minimum size of a block in bytes: a sector.
const MIN_BLOCK_SIZE: u32 = 512;
/// Maximum size of a block in bytes. Our limit; programs write 512 KiB or 2 MiB.
const MAX_BLOCK_SIZE: u32 = 256 << 20;
/// Maximum length of the BAT in bytes. Our limit: with blocks of 512 KiB, the table of 2 TiB.
const MAX_BAT_LEN: u64 = 16 << 20;
/// Maximum length of a parent locator in bytes. Our limit: Windows paths have at most 64 KiB.
const MAX_LOCATOR_LEN: u32 = 64 << 10;

/// A parent locator as stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocator {
    code: [u8; 4],
    /// In bytes or in sectors, depending on the program.
    space: U32,
    /// Bytes.
    len: U32,
    reserved: U32,
    file_offset: U64,
}

/// The header as stored. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    cookie: [u8; 8],
    /// 8: unused
    data_offset: U64,
    /// 16: file offset of the BAT
    bat_offset: U64,
    /// 24
    version: U32,
    /// 28: number of entries of the BAT
    entries: U32,
    /// 32: bytes
    block_size: U32,
    /// 36
    checksum: U32,
    /// 40
    parent_uuid: [u8; 16],
    /// 56: seconds since 2000-01-01 00:00 UTC
    parent_time: U32,
    /// 60
    reserved: U32,
    /// 64: UTF-16
    parent_name: [U16; 256],
    /// 576
    locators: [RawLocator; 8],
    /// 768
    reserved2: [u8; 256],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// A place of the file that contains one name of the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Locator {
    /// Platform and kind of the name.
    pub(crate) code: [u8; 4],
    /// File offset of the name.
    pub(crate) file_offset: u64,
    /// Length of the name in bytes; bounded.
    pub(crate) len: usize,
}

/// A decoded and checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// File offset of the BAT.
    pub(crate) bat_offset: u64,
    /// Number of entries of the BAT.
    pub(crate) entries: u64,
    /// Size of a block in guest bytes, a power of two.
    pub(crate) block_size: u64,
    /// UUID of the parent; nil without one.
    pub(crate) parent_uuid: Uuid,
    /// Time of the parent in seconds since 2000-01-01 00:00 UTC.
    pub(crate) parent_time: u32,
    /// Name of the parent, for people.
    pub(crate) parent_name: String,
    /// Names of the parent, those in use only.
    pub(crate) locators: Vec<Locator>,
}

impl Header {
    /// Decodes and checks a header from its 1024 bytes, for a disk of `virtual_size` bytes.
    pub(crate) fn decode(bytes: &[u8], virtual_size: u64) -> Result<Self, Fault> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else { return Err(Fault::NoSignature) };
        if &raw.cookie != COOKIE {
            return Err(Fault::NoSignature);
        }
        check_integrity(raw.as_bytes(), CHECKSUM_AT, raw.checksum.get(), raw.version.get())?;
        let block_size = raw.block_size.get();
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(Fault::Malformed(format!(
                "has blocks of {block_size} bytes; a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} is needed"
            )));
        }
        let (entries, block_size) = (u64::from(raw.entries.get()), u64::from(block_size));
        let needed = virtual_size.div_ceil(block_size);
        if entries < needed || entries * ENTRY_LEN > MAX_BAT_LEN {
            return Err(Fault::Malformed(format!(
                "has {entries} BAT entries; a disk of {virtual_size} bytes needs {needed}, and the maximum is {}",
                MAX_BAT_LEN / ENTRY_LEN
            )));
        }
        let parent_name: Vec<u16> = raw.parent_name.iter().map(|unit| unit.get()).collect();
        Ok(Self {
            bat_offset: raw.bat_offset.get(),
            entries: needed,
            block_size,
            parent_uuid: Uuid::from_bytes(raw.parent_uuid),
            parent_time: raw.parent_time.get(),
            parent_name: utf16(&parent_name),
            locators: raw.locators.iter().filter_map(locator).collect(),
        })
    }

    /// Encodes the header of a new image. The options bound the length of the parent's name.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // The options bound all of these below 2^32.
        let narrow = |number: u64| U32::new(u32::try_from(number).unwrap_or(u32::MAX));
        let mut raw = RawHeader::new_zeroed();
        raw.cookie = *COOKIE;
        raw.data_offset = u64::MAX.into();
        raw.bat_offset = self.bat_offset.into();
        raw.version = VERSION.into();
        raw.entries = narrow(self.entries);
        raw.block_size = narrow(self.block_size);
        raw.parent_uuid = *self.parent_uuid.as_bytes();
        raw.parent_time = self.parent_time.into();
        for (unit, stored) in self.parent_name.encode_utf16().zip(&mut raw.parent_name) {
            *stored = unit.into();
        }
        for (locator, stored) in self.locators.iter().zip(&mut raw.locators) {
            stored.code = locator.code;
            // The specification counts sectors; Windows writes and expects bytes.
            stored.space = narrow((locator.len as u64).next_multiple_of(SECTOR_SIZE));
            stored.len = narrow(locator.len as u64);
            stored.file_offset = locator.file_offset.into();
        }
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM_AT).into();
        raw.as_bytes().to_vec()
    }

    /// Returns the file offset one past the BAT.
    pub(crate) fn bat_end(&self) -> u64 {
        self.bat_offset.saturating_add(self.entries * ENTRY_LEN)
    }
}

/// Decodes a locator; `None` if it is not used or too long.
fn locator(raw: &RawLocator) -> Option<Locator> {
    let len = raw.len.get();
    let used = raw.code != [0; 4] && (1..=MAX_LOCATOR_LEN).contains(&len);
    used.then_some(Locator { code: raw.code, file_offset: raw.file_offset.get(), len: len as usize })
}

/// Decodes UTF-16 up to the first NUL.
pub(crate) fn utf16(units: &[u16]) -> String {
    let len = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
    String::from_utf16_lossy(&units[..len])
}
