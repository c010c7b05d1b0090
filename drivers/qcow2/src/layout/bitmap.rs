//! Bitmap directory: reading and writing its entries.

use imgtool_core::{Error, RandomInput, Result};

use super::extension::BitmapsExtension;
use super::header::{AUTOCLEAR_BITMAPS, Header};
use super::table::{be16, be32, be64, check_table};
use super::{LISTED_ENTRY_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_LISTED_BYTES};

/// Length in bytes of an entry before its extra data. Specification, "Bitmap directory".
const FIXED_LEN: usize = 24;
/// Flag of a bitmap that was not saved correctly. Specification, "Bitmap directory", "flags".
const FLAG_IN_USE: u32 = 1;
/// Flag of a bitmap that tracks all writes to the disk. Same source.
const FLAG_AUTO: u32 = 2;
/// Flag of a bitmap whose extra data need not be understood. Same source.
const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 4;
/// Type of a bitmap that tracks writes, the only one. Same source, "type".
const DIRTY_TRACKING: u8 = 1;

/// Minimum granularity in bytes. QEMU's limit.
pub const MIN_GRANULARITY: u64 = 1 << 9;
/// Maximum granularity in bytes. QEMU's limit.
pub const MAX_GRANULARITY: u64 = 1 << 31;

/// Entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Host offset of the bitmap table.
    pub table_offset: u64,
    /// Number of entries of the bitmap table, eight bytes each.
    pub table_entries: u32,
    /// True if the bitmap was not saved correctly.
    pub in_use: bool,
    /// True if the bitmap tracks all writes to the disk.
    pub auto: bool,
    /// Number of guest bytes that one bit covers.
    pub granularity: u64,
    /// Name; untrusted.
    pub name: String,
    /// Feature of the bitmap that a program must know, worded to follow the name; `None` if it has no such
    /// feature.
    pub unknown: Option<String>,
}

/// Returns the number of bitmaps; 0 if the header marks the directory as inconsistent.
pub fn count(header: &Header) -> u32 {
    consistent_extension(header).map_or(0, |extension| extension.count)
}

/// True if a program that does not know bitmaps has written to the image, so that all of them may lack changes.
/// Specification, "Autoclear feature bits".
pub fn are_stale(header: &Header) -> bool {
    header.autoclear & AUTOCLEAR_BITMAPS == 0
}

fn consistent_extension(header: &Header) -> Option<BitmapsExtension> {
    header.extensions.bitmaps.filter(|_| !are_stale(header))
}

/// Returns the first bitmaps, as many as fit into [`MAX_LISTED_BYTES`].
pub fn list_bitmaps(input: &RandomInput, header: &Header) -> Result<Vec<Bitmap>> {
    let mut bitmaps = Vec::new();
    let mut budget = MAX_LISTED_BYTES;
    walk_bitmaps(input, header, |bitmap| {
        budget = budget.saturating_sub(bitmap.name.len() + LISTED_ENTRY_BYTES);
        if budget > 0 {
            bitmaps.push(bitmap);
        }
    })?;
    Ok(bitmaps)
}

/// Calls `visit` for every bitmap, unless the header marks the directory as inconsistent.
pub fn walk_bitmaps(input: &RandomInput, header: &Header, visit: impl FnMut(Bitmap)) -> Result<()> {
    match consistent_extension(header) {
        Some(extension) => walk_directory(input, header, extension, visit),
        None => Ok(()),
    }
}

/// Calls `visit` for every bitmap of a directory, whether it is consistent or not.
pub fn walk_directory(
    input: &RandomInput,
    header: &Header,
    extension: BitmapsExtension,
    mut visit: impl FnMut(Bitmap),
) -> Result<()> {
    if extension.count > MAX_BITMAPS {
        return Err(Error::limit(format!("{} bitmaps, above {MAX_BITMAPS}", extension.count)));
    }
    check_table(
        "the bitmap directory",
        extension.directory_offset,
        extension.directory_len,
        MAX_BITMAP_DIRECTORY_BYTES,
        header.shape.cluster_size(),
        extension.directory_offset,
    )?;
    let len = usize::try_from(extension.directory_len)
        .map_err(|_| Error::limit("the bitmap directory is too large"))?;
    let directory = input.read_vec(extension.directory_offset, len)?;
    let mut at = 0usize;
    for _ in 0..extension.count {
        let (bitmap, len) = directory.get(at..).and_then(parse).ok_or_else(|| {
            Error::malformed("an entry of the bitmap directory leaves the directory")
                .at(extension.directory_offset + at as u64)
        })?;
        visit(bitmap);
        at += len;
    }
    Ok(())
}

/// Parses the entry at the start of `bytes`. Returns it with its padded length in bytes, or `None` if it is
/// invalid or extends past the end of `bytes`.
fn parse(bytes: &[u8]) -> Option<(Bitmap, usize)> {
    let flags = be32(bytes, 12)?;
    let granularity_bits = u32::from(*bytes.get(17)?);
    let name_len = usize::from(be16(bytes, 18)?);
    let extra_len = usize::try_from(be32(bytes, 20)?).ok()?;
    let name_start = FIXED_LEN.checked_add(extra_len)?;
    let name_end = name_start.checked_add(name_len)?;
    let name = bytes.get(name_start..name_end)?;
    let kind = *bytes.get(16)?;
    let known_flags = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE;
    let unknown = if kind != DIRTY_TRACKING {
        Some(format!("has the unknown type {kind}"))
    } else if flags & !known_flags != 0 {
        Some(format!("has the unknown flags {:#x}", flags & !known_flags))
    } else if extra_len > 0 && flags & FLAG_EXTRA_DATA_COMPATIBLE == 0 {
        Some(format!("has {extra_len} bytes of unknown data"))
    } else {
        None
    };
    let bitmap = Bitmap {
        unknown,
        table_offset: be64(bytes, 0)?,
        table_entries: be32(bytes, 8)?,
        in_use: flags & FLAG_IN_USE != 0,
        auto: flags & FLAG_AUTO != 0,
        granularity: 1u64.checked_shl(granularity_bits)?,
        name: String::from_utf8_lossy(name).into_owned(),
    };
    Some((bitmap, name_end.next_multiple_of(8)))
}

/// Encodes the entry of a bitmap of a new image.
pub fn encode(bitmap: &imgtool_core::Bitmap, table_offset: u64, table_entries: u32) -> Vec<u8> {
    let mut bytes = table_offset.to_be_bytes().to_vec();
    bytes.extend(table_entries.to_be_bytes());
    bytes.extend(if bitmap.auto { FLAG_AUTO } else { 0 }.to_be_bytes());
    // The source checks granularity and name: at most 31, and 1023 bytes.
    bytes.extend([DIRTY_TRACKING, bitmap.granularity.ilog2() as u8]);
    bytes.extend((bitmap.name.len() as u16).to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(bitmap.name.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Returns the length in bytes of the bitmaps of a disk of `size` bytes in an image with this cluster size,
/// if every bit is stored.
pub fn stored_len<'a>(
    bitmaps: impl Iterator<Item = &'a imgtool_core::Bitmap>,
    size: u64,
    cluster_size: u64,
) -> u64 {
    let (mut len, mut directory) = (0u64, 0u64);
    for bitmap in bitmaps {
        let clusters = bitmap.byte_len(size).div_ceil(cluster_size);
        let table = (clusters * 8).next_multiple_of(cluster_size);
        len = len.saturating_add(clusters * cluster_size).saturating_add(table);
        directory += (FIXED_LEN + bitmap.name.len()).next_multiple_of(8) as u64;
    }
    len.saturating_add(directory.next_multiple_of(cluster_size))
}
