//! The header of a COWD file, the sparse extent of ESX (VMFSSPARSE).

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::Fault;

pub(crate) const MAGIC: &[u8; 4] = b"COWD";
/// Length of the header in bytes.
pub(crate) const HEADER_LEN: usize = 2048;
/// Number of entries of a grain table; the header does not state it.
pub(crate) const TABLE_ENTRIES: u64 = 4096;

/// Maximum number of sectors of a grain. Our limit, as in hosted sparse files; redo logs have 1.
const MAX_GRAIN_SECTORS: u32 = 2048;
/// Maximum number of entries of the grain directory. Our limit: grains of a sector for 8 TiB.
const MAX_DIRECTORY_ENTRIES: u32 = 1 << 22;

/// The first fields as stored. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: [u8; 4],
    /// 4
    version: U32,
    /// 8
    flags: U32,
    /// 12: sectors
    capacity: U32,
    /// 16: sectors
    grain_size: U32,
    /// 20: sector of the grain directory
    directory: U32,
    /// 24
    directory_entries: U32,
    /// 28: sector behind the last grain
    next_free: U32,
    /// 32: of a root, its geometry; of a child, the name of its parent
    parent_name: [u8; 1024],
}

/// A decoded and checked header. Offsets and lengths are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) capacity: u64,
    pub(crate) grain_size: u64,
    pub(crate) directory: u64,
    pub(crate) directory_entries: u64,
    /// Name of the parent; empty in a root.
    pub(crate) parent_name: String,
    /// True if the header states the geometry of a disk, which a redo log does not.
    pub(crate) has_geometry: bool,
}

impl Header {
    /// Decodes and checks a header. `bytes` begins with the magic number.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(Fault::Malformed("is cut short".to_owned()));
        };
        if raw.version.get() != 1 {
            return Err(Fault::Unsupported(format!("has version {}; only 1 is supported", raw.version)));
        }
        let grain_size = raw.grain_size.get();
        if !grain_size.is_power_of_two() || grain_size > MAX_GRAIN_SECTORS {
            return Err(Fault::Malformed(format!(
                "has grains of {grain_size} sectors, not a power of two up to {MAX_GRAIN_SECTORS}"
            )));
        }
        let entries = raw.directory_entries.get();
        let needed = u64::from(raw.capacity.get()).div_ceil(u64::from(grain_size) * TABLE_ENTRIES);
        if u64::from(entries) < needed || entries > MAX_DIRECTORY_ENTRIES {
            return Err(Fault::Malformed(format!(
                "has {entries} directory entries; its capacity needs {needed}, and the limit is \
                 {MAX_DIRECTORY_ENTRIES}"
            )));
        }
        Ok(Self {
            capacity: raw.capacity.get().into(),
            grain_size: grain_size.into(),
            directory: raw.directory.get().into(),
            directory_entries: needed,
            has_geometry: raw.parent_name.first_chunk().is_some_and(|cylinders| *cylinders != [0; 4]),
            parent_name: parent_name(&raw.parent_name),
        })
    }
}

/// Returns the name of the parent. A root has cylinders, heads and sectors there: numbers whose first byte may
/// be a letter, but whose fourth is 0.
fn parent_name(bytes: &[u8]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if name.len() < 4 { String::new() } else { String::from_utf8_lossy(name).into_owned() }
}
