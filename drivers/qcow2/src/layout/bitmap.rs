//! The directory of persistent bitmaps: listed, never converted.

use imgtool_toolkit::{Error, RandomInput, Result};

use super::extension::BitmapsPointer;
use super::header::{AUTOCLEAR_BITMAPS, Header, check_table};
use super::{
    LISTED_ENTRY_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_LISTED_BYTES, be16, be32, be64,
};

/// Specification, "Bitmap directory": bytes before the extra data.
const FIXED_LEN: usize = 24;
/// Specification: the bitmap was not saved correctly.
const FLAG_IN_USE: u32 = 1;
/// Specification: the bitmap follows the guest's writes.
const FLAG_AUTO: u32 = 2;

/// One bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Where its table starts.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_entries: u32,
    /// It was not saved correctly.
    pub in_use: bool,
    /// It follows the guest's writes.
    pub auto: bool,
    /// Guest bytes of one bit.
    pub granularity: u64,
    /// Its name; not trusted.
    pub name: String,
}

/// How many bitmaps there are. None when the directory is marked inconsistent.
pub fn count(header: &Header) -> u32 {
    pointer(header).map_or(0, |pointer| pointer.count)
}

fn pointer(header: &Header) -> Option<BitmapsPointer> {
    header.extensions.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0)
}

/// The first bitmaps: all, unless there are very many.
pub fn list_bitmaps(input: &RandomInput, header: &Header) -> Result<Vec<Bitmap>> {
    let mut bitmaps = Vec::new();
    let mut room = MAX_LISTED_BYTES;
    walk_bitmaps(input, header, |bitmap| {
        room = room.saturating_sub(bitmap.name.len() + LISTED_ENTRY_BYTES);
        if room > 0 {
            bitmaps.push(bitmap);
        }
    })?;
    Ok(bitmaps)
}

/// Calls `see` for every bitmap.
pub fn walk_bitmaps(input: &RandomInput, header: &Header, mut see: impl FnMut(Bitmap)) -> Result<()> {
    let Some(pointer) = pointer(header) else { return Ok(()) };
    if pointer.count > MAX_BITMAPS {
        return Err(Error::limit(format!("{} bitmaps, above {MAX_BITMAPS}", pointer.count)));
    }
    check_table(
        "the bitmap directory",
        pointer.directory_offset,
        pointer.directory_len,
        MAX_BITMAP_DIRECTORY_BYTES,
        header.shape.cluster_size(),
        pointer.directory_offset,
    )?;
    let len = usize::try_from(pointer.directory_len)
        .map_err(|_| Error::limit("the bitmap directory is too large"))?;
    let directory = input.read_vec(pointer.directory_offset, len)?;
    let mut at = 0usize;
    for _ in 0..pointer.count {
        let (bitmap, len) = directory.get(at..).and_then(parse).ok_or_else(|| {
            Error::malformed("an entry of the bitmap directory leaves the directory")
                .at(pointer.directory_offset + at as u64)
        })?;
        see(bitmap);
        at += len;
    }
    Ok(())
}

/// An entry and its length.
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
