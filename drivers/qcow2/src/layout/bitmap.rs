//! Bitmap directory. Persistent bitmaps are listed and checked, but never converted.

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
}

/// Returns the number of bitmaps; 0 if the header marks the directory as inconsistent.
pub fn count(header: &Header) -> u32 {
    consistent_extension(header).map_or(0, |extension| extension.count)
}

fn consistent_extension(header: &Header) -> Option<BitmapsExtension> {
    header.extensions.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0)
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
pub fn walk_bitmaps(input: &RandomInput, header: &Header, mut visit: impl FnMut(Bitmap)) -> Result<()> {
    let Some(extension) = consistent_extension(header) else { return Ok(()) };
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
    let bitmap = Bitmap {
        table_offset: be64(bytes, 0)?,
        table_entries: be32(bytes, 8)?,
        in_use: flags & FLAG_IN_USE != 0,
        auto: flags & FLAG_AUTO != 0,
        granularity: 1u64.checked_shl(granularity_bits)?,
        name: String::from_utf8_lossy(name).into_owned(),
    };
    Some((bitmap, name_end.next_multiple_of(8)))
}
