//! The metadata region (section 2.6): a table and the items that it points to.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bat::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use super::{MAX_VIRTUAL_SIZE, guid};

/// Length in bytes of the table at the start of the region; the items follow it (section 2.6.1).
pub(crate) const METADATA_TABLE_LEN: usize = 64 << 10;
/// Maximum number of entries (section 2.6.1.1).
const MAX_ENTRIES: u16 = 2047;
/// Maximum length of an item in bytes (section 2.6.1.2).
pub(crate) const MAX_ITEM_LEN: u32 = 1 << 20;

const SIGNATURE: &[u8; 8] = b"metadata";

// GUIDs of the known items (section 2.6.2).
const FILE_PARAMETERS: Uuid = Uuid::from_u128(0xCAA1_6737_FA36_4D43_B3B6_33F0_AA44_E76B);
const VIRTUAL_DISK_SIZE: Uuid = Uuid::from_u128(0x2FA5_4224_CD1B_4876_B211_5DBE_D83B_F4B8);
const VIRTUAL_DISK_ID: Uuid = Uuid::from_u128(0xBECA_12AB_B2E6_4523_93EF_C309_E000_C746);
const LOGICAL_SECTOR_SIZE: Uuid = Uuid::from_u128(0x8141_BF1D_A96F_4709_BA47_F233_A8FA_AB5F);
const PHYSICAL_SECTOR_SIZE: Uuid = Uuid::from_u128(0xCDA3_48C7_445D_4471_9CC9_E988_5251_C556);
const PARENT_LOCATOR: Uuid = Uuid::from_u128(0xA8D3_5F2D_B30B_454D_ABF7_D3D8_4834_AB0C);

// Bits of an entry's flags (section 2.6.1.2).
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

// Bits of the file parameters (section 2.6.2.1).
const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// Type of a parent locator with the keys of section 2.6.2.6.3.
const VHDX_LOCATOR: Uuid = Uuid::from_u128(0xB04A_EFB7_D19E_4A81_B789_25B8_E944_5913);

/// Maximum number of keys of a parent locator. Our limit: the specification defines five. The item's length
/// does not bound the decoded strings, because keys and values may overlap in the file.
const MAX_LOCATOR_KEYS: u16 = 64;

/// VHDX_METADATA_TABLE_HEADER (section 2.6.1.1).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTableHeader {
    /// 0
    signature: [u8; 8],
    /// 8
    reserved: U16,
    /// 10
    entry_count: U16,
    /// 12
    reserved2: [u8; 20],
}
const _: () = assert!(size_of::<RawTableHeader>() == 32);

/// VHDX_METADATA_TABLE_ENTRY (section 2.6.1.2).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0
    item_id: [u8; 16],
    /// 16: bytes from the start of the region, at least 64 KiB, or 0 for an empty item
    offset: U32,
    /// 20: bytes
    length: U32,
    /// 24
    flags: U32,
    /// 28
    reserved: U32,
}
const _: () = assert!(size_of::<RawEntry>() == 32);

/// VHDX_PARENT_LOCATOR_HEADER (section 2.6.2.6.1).
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocatorHeader {
    /// 0
    locator_type: [u8; 16],
    /// 16
    reserved: U16,
    /// 18
    key_value_count: U16,
}
const _: () = assert!(size_of::<RawLocatorHeader>() == 20);

/// VHDX_PARENT_LOCATOR_ENTRY (section 2.6.2.6.2): offsets count from the start of the item.
/// Each field's doc begins with the field's offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocatorEntry {
    /// 0
    key_offset: U32,
    /// 4
    value_offset: U32,
    /// 8
    key_length: U16,
    /// 10
    value_length: U16,
}
const _: () = assert!(size_of::<RawLocatorEntry>() == 12);

/// Range of the metadata region that stores an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ItemRange {
    /// Offset in bytes from the start of the region.
    pub(crate) offset: u32,
    /// Length in bytes, at most [`MAX_ITEM_LEN`].
    pub(crate) length: u32,
}

/// A decoded metadata table: the range of each known item; `None` if the file has no such item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MetadataTable {
    pub(crate) file_parameters: ItemRange,
    pub(crate) virtual_disk_size: ItemRange,
    pub(crate) virtual_disk_id: Option<ItemRange>,
    pub(crate) logical_sector_size: ItemRange,
    pub(crate) physical_sector_size: Option<ItemRange>,
    pub(crate) parent_locator: Option<ItemRange>,
}

/// Reason why the metadata is unusable.
#[derive(Debug, Clone)]
pub(crate) enum MetadataFault {
    /// The metadata breaks the format's rules.
    Malformed(String),
    /// The metadata is valid, but requires a feature that is not supported.
    Unsupported(String),
}

fn malformed<T>(text: impl Into<String>) -> Result<T, MetadataFault> {
    Err(MetadataFault::Malformed(text.into()))
}

impl MetadataTable {
    /// Decodes the table from its 64 KiB, for a region of `region_length` bytes.
    pub(crate) fn decode(bytes: &[u8], region_length: u32) -> Result<Self, MetadataFault> {
        let Ok((header, rest)) = RawTableHeader::ref_from_prefix(bytes) else {
            return malformed("the metadata table is cut short");
        };
        if &header.signature != SIGNATURE {
            return malformed("the metadata table has no signature");
        }
        let count = header.entry_count.get();
        let entries = match <[RawEntry]>::ref_from_prefix_with_elems(rest, count.min(MAX_ENTRIES).into()) {
            Ok((entries, _)) if count <= MAX_ENTRIES => entries,
            _ => {
                return malformed(format!(
                    "the metadata table has {count} entries; the limit is {MAX_ENTRIES}"
                ));
            }
        };
        let mut found: [Option<ItemRange>; 6] = [None; 6];
        for entry in entries {
            let id = guid(entry.item_id);
            let flags = entry.flags.get();
            let known =
                KNOWN_ITEMS.iter().position(|(known, _)| *known == id).filter(|_| flags & IS_USER == 0);
            let Some(index) = known else {
                if flags & IS_REQUIRED != 0 {
                    return Err(MetadataFault::Unsupported(format!(
                        "the image requires the unknown metadata item {id}"
                    )));
                }
                continue;
            };
            let range = ItemRange { offset: entry.offset.get(), length: entry.length.get() };
            check_item_range(range, region_length, KNOWN_ITEMS[index].1)?;
            if found[index].replace(range).is_some() {
                return malformed(format!("the metadata table lists the {} twice", KNOWN_ITEMS[index].1));
            }
        }
        let required = |index: usize| {
            found[index].ok_or_else(|| {
                MetadataFault::Malformed(format!("the metadata table has no {}", KNOWN_ITEMS[index].1))
            })
        };
        Ok(Self {
            file_parameters: required(0)?,
            virtual_disk_size: required(1)?,
            logical_sector_size: required(2)?,
            virtual_disk_id: found[3],
            physical_sector_size: found[4],
            parent_locator: found[5],
        })
    }
}

/// GUIDs and names of the known items. [`MetadataTable::decode`] refers to them by index.
const KNOWN_ITEMS: [(Uuid, &str); 6] = [
    (FILE_PARAMETERS, "file parameters"),
    (VIRTUAL_DISK_SIZE, "virtual disk size"),
    (LOGICAL_SECTOR_SIZE, "logical sector size"),
    (VIRTUAL_DISK_ID, "virtual disk ID"),
    (PHYSICAL_SECTOR_SIZE, "physical sector size"),
    (PARENT_LOCATOR, "parent locator"),
];

/// Checks that an item is after the table and inside the region, and that it is not too long.
fn check_item_range(range: ItemRange, region_length: u32, name: &str) -> Result<(), MetadataFault> {
    let ItemRange { offset, length } = range;
    let fits = offset.checked_add(length).is_some_and(|end| end <= region_length);
    if (offset as usize) < METADATA_TABLE_LEN || !fits || length > MAX_ITEM_LEN {
        return malformed(format!(
            "the metadata table places the {name} at {offset} with {length} bytes, outside of 65536..{region_length}"
        ));
    }
    Ok(())
}

/// Properties of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Size in bytes of a payload block.
    pub(crate) block_size: u32,
    /// True if the file is fixed: every block stays allocated.
    pub(crate) leave_blocks_allocated: bool,
    /// True if the file is differencing.
    pub(crate) has_parent: bool,
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// SCSI page 83 identifier (section 2.6.2.3); nil if the file has no such item.
    pub(crate) virtual_disk_id: Uuid,
    /// Logical sector size in bytes: 512 or 4096.
    pub(crate) logical_sector_size: u32,
    /// Physical sector size in bytes: 512 or 4096; 0 if the file has no such item.
    pub(crate) physical_sector_size: u32,
}

/// On-disk bytes of the items of fixed length; all zero for an optional item that the file does not have.
#[derive(Debug, Default)]
pub(crate) struct RawItems {
    pub(crate) file_parameters: [u8; 8],
    pub(crate) virtual_disk_size: [u8; 8],
    pub(crate) virtual_disk_id: [u8; 16],
    pub(crate) logical_sector_size: [u8; 4],
    pub(crate) physical_sector_size: [u8; 4],
}

impl Metadata {
    /// Decodes and checks the items.
    pub(crate) fn decode(items: &RawItems) -> Result<Self, MetadataFault> {
        let [b0, b1, b2, b3, f0, f1, f2, f3] = items.file_parameters;
        let block_size = u32::from_le_bytes([b0, b1, b2, b3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let metadata = Self {
            block_size,
            leave_blocks_allocated: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            has_parent: flags & HAS_PARENT != 0,
            virtual_size: u64::from_le_bytes(items.virtual_disk_size),
            virtual_disk_id: guid(items.virtual_disk_id),
            logical_sector_size: u32::from_le_bytes(items.logical_sector_size),
            physical_sector_size: u32::from_le_bytes(items.physical_sector_size),
        };
        metadata.check()?;
        Ok(metadata)
    }

    fn check(&self) -> Result<(), MetadataFault> {
        let block_size = u64::from(self.block_size);
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            return malformed(format!(
                "the block size is {block_size}; it must be a power of two from 1 MiB to 256 MiB"
            ));
        }
        if !matches!(self.logical_sector_size, 512 | 4096) {
            return malformed(format!(
                "the logical sector size is {}; it must be 512 or 4096",
                self.logical_sector_size
            ));
        }
        if !matches!(self.physical_sector_size, 0 | 512 | 4096) {
            return malformed(format!(
                "the physical sector size is {}; it must be 512 or 4096",
                self.physical_sector_size
            ));
        }
        if self.virtual_size > MAX_VIRTUAL_SIZE {
            return malformed(format!(
                "the virtual size is {} bytes; the limit is {MAX_VIRTUAL_SIZE} (64 TiB)",
                self.virtual_size
            ));
        }
        if !self.virtual_size.is_multiple_of(self.logical_sector_size.into()) {
            return malformed(format!(
                "the virtual size of {} bytes is not a multiple of the logical sector size {}",
                self.virtual_size, self.logical_sector_size
            ));
        }
        Ok(())
    }

    /// Encodes the table and the items, which begin the metadata region. `locator` has the keys and values of
    /// the parent locator; it is empty without a parent.
    pub(crate) fn encode(&self, locator: &[(&str, String)]) -> Vec<u8> {
        let mut flags = if self.has_parent { HAS_PARENT } else { 0 };
        if self.leave_blocks_allocated {
            flags |= LEAVE_BLOCKS_ALLOCATED;
        }
        let parameters = [self.block_size.to_le_bytes(), u32::to_le_bytes(flags)].concat();
        let disk = IS_VIRTUAL_DISK | IS_REQUIRED;
        let mut items: Vec<(Uuid, u32, Vec<u8>)> = vec![
            (FILE_PARAMETERS, IS_REQUIRED, parameters),
            (VIRTUAL_DISK_SIZE, disk, self.virtual_size.to_le_bytes().to_vec()),
            (VIRTUAL_DISK_ID, disk, self.virtual_disk_id.to_bytes_le().to_vec()),
            (LOGICAL_SECTOR_SIZE, disk, self.logical_sector_size.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR_SIZE, disk, self.physical_sector_size.to_le_bytes().to_vec()),
        ];
        if self.has_parent {
            items.push((PARENT_LOCATOR, IS_REQUIRED, encode_parent_locator(locator)));
        }
        let header = RawTableHeader {
            signature: *SIGNATURE,
            reserved: U16::ZERO,
            entry_count: (items.len() as u16).into(),
            reserved2: [0; 20],
        };
        let mut table = header.as_bytes().to_vec();
        let mut values = Vec::new();
        for (id, flags, value) in items {
            let entry = RawEntry {
                item_id: id.to_bytes_le(),
                offset: ((METADATA_TABLE_LEN + values.len()) as u32).into(),
                length: (value.len() as u32).into(),
                flags: flags.into(),
                reserved: U32::ZERO,
            };
            table.extend_from_slice(entry.as_bytes());
            values.extend(value);
        }
        table.resize(METADATA_TABLE_LEN, 0);
        table.extend(values);
        table
    }
}

/// Encodes a parent locator (section 2.6.2.6). The options bound the lengths of its texts.
fn encode_parent_locator(pairs: &[(&str, String)]) -> Vec<u8> {
    let header = RawLocatorHeader {
        locator_type: VHDX_LOCATOR.to_bytes_le(),
        reserved: U16::ZERO,
        key_value_count: (pairs.len() as u16).into(),
    };
    let mut entries = header.as_bytes().to_vec();
    let texts_at = entries.len() + pairs.len() * size_of::<RawLocatorEntry>();
    let mut texts = Vec::new();
    let mut push = |text: &str| {
        let start = texts_at + texts.len();
        texts.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
        (start as u32, (texts_at + texts.len() - start) as u16)
    };
    for (key, value) in pairs {
        let (key_offset, key_length) = push(key);
        let (value_offset, value_length) = push(value);
        let entry = RawLocatorEntry {
            key_offset: key_offset.into(),
            value_offset: value_offset.into(),
            key_length: key_length.into(),
            value_length: value_length.into(),
        };
        entries.extend_from_slice(entry.as_bytes());
    }
    entries.extend(texts);
    entries
}

/// Decodes the keys and values of a parent locator, in the file's order (section 2.6.2.6).
pub(crate) fn decode_parent_locator(item: &[u8]) -> Result<Vec<(String, String)>, MetadataFault> {
    let Ok((header, rest)) = RawLocatorHeader::ref_from_prefix(item) else {
        return malformed("the parent locator is cut short");
    };
    let kind = guid(header.locator_type);
    if kind != VHDX_LOCATOR {
        return Err(MetadataFault::Unsupported(format!("the parent locator has the unknown type {kind}")));
    }
    let count = header.key_value_count.get();
    if count > MAX_LOCATOR_KEYS {
        return malformed(format!("the parent locator has {count} keys; the limit is {MAX_LOCATOR_KEYS}"));
    }
    let Ok((entries, _)) = <[RawLocatorEntry]>::ref_from_prefix_with_elems(rest, count.into()) else {
        return malformed(format!(
            "the {count} entries of the parent locator exceed its {} bytes",
            item.len()
        ));
    };
    let mut pairs = Vec::new();
    for entry in entries {
        let key = locator_string(item, entry.key_offset, entry.key_length)?;
        let value = locator_string(item, entry.value_offset, entry.value_length)?;
        if pairs.iter().any(|(known, _)| *known == key) {
            return malformed(format!("the parent locator has the key '{key}' twice"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Decodes a key or value from UTF-16LE. `offset` and `length` are in bytes; `offset` counts from the start
/// of the item.
fn locator_string(item: &[u8], offset: U32, length: U16) -> Result<String, MetadataFault> {
    let start = offset.get() as usize;
    let bytes = item.get(start..).and_then(|rest| rest.get(..usize::from(length.get())));
    let units: Option<Vec<u16>> = bytes
        .filter(|bytes| bytes.len().is_multiple_of(2))
        .map(|bytes| bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect());
    match units.map(|units| String::from_utf16(&units)) {
        Some(Ok(text)) => Ok(text),
        _ => malformed(format!("the {length} bytes at {start} of the parent locator are not valid UTF-16")),
    }
}
