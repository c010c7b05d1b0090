//! The header, in both of its versions, and the entries of the block map.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// File offset of the signature; text for people precedes it.
pub(crate) const SIGNATURE_AT: usize = 64;
/// Signature of every version.
pub(crate) const SIGNATURE: u32 = 0xbeda_107f;
/// Number of bytes that contain the header of any version.
pub(crate) const MAX_HEADER_LEN: usize = 512;
/// Text at the start of a new file. VirtualBox writes the same; no reader checks it.
const TEXT: &[u8] = b"<<< Oracle VM VirtualBox Disk Image >>>\n";

/// Minimum size of a block in bytes. Our limit; VirtualBox writes 1 MiB.
pub(crate) const MIN_BLOCK_SIZE: u32 = 4 << 10;
/// Maximum size of a block in bytes. Our limit.
pub(crate) const MAX_BLOCK_SIZE: u32 = 64 << 20;
/// Width of an entry of the block map in bytes.
pub(crate) const ENTRY_LEN: u64 = 4;
/// Maximum virtual size in bytes. Our limit: guest offsets stay below 2^63.
const MAX_VIRTUAL_SIZE: u64 = 1 << 63;

/// Size of a disk sector in bytes. VirtualBox supports no other.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Version 1.1, major number in the high half.
const VERSION_1_1: u32 = 0x0001_0001;
/// Version 0.1.
const VERSION_0_1: u32 = 0x0000_0001;
/// Minimum value of the field `header_size` in version 1.1: the header before the logical geometry was added.
const MIN_HEADER_SIZE: u32 = 384;

/// Header of version 1.1. Each field's doc begins with its file offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    text: [u8; 64],
    /// 64
    signature: U32,
    /// 68
    version: U32,
    /// 72: length of the header in bytes, counted from this field
    header_size: U32,
    /// 76
    image_type: U32,
    /// 80
    flags: U32,
    /// 84
    comment: [u8; 256],
    /// 340: file offset of the block map
    map_offset: U32,
    /// 344: file offset of the first block
    data_offset: U32,
    /// 348: physical geometry, which new images do not have
    cylinders: U32,
    /// 352
    heads: U32,
    /// 356
    sectors: U32,
    /// 360
    sector_size: U32,
    /// 364
    unused: U32,
    /// 368: bytes
    virtual_size: U64,
    /// 376: bytes
    block_size: U32,
    /// 380: bytes stored before the data of each block
    block_extra: U32,
    /// 384: number of entries in the map
    blocks: U32,
    /// 388: number of blocks in the file
    allocated: U32,
    /// 392
    uuid: [u8; 16],
    /// 408: changes with the content
    modification_uuid: [u8; 16],
    /// 424: nil if there is no parent
    parent_uuid: [u8; 16],
    /// 440
    parent_modification_uuid: [u8; 16],
    /// 456: logical geometry
    logical_cylinders: U32,
    /// 460
    logical_heads: U32,
    /// 464
    logical_sectors: U32,
    /// 468
    logical_sector_size: U32,
}
const _: () = assert!(size_of::<RawHeader>() == 472);

/// Header of version 0.1; the block map follows it.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OldHeader {
    /// 0: text, signature and version
    start: [u8; 72],
    /// 72
    image_type: U32,
    /// 76
    flags: U32,
    /// 80
    comment: [u8; 256],
    /// 336: physical geometry and sector size
    geometry: [U32; 4],
    /// 352: bytes
    virtual_size: U64,
    /// 360: bytes
    block_size: U32,
    /// 364: number of entries in the map
    blocks: U32,
    /// 368: number of blocks in the file
    allocated: U32,
    /// 372
    uuid: [u8; 16],
    /// 388
    modification_uuid: [u8; 16],
    /// 404: nil if there is no parent
    parent_uuid: [u8; 16],
}
const _: () = assert!(size_of::<OldHeader>() == 420);

/// Type of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageType {
    /// Blocks are allocated when the guest writes to them.
    Dynamic,
    /// All blocks are allocated.
    Fixed,
    /// The image contains the changes to a parent.
    Differencing,
}

impl ImageType {
    /// Returns the name for the user.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Differencing => "differencing",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Dynamic => 1,
            Self::Fixed => 2,
            Self::Differencing => 4,
        }
    }
}

/// A fault of a header, worded as a sentence without a subject ("has …").
#[derive(Debug)]
pub(crate) enum HeaderFault {
    /// The file is not a VDI image.
    NotVdi,
    /// The image needs a feature that this driver does not have.
    Unsupported(String),
    /// The header contradicts itself.
    Malformed(String),
}

/// A decoded and checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Version, major number in the high half.
    pub(crate) version: u32,
    /// Type of the image.
    pub(crate) image_type: ImageType,
    /// Comment of the user; untrusted.
    pub(crate) comment: String,
    /// File offset of the block map.
    pub(crate) map_offset: u64,
    /// File offset of the first block.
    pub(crate) data_offset: u64,
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// Size of a block in guest bytes, a power of two.
    pub(crate) block_size: u64,
    /// Number of bytes stored before the data of each block.
    pub(crate) block_extra: u64,
    /// Number of entries in the block map; at least as many as the disk has blocks.
    pub(crate) blocks: u64,
    /// Number of blocks in the file, as the header says.
    pub(crate) allocated: u64,
    /// UUID of the image.
    pub(crate) uuid: Uuid,
    /// UUID of the image's content.
    pub(crate) modification_uuid: Uuid,
    /// UUID of the parent; nil if there is none.
    pub(crate) parent_uuid: Uuid,
    /// UUID of the parent's content; nil in version 0.1, which does not store it.
    pub(crate) parent_modification_uuid: Uuid,
}

impl Header {
    /// Decodes and checks a header from the first bytes of the file, at most [`MAX_HEADER_LEN`] of them.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderFault> {
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
            bytes.copied().map(u32::from_le_bytes)
        };
        if word(SIGNATURE_AT) != Some(SIGNATURE) {
            return Err(HeaderFault::NotVdi);
        }
        let header = match word(SIGNATURE_AT + 4) {
            Some(VERSION_1_1) => Self::decode_new(bytes)?,
            Some(VERSION_0_1) => Self::decode_old(bytes)?,
            Some(version) => {
                return Err(HeaderFault::Unsupported(format!(
                    "has version {}.{}; only 0.1 and 1.1 are supported",
                    version >> 16,
                    version & 0xffff
                )));
            }
            None => return Err(HeaderFault::NotVdi),
        };
        header.check()?;
        Ok(header)
    }

    fn decode_new(bytes: &[u8]) -> Result<Self, HeaderFault> {
        let (raw, _) = RawHeader::ref_from_prefix(bytes).map_err(|_| cut_short())?;
        if raw.header_size.get() < MIN_HEADER_SIZE {
            return Err(HeaderFault::Malformed(format!(
                "has a header of {} bytes; the minimum is {MIN_HEADER_SIZE}",
                raw.header_size
            )));
        }
        Ok(Self {
            version: VERSION_1_1,
            image_type: image_type(raw.image_type.get())?,
            comment: text(&raw.comment),
            map_offset: raw.map_offset.get().into(),
            data_offset: raw.data_offset.get().into(),
            virtual_size: raw.virtual_size.get(),
            block_size: raw.block_size.get().into(),
            block_extra: raw.block_extra.get().into(),
            blocks: raw.blocks.get().into(),
            allocated: raw.allocated.get().into(),
            uuid: Uuid::from_bytes_le(raw.uuid),
            modification_uuid: Uuid::from_bytes_le(raw.modification_uuid),
            parent_uuid: Uuid::from_bytes_le(raw.parent_uuid),
            parent_modification_uuid: Uuid::from_bytes_le(raw.parent_modification_uuid),
        })
    }

    fn decode_old(bytes: &[u8]) -> Result<Self, HeaderFault> {
        let (raw, _) = OldHeader::ref_from_prefix(bytes).map_err(|_| cut_short())?;
        let map_offset = size_of::<OldHeader>() as u64;
        let blocks = u64::from(raw.blocks.get());
        Ok(Self {
            version: VERSION_0_1,
            image_type: image_type(raw.image_type.get())?,
            comment: text(&raw.comment),
            map_offset,
            data_offset: map_offset + blocks * ENTRY_LEN,
            virtual_size: raw.virtual_size.get(),
            block_size: raw.block_size.get().into(),
            block_extra: 0,
            blocks,
            allocated: raw.allocated.get().into(),
            uuid: Uuid::from_bytes_le(raw.uuid),
            modification_uuid: Uuid::from_bytes_le(raw.modification_uuid),
            parent_uuid: Uuid::from_bytes_le(raw.parent_uuid),
            parent_modification_uuid: Uuid::nil(),
        })
    }

    /// Checks the numbers against each other.
    fn check(&self) -> Result<(), HeaderFault> {
        let fault = |text: String| Err(HeaderFault::Malformed(text));
        let limits = u64::from(MIN_BLOCK_SIZE)..=u64::from(MAX_BLOCK_SIZE);
        if !self.block_size.is_power_of_two() || !limits.contains(&self.block_size) {
            return fault(format!(
                "has blocks of {} bytes; a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} is needed",
                self.block_size
            ));
        }
        if self.block_extra > u64::from(MAX_BLOCK_SIZE) {
            return fault(format!(
                "has {} bytes before each block; the maximum is {MAX_BLOCK_SIZE}",
                self.block_extra
            ));
        }
        if self.virtual_size > MAX_VIRTUAL_SIZE {
            return fault(format!(
                "has a disk of {} bytes; the maximum is {MAX_VIRTUAL_SIZE}",
                self.virtual_size
            ));
        }
        if self.virtual_size.div_ceil(self.block_size) > self.blocks {
            return fault(format!(
                "has {} entries in its map, but a disk of {} bytes needs {}",
                self.blocks,
                self.virtual_size,
                self.virtual_size.div_ceil(self.block_size)
            ));
        }
        let header_end = if self.version == VERSION_0_1 { size_of::<OldHeader>() } else { 456 } as u64;
        if self.map_offset < header_end || self.map_end() > self.data_offset {
            return fault(format!(
                "has its map of {} bytes at {} and its blocks at {}; header, map and blocks overlap",
                self.blocks * ENTRY_LEN,
                self.map_offset,
                self.data_offset
            ));
        }
        Ok(())
    }

    /// Returns the file offset one past the block map.
    pub(crate) fn map_end(&self) -> u64 {
        // Both numbers come from fields of 32 bits.
        self.map_offset + self.blocks * ENTRY_LEN
    }

    /// Returns the number of blocks of the disk.
    pub(crate) fn disk_blocks(&self) -> u64 {
        self.virtual_size.div_ceil(self.block_size)
    }

    /// Returns the file offset of the data of a block, by its position in the file. A position has 32 bits,
    /// and so have the lengths, so the sum fits.
    pub(crate) fn block_data(&self, position: u32) -> u64 {
        self.data_offset + u64::from(position) * (self.block_extra + self.block_size) + self.block_extra
    }

    /// Encodes a header of version 1.1.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // The options bound all of these below 2^32.
        let narrow = |number: u64| U32::new(u32::try_from(number).unwrap_or(u32::MAX));
        let mut raw = RawHeader::new_zeroed();
        raw.text[..TEXT.len()].copy_from_slice(TEXT);
        raw.signature = SIGNATURE.into();
        raw.version = VERSION_1_1.into();
        raw.header_size = narrow((size_of::<RawHeader>() - 72) as u64);
        raw.image_type = self.image_type.number().into();
        raw.map_offset = narrow(self.map_offset);
        raw.data_offset = narrow(self.data_offset);
        raw.sector_size = narrow(SECTOR_SIZE);
        raw.virtual_size = self.virtual_size.into();
        raw.block_size = narrow(self.block_size);
        raw.blocks = narrow(self.blocks);
        raw.allocated = narrow(self.allocated);
        raw.uuid = self.uuid.to_bytes_le();
        raw.modification_uuid = self.modification_uuid.to_bytes_le();
        raw.parent_uuid = self.parent_uuid.to_bytes_le();
        raw.parent_modification_uuid = self.parent_modification_uuid.to_bytes_le();
        raw.logical_sector_size = narrow(SECTOR_SIZE);
        raw.as_bytes().to_vec()
    }
}

fn cut_short() -> HeaderFault {
    HeaderFault::Malformed("has a header that is cut short".to_owned())
}

fn image_type(number: u32) -> Result<ImageType, HeaderFault> {
    match number {
        1 => Ok(ImageType::Dynamic),
        2 => Ok(ImageType::Fixed),
        4 => Ok(ImageType::Differencing),
        3 => Err(HeaderFault::Unsupported("is an undo log (type 3), which is not supported".to_owned())),
        _ => Err(HeaderFault::Malformed(format!("has the unknown type {number}"))),
    }
}

/// Decodes the comment, which ends at the first NUL.
fn text(bytes: &[u8]) -> String {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// Number of an entry for a block that is not in the image.
const ABSENT: u32 = 0xffff_ffff;
/// Number of an entry for a block of zeros.
const ZERO: u32 = 0xffff_fffe;

/// An entry of the block map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The block is stored at this position of the file.
    Stored(u32),
    /// The block reads as zeros, whatever the parent contains.
    Zero,
    /// The block is not in this image.
    Absent,
}

impl Entry {
    /// Decodes an entry.
    pub(crate) fn decode(bytes: [u8; 4]) -> Self {
        match u32::from_le_bytes(bytes) {
            ABSENT => Self::Absent,
            ZERO => Self::Zero,
            position => Self::Stored(position),
        }
    }

    /// Encodes an entry.
    pub(crate) fn encode(self) -> [u8; 4] {
        let number = match self {
            Self::Absent => ABSENT,
            Self::Zero => ZERO,
            Self::Stored(position) => position,
        };
        number.to_le_bytes()
    }
}
