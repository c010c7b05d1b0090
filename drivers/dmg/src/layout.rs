//! The trailer at the end of the file ("koly"), and the tables of chunks ("mish").

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use imgtool_core::{Error, Result};

/// Signature of the trailer.
const TRAILER_MAGIC: &[u8; 4] = b"koly";
/// The only version of the trailer.
const TRAILER_VERSION: u32 = 4;
/// Signature of a table.
const TABLE_MAGIC: &[u8; 4] = b"mish";
/// Signature of an encrypted image.
const ENCRYPTED: &[u8] = b"encrcdsa";
/// Checksum type: CRC-32.
const CRC_32: u32 = 2;

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Length of the trailer in bytes.
pub(crate) const TRAILER_LEN: u64 = size_of::<RawTrailer>() as u64;
/// Maximum size of a disk in sectors. Our limit: guest offsets stay below 2^63.
const MAX_SECTORS: u64 = 1 << 54;

/// A checksum: type, size in bits, and up to 128 bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChecksum {
    kind: U32,
    bits: U32,
    first: U32,
    _rest: [u8; 124],
}

/// The trailer. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTrailer {
    /// 0
    magic: [u8; 4],
    /// 4
    version: U32,
    /// 8: length of the trailer in bytes
    len: U32,
    /// 12
    _flags: U32,
    /// 16
    _running_offset: U64,
    /// 24: file offset of the chunks
    data_offset: U64,
    /// 32: length of all chunks in bytes
    data_len: U64,
    /// 40: file offset of the resource fork, in images without a property list
    resources_offset: U64,
    /// 48
    resources_len: U64,
    /// 56: number of this file, if an image is split into several
    segment: U32,
    /// 60
    segments: U32,
    /// 64
    _segment_id: [u8; 16],
    /// 80: of the chunks as stored
    data_checksum: RawChecksum,
    /// 216: file offset of the property list
    list_offset: U64,
    /// 224
    list_len: U64,
    /// 232
    _reserved: [u8; 120],
    /// 352: of the checksums of the tables
    _master_checksum: RawChecksum,
    /// 488
    _variant: U32,
    /// 492: size of the disk
    sectors: U64,
    /// 500
    _reserved_2: [u8; 12],
}
const _: () = assert!(size_of::<RawTrailer>() == 512);

/// The trailer of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Trailer {
    /// File offset of the chunks.
    pub(crate) data_offset: u64,
    /// Length of all chunks in bytes.
    pub(crate) data_len: u64,
    /// CRC-32 of the chunks as stored, if there is one.
    pub(crate) data_crc: Option<u32>,
    /// File offset and length of the property list, if there is one.
    pub(crate) list: Option<(u64, u64)>,
    /// File offset and length of the resource fork, if there is one.
    pub(crate) resources: Option<(u64, u64)>,
    /// Size of the disk in sectors.
    pub(crate) sectors: u64,
}

/// True if `end` is the end of an image.
pub(crate) fn is_trailer(end: &[u8]) -> bool {
    let start = end.len().checked_sub(TRAILER_LEN as usize).and_then(|start| end.get(start..));
    start.is_some_and(|trailer| trailer.starts_with(TRAILER_MAGIC))
}

/// True if `head` is the beginning of an encrypted image.
pub(crate) fn is_encrypted(head: &[u8]) -> bool {
    head.starts_with(ENCRYPTED)
}

impl RawChecksum {
    fn crc(&self) -> Option<u32> {
        (self.kind.get() == CRC_32 && self.bits.get() == 32).then(|| self.first.get())
    }
}

impl Trailer {
    /// Decodes and checks a trailer.
    ///
    /// # Errors
    /// `WrongFormat` without the signature; `Unsupported` for other versions and parts of an image.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let raw = RawTrailer::ref_from_bytes(bytes).ok().filter(|raw| raw.magic == *TRAILER_MAGIC);
        let Some(raw) = raw else {
            return Err(Error::wrong_format("is not a DMG image: the trailer at its end is missing").hint(
                "if the file is cut short, copy it again; without a trailer, a .dmg file is a raw disk",
            ));
        };
        let (version, len) = (raw.version.get(), raw.len.get());
        if version != TRAILER_VERSION || u64::from(len) != TRAILER_LEN {
            return Err(Error::unsupported(format!(
                "the trailer has version {version} and {len} bytes, not {TRAILER_VERSION} and {TRAILER_LEN}"
            )));
        }
        let (segment, segments) = (raw.segment.get(), raw.segments.get());
        if segments > 1 {
            return Err(Error::unsupported(format!(
                "the file is part {segment} of {segments} of a split image"
            ))
            .hint("let hdiutil join the parts"));
        }
        let sectors = raw.sectors.get();
        if sectors > MAX_SECTORS {
            return Err(Error::limit(format!("the disk has {sectors} sectors, more than {MAX_SECTORS}")));
        }
        let place = |offset: U64, len: U64| (len.get() > 0).then(|| (offset.get(), len.get()));
        Ok(Self {
            data_offset: raw.data_offset.get(),
            data_len: raw.data_len.get(),
            data_crc: raw.data_checksum.crc(),
            list: place(raw.list_offset, raw.list_len),
            resources: place(raw.resources_offset, raw.resources_len),
            sectors,
        })
    }
}

/// The start of a table of chunks. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTable {
    /// 0
    magic: [u8; 4],
    /// 4
    version: U32,
    /// 8: first sector of the disk that the table maps
    first_sector: U64,
    /// 16
    sectors: U64,
    /// 24: added to the file offsets of the chunks
    data_offset: U64,
    /// 32
    _buffers: U32,
    /// 36
    _descriptors: U32,
    /// 40
    _reserved: [u8; 24],
    /// 64: of the sectors that the table maps
    checksum: RawChecksum,
    /// 200: number of chunks
    chunks: U32,
}
const _: () = assert!(size_of::<RawTable>() == 204);

/// An entry of a table.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawChunk {
    /// 0
    pub(crate) kind: U32,
    /// 4
    _comment: U32,
    /// 8: counted from the first sector of the table
    pub(crate) sector: U64,
    /// 16
    pub(crate) sectors: U64,
    /// 24: counted from the file offset of the chunks
    pub(crate) offset: U64,
    /// 32: bytes
    pub(crate) len: U64,
}
const _: () = assert!(size_of::<RawChunk>() == 40);

/// A table of chunks, checked.
pub(crate) struct Table<'a> {
    pub(crate) first_sector: u64,
    pub(crate) sectors: u64,
    pub(crate) data_offset: u64,
    /// CRC-32 of the sectors that the table maps, if there is one.
    pub(crate) crc: Option<u32>,
    pub(crate) chunks: &'a [RawChunk],
}

impl<'a> Table<'a> {
    /// Decodes a table.
    ///
    /// # Errors
    /// `Malformed` if the table has no signature, another version, or fewer chunks than it says.
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self> {
        let Some((raw, rest)) =
            RawTable::ref_from_prefix(bytes).ok().filter(|(raw, _)| raw.magic == *TABLE_MAGIC)
        else {
            return Err(Error::malformed("a table of chunks has no signature"));
        };
        if raw.version.get() != 1 {
            let version = raw.version.get();
            return Err(Error::unsupported(format!("a table of chunks has version {version}, not 1")));
        }
        let count = raw.chunks.get();
        let chunks = usize::try_from(count)
            .ok()
            .and_then(|count| <[RawChunk]>::ref_from_prefix_with_elems(rest, count).ok());
        let Some((chunks, _)) = chunks else {
            return Err(Error::malformed(format!(
                "a table says that it has {count} chunks, but has {} bytes",
                rest.len()
            )));
        };
        Ok(Self {
            first_sector: raw.first_sector.get(),
            sectors: raw.sectors.get(),
            data_offset: raw.data_offset.get(),
            crc: raw.checksum.crc(),
            chunks,
        })
    }
}
