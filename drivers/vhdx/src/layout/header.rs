//! The file type identifier and the two headers (section 2.2).
//!
//! The headers have fixed offsets. An update overwrites the older header and gives it the higher sequence
//! number, so a torn write leaves the other header intact.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MIB, checksum, guid};

/// Signature of the file type identifier, the first bytes of the file (section 2.2.1).
pub(crate) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Length in bytes of the creator string that follows the signature, UTF-16LE (section 2.2.1).
pub(crate) const CREATOR_LEN: usize = 512;
/// File offsets of the two headers (section 2.2).
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Length in bytes of a header, all covered by its checksum (section 2.2.2).
pub(crate) const HEADER_LEN: usize = 4096;

const SIGNATURE: &[u8; 4] = b"head";
/// Offset of the checksum in a header, in bytes.
const CHECKSUM_AT: usize = 4;
/// The format's only version (section 2.2.2).
const VERSION: u16 = 1;

/// VHDX_HEADER (section 2.2.2); 4016 reserved bytes follow.
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    signature: [u8; 4],
    /// 4: CRC-32C of all 4096 bytes
    checksum: U32,
    /// 8
    sequence_number: U64,
    /// 16: changes whenever the file is opened for writing
    file_write_guid: [u8; 16],
    /// 32: changes whenever the guest's content changes; a child names it as its parent linkage
    data_write_guid: [u8; 16],
    /// 48: zero when the log is empty
    log_guid: [u8; 16],
    /// 64
    log_version: U16,
    /// 66
    version: U16,
    /// 68: bytes, a multiple of 1 MiB
    log_length: U32,
    /// 72: bytes, a multiple of 1 MiB
    log_offset: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 80);

/// A decoded header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Sequence number. The valid header with the higher number is current.
    pub(crate) sequence_number: u64,
    /// GUID of this state of the file.
    pub(crate) file_write_guid: Uuid,
    /// GUID of the guest's content.
    pub(crate) data_write_guid: Uuid,
    /// GUID of the log; nil if the log is empty.
    pub(crate) log_guid: Uuid,
    /// Version of the log's format; 0 is the only one.
    pub(crate) log_version: u16,
    /// Version of the file's format; 1 is the only one.
    pub(crate) version: u16,
    /// Length of the log in bytes.
    pub(crate) log_length: u32,
    /// File offset of the log in bytes.
    pub(crate) log_offset: u64,
}

impl Header {
    /// Decodes a header from its 4096 bytes. The error is worded to follow "the header".
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err("is cut short".to_owned());
        };
        if &raw.signature != SIGNATURE {
            return Err("has no signature".to_owned());
        }
        let computed = checksum(bytes, CHECKSUM_AT);
        if computed != raw.checksum.get() {
            return Err(format!("has checksum {:#010x}, but its content has {computed:#010x}", raw.checksum));
        }
        Ok(Self {
            sequence_number: raw.sequence_number.get(),
            file_write_guid: guid(raw.file_write_guid),
            data_write_guid: guid(raw.data_write_guid),
            log_guid: guid(raw.log_guid),
            log_version: raw.log_version.get(),
            version: raw.version.get(),
            log_length: raw.log_length.get(),
            log_offset: raw.log_offset.get(),
        })
    }

    /// Encodes the header to its 4096 bytes, checksum included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let raw = RawHeader {
            signature: *SIGNATURE,
            checksum: U32::ZERO,
            sequence_number: self.sequence_number.into(),
            file_write_guid: self.file_write_guid.to_bytes_le(),
            data_write_guid: self.data_write_guid.to_bytes_le(),
            log_guid: self.log_guid.to_bytes_le(),
            log_version: self.log_version.into(),
            version: self.version.into(),
            log_length: self.log_length.into(),
            log_offset: self.log_offset.into(),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(HEADER_LEN, 0);
        let crc = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Creates a header of version 1 with an empty log and nil GUIDs.
    pub(crate) fn new(sequence_number: u64, log_offset: u64, log_length: u32) -> Self {
        Self {
            sequence_number,
            file_write_guid: Uuid::nil(),
            data_write_guid: Uuid::nil(),
            log_guid: Uuid::nil(),
            log_version: 0,
            version: VERSION,
            log_length,
            log_offset,
        }
    }

    /// Describes a field that is unsupported or breaks the format's rules, worded to follow "the header".
    /// Returns `None` if every field is valid.
    pub(crate) fn fault(&self) -> Option<String> {
        if self.version != VERSION {
            return Some(format!("has version {}; only version {VERSION} is supported", self.version));
        }
        let aligned = self.log_offset.is_multiple_of(MIB) && u64::from(self.log_length).is_multiple_of(MIB);
        if !aligned || (self.log_length > 0 && self.log_offset < MIB) {
            return Some(format!(
                "places the log at {} with {} bytes; both must be multiples of 1 MiB, the offset at least 1 MiB",
                self.log_offset, self.log_length
            ));
        }
        None
    }
}

/// Returns the current header: the valid one with the higher sequence number. The error says why neither
/// header is current.
pub(crate) fn current(headers: &[Result<Header, String>; 2]) -> Result<&Header, String> {
    match headers {
        [Ok(first), Ok(second)] if first.sequence_number == second.sequence_number => {
            if first == second {
                Ok(first)
            } else {
                Err(format!("both headers have sequence number {} but differ", first.sequence_number))
            }
        }
        [Ok(first), Ok(second)] => {
            Ok(if first.sequence_number > second.sequence_number { first } else { second })
        }
        [Ok(only), Err(_)] | [Err(_), Ok(only)] => Ok(only),
        [Err(first), Err(second)] => {
            Err(format!("neither header is valid: the first {first}, the second {second}"))
        }
    }
}

/// Decodes the creator string up to its first NUL; invalid UTF-16 becomes U+FFFD.
pub(crate) fn decode_creator(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .take_while(|&unit| unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}

/// Encodes the file type identifier: the signature and the creator string. The string is truncated or padded
/// with zeros to [`CREATOR_LEN`] bytes.
pub(crate) fn encode_identifier(creator: &str) -> Vec<u8> {
    let mut bytes = FILE_SIGNATURE.to_vec();
    bytes.extend(creator.encode_utf16().take(CREATOR_LEN / 2).flat_map(u16::to_le_bytes));
    bytes.resize(FILE_SIGNATURE.len() + CREATOR_LEN, 0);
    bytes
}
