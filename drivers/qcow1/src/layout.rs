//! The header, and the meaning of the entries of the tables.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use imgtool_core::{Error, Result};

/// Signature of all versions, and the number of this one.
const MAGIC: &[u8; 8] = b"QFI\xfb\0\0\0\x01";

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Length of the header in bytes.
pub(crate) const HEADER_LEN: u64 = size_of::<RawHeader>() as u64;
/// Width of an entry of a table in bytes.
pub(crate) const ENTRY_LEN: u64 = 8;
/// Exponents of the size of a cluster. QEMU's limit.
const CLUSTER_BITS: std::ops::RangeInclusive<u8> = 9..=16;
/// Exponents of the number of entries of a table of the second level. QEMU's limit.
const L2_BITS: std::ops::RangeInclusive<u8> = 6..=13;
/// Maximum length in bytes of the name of the backing file. QEMU's limit.
const MAX_NAME_LEN: u32 = 1023;
/// Maximum virtual size in bytes. Our limit: guest offsets stay below 2^63.
const MAX_VIRTUAL_SIZE: u64 = 1 << 63;
/// Bit of an entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// The header. Each field's doc begins with its file offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: signature and version
    magic: [u8; 8],
    /// 8: file offset of the backing file's name; 0 without one
    name_offset: U64,
    /// 16: bytes
    name_len: U32,
    /// 20: time at which the backing file was changed last
    _mtime: U32,
    /// 24: bytes
    virtual_size: U64,
    /// 32
    cluster_bits: u8,
    /// 33
    l2_bits: u8,
    /// 34
    _padding: [u8; 2],
    /// 36: 0 for none, 1 for AES
    encryption: U32,
    /// 40: file offset of the first table
    l1_offset: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 48);

/// The header of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) cluster_bits: u8,
    l2_bits: u8,
    pub(crate) l1_offset: u64,
    pub(crate) virtual_size: u64,
    /// True if the clusters are encrypted.
    pub(crate) encrypted: bool,
    /// Place of the backing file's name: file offset and length in bytes.
    pub(crate) backing: Option<(u64, u64)>,
}

/// Target of an entry of a second-level table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing: the content is that of the backing file.
    Absent,
    /// A cluster at this file offset.
    Stored(u64),
    /// A cluster in `len` compressed bytes.
    Compressed { file_offset: u64, len: u64 },
}

/// True if an image begins with the signature and this version's number.
pub(crate) fn is_qcow1(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// `WrongFormat` without the signature; `Malformed` for impossible numbers; `Unsupported` for an unknown
    /// encryption.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if !is_qcow1(bytes) {
            return Err(Error::wrong_format("is not a QCOW image of version 1: the signature is missing"));
        }
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(Error::corrupt(format!(
                "the file has {} bytes, but the header needs {HEADER_LEN}",
                bytes.len()
            ))
            .hint("the file is cut short: copy it again, or use a backup"));
        };
        let encryption = raw.encryption.get();
        if encryption > 1 {
            return Err(
                Error::unsupported(format!("the image has the unknown encryption {encryption}")).at(36)
            );
        }
        check_bits("clusters", raw.cluster_bits, CLUSTER_BITS, 32)?;
        check_bits("tables", raw.l2_bits, L2_BITS, 33)?;
        let virtual_size = raw.virtual_size.get();
        if virtual_size > MAX_VIRTUAL_SIZE {
            return Err(Error::limit(format!(
                "the disk has {virtual_size} bytes, more than {MAX_VIRTUAL_SIZE}"
            ))
            .at(24));
        }
        let (name_offset, name_len) = (raw.name_offset.get(), raw.name_len.get());
        if name_offset != 0 && name_len > MAX_NAME_LEN {
            return Err(Error::malformed(format!(
                "the backing file's name has {name_len} bytes, more than {MAX_NAME_LEN}"
            ))
            .at(16));
        }
        let l1_offset = raw.l1_offset.get();
        if l1_offset < HEADER_LEN || !l1_offset.is_multiple_of(ENTRY_LEN) {
            return Err(Error::malformed(format!(
                "the first table is at {l1_offset}, not at a multiple of {ENTRY_LEN} after the header"
            ))
            .at(40));
        }
        Ok(Self {
            cluster_bits: raw.cluster_bits,
            l2_bits: raw.l2_bits,
            l1_offset,
            virtual_size,
            encrypted: encryption == 1,
            backing: (name_offset != 0).then(|| (name_offset, name_len.into())),
        })
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the number of entries of a table of the second level.
    pub(crate) fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// Returns the length in bytes of a table of the second level.
    pub(crate) fn l2_len(&self) -> u64 {
        self.l2_entries() * ENTRY_LEN
    }

    /// Returns the number of guest bytes that a table of the second level maps.
    pub(crate) fn l2_span(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// Returns the number of entries of the first table.
    pub(crate) fn l1_entries(&self) -> u64 {
        self.virtual_size.div_ceil(self.l2_span())
    }

    /// Returns the number of clusters of the disk.
    pub(crate) fn clusters(&self) -> u64 {
        self.virtual_size.div_ceil(self.cluster_size())
    }

    /// Returns the number of bytes of the cluster `index` that the disk uses.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.cluster_size());
        self.virtual_size.saturating_sub(start).min(self.cluster_size())
    }

    /// Decodes an entry of a table of the second level.
    pub(crate) fn entry(&self, bytes: [u8; 8]) -> Entry {
        match u64::from_be_bytes(bytes) {
            0 => Entry::Absent,
            entry if entry & COMPRESSED != 0 => {
                let shift = 63 - u32::from(self.cluster_bits);
                Entry::Compressed {
                    file_offset: entry & ((1 << shift) - 1),
                    len: (entry >> shift) & (self.cluster_size() - 1),
                }
            }
            file_offset => Entry::Stored(file_offset),
        }
    }
}

fn check_bits(what: &str, bits: u8, range: std::ops::RangeInclusive<u8>, at: u64) -> Result<()> {
    if range.contains(&bits) {
        return Ok(());
    }
    Err(Error::malformed(format!(
        "the image has {what} of 2^{bits}, not of 2^{} to 2^{}",
        range.start(),
        range.end()
    ))
    .at(at))
}
