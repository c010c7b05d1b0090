//! Persistent bitmaps of an existing image: those that track writes mark the whole disk as changed.
//!
//! A bitmap that missed a change would make an incremental backup incomplete in silence. One that marks too
//! much costs only time.

use imgtool_core::{Error, Input, Output, RandomInput, Result};

use super::refcounts::{Clusters, RefcountEditor};
use crate::layout::bitmap::{Bitmap, walk_bitmaps};
use crate::layout::header::Header;
use crate::layout::table::{decode_table, encode_table};

/// Entry of a bitmap table for a cluster of set bits, which is not stored. Specification, "Bitmap table".
const ALL_ONES: u64 = 1;

/// Bits 9 to 55 of an entry: the host offset of a cluster of bits. Same source.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Number of entries that are changed at once. Our choice: 64 KiB of a table.
const CHUNK: u64 = 8192;

/// Maximum number of entries of a bitmap table. Our limit: a bit for every 64 KiB of 16 TiB in clusters of 512
/// bytes.
const MAX_ENTRIES: u32 = 1 << 20;

/// Returns the number of bitmaps that track writes.
///
/// # Errors
/// [`imgtool_core::ErrorKind::LimitExceeded`] for a bitmap with too many entries; any error of reading the
/// directory.
pub fn count_tracking(input: &RandomInput, header: &Header) -> Result<usize> {
    let mut count = 0;
    let mut largest = 0;
    walk_bitmaps(input, header, |bitmap| {
        if bitmap.auto {
            count += 1;
            largest = largest.max(bitmap.table_entries);
        }
    })?;
    match largest {
        0..=MAX_ENTRIES => Ok(count),
        _ => Err(Error::limit(format!("a bitmap has {largest} table entries, above {MAX_ENTRIES}"))
            .hint("remove it first: qemu-img bitmap --remove")),
    }
}

/// Sets all bits of the bitmaps that track writes, and releases the clusters of their old bits.
pub fn mark_all(
    input: Input,
    header: &Header,
    output: &Output,
    refcounts: &mut RefcountEditor,
) -> Result<()> {
    let input = input.into_random()?;
    let mut marked = Ok(());
    walk_bitmaps(&input, header, |bitmap| {
        if bitmap.auto && marked.is_ok() {
            marked = mark(&bitmap, output, refcounts);
        }
    })?;
    marked
}

fn mark(bitmap: &Bitmap, output: &Output, refcounts: &mut RefcountEditor) -> Result<()> {
    let entries = u64::from(bitmap.table_entries);
    for first in (0..entries).step_by(CHUNK as usize) {
        let count = CHUNK.min(entries - first) as usize;
        let place = bitmap.table_offset.saturating_add(first * 8);
        let mut old = vec![0; count * 8];
        output.read_exact_at(&mut old, place)?;
        let mut new = Vec::new();
        encode_table(&vec![ALL_ONES; count], &mut new);
        output.write_at(&new, place)?;
        // A cluster is released, and may be used again, once no table refers to it.
        output.sync()?;
        for entry in decode_table(&old) {
            if entry & OFFSET_MASK != 0 {
                refcounts.release(Clusters { offset: entry & OFFSET_MASK, count: 1 })?;
            }
        }
    }
    Ok(())
}
