//! Persistent bitmaps of an image, for a copy into another one.

use std::sync::Arc;

use imgtool_core::{Bitmap, BitmapContent, Error, Lease, Memory, RandomInput, Result};

use crate::layout::bitmap::{self, Bitmap as Entry, MAX_GRANULARITY, MIN_GRANULARITY};
use crate::layout::header::Header;
use crate::layout::table::{check_table, decode_table};
use crate::layout::{MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_NAME, MAX_COPIED_BITMAP_BYTES};

/// Bits of an entry of a bitmap table that contain a host offset. Specification, "Bitmap table".
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit of an entry without host offset for a cluster of ones. Same source.
const ALL_ONES: u64 = 1;

/// Memory in bytes for a bitmap in the list besides its name, and for its entry in the copy. Our estimate.
const BYTES_PER_BITMAP: u64 = 512;

/// The bitmaps of an image.
pub(super) struct Bitmaps {
    pub(super) list: Vec<Bitmap>,
    /// Memory for the list.
    _lease: Lease,
}

impl Bitmaps {
    /// Reads the directory, and checks the place of every bitmap that can be copied.
    ///
    /// # Errors
    /// If the directory or the place of a table is not valid, or there are more bits than our limit.
    pub(super) fn read(input: &RandomInput, header: &Header, memory: &Memory) -> Result<Self> {
        let Some(extension) = header.extensions.bitmaps else {
            return Ok(Self { list: Vec::new(), _lease: memory.lease(0, "the list of bitmaps")? });
        };
        // `walk_directory` refuses a longer one. It is in memory three times: as read, as a list, and in the
        // copy.
        let directory = extension.directory_len.min(MAX_BITMAP_DIRECTORY_BYTES) * 3;
        let needed = directory + u64::from(extension.count).saturating_mul(BYTES_PER_BITMAP);
        let lease = memory.lease(needed, "the list of bitmaps")?;
        let mut list = Vec::new();
        let mut total = 0u64;
        let mut first_error = None;
        bitmap::walk_directory(input, header, extension, |entry| match open(input, header, entry) {
            Ok((bitmap, len)) => {
                total = total.saturating_add(len);
                list.push(bitmap);
            }
            Err(error) => first_error = first_error.take().or(Some(error)),
        })?;
        if total > MAX_COPIED_BITMAP_BYTES {
            first_error = first_error.or_else(|| {
                Some(
                    Error::limit(format!(
                        "the bitmaps have {total} bytes; the limit is {MAX_COPIED_BITMAP_BYTES}"
                    ))
                    .hint("remove the bitmaps that are no longer needed"),
                )
            });
        }
        match first_error {
            Some(error) => Err(error),
            None => {
                mark_repeated_names(&mut list);
                Ok(Self { list, _lease: lease })
            }
        }
    }
}

/// Marks every bitmap with the name of one before it: QEMU opens no image with two of a name.
fn mark_repeated_names(list: &mut [Bitmap]) {
    let mut order: Vec<usize> = (0..list.len()).collect();
    order.sort_by(|&a, &b| list[a].name.cmp(&list[b].name).then(a.cmp(&b)));
    for pair in order.windows(2) {
        if list[pair[0]].name == list[pair[1]].name {
            list[pair[1]].fault.get_or_insert_with(|| "has the name of another bitmap".to_owned());
        }
    }
}

/// Returns a bitmap and the length of its bits in bytes; 0 for one that can't be copied.
fn open(input: &RandomInput, header: &Header, entry: Entry) -> Result<(Bitmap, u64)> {
    let cluster_size = header.shape.cluster_size();
    let mut stored = Stored { input: input.clone(), cluster_size, table_offset: entry.table_offset, len: 0 };
    let fault = fault(&entry, header);
    if fault.is_none() {
        stored.len = header.virtual_size.div_ceil(entry.granularity).div_ceil(8);
        check_place(input, &stored, &entry)?;
    }
    let len = stored.len;
    let bitmap = Bitmap {
        name: entry.name,
        granularity: entry.granularity,
        auto: entry.auto,
        fault,
        content: Arc::new(stored),
    };
    Ok((bitmap, len))
}

/// Returns the reason why a bitmap can't be copied, if there is one.
fn fault(entry: &Entry, header: &Header) -> Option<String> {
    if bitmap::are_stale(header) {
        return Some("may lack changes by a program that does not know bitmaps".to_owned());
    }
    if entry.in_use {
        return Some("was not saved when the image was last closed".to_owned());
    }
    if let Some(feature) = &entry.unknown {
        return Some(feature.clone());
    }
    if !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&entry.granularity) {
        return Some(format!(
            "has a granularity of {} bytes; the limits are {MIN_GRANULARITY} and {MAX_GRANULARITY}",
            entry.granularity
        ));
    }
    if entry.name.is_empty() || entry.name.len() > MAX_BITMAP_NAME || entry.name.contains('\u{fffd}') {
        return Some("has a name that is empty, too long or not UTF-8".to_owned());
    }
    None
}

fn check_place(input: &RandomInput, stored: &Stored, entry: &Entry) -> Result<()> {
    let what = || format!("bitmap '{}'", imgtool_core::error::escape_control(&entry.name));
    let entries = stored.len.div_ceil(stored.cluster_size);
    if stored.len > MAX_BITMAP_BYTES {
        return Err(Error::limit(format!(
            "{} has {} bytes; the limit is {MAX_BITMAP_BYTES}",
            what(),
            stored.len
        )));
    }
    if u64::from(entry.table_entries) != entries {
        return Err(Error::malformed(format!(
            "the table of {} has {} entries; a disk of this size needs {entries}",
            what(),
            entry.table_entries
        )));
    }
    let table = format!("the table of {}", what());
    let at = entry.table_offset;
    check_table(&table, at, entries * 8, MAX_BITMAP_BYTES, stored.cluster_size, at)?;
    if at.saturating_add(entries * 8) > input.len() {
        return Err(
            Error::corrupt(format!("{table} at {at} exceeds the file of {} bytes", input.len())).at(at)
        );
    }
    Ok(())
}

/// The bits of one bitmap.
struct Stored {
    input: RandomInput,
    cluster_size: u64,
    table_offset: u64,
    /// Length of the bits in bytes.
    len: u64,
}

impl BitmapContent for Stored {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let Some(end) = end else {
            return Err(Error::out_of_bounds(format!("the bitmap has {} bytes", self.len)));
        };
        let first = offset / self.cluster_size;
        // The caller has bounded the length: a cluster of another image, of 2 MiB at most.
        let count = (end.div_ceil(self.cluster_size) - first) as usize;
        let table = self.input.read_vec(self.table_offset + first * 8, count * 8)?;
        let mut rest = buf;
        let mut at = offset;
        for entry in decode_table(&table) {
            let in_cluster = at % self.cluster_size;
            let len = (self.cluster_size - in_cluster).min(rest.len() as u64);
            let (part, after) = rest.split_at_mut(len as usize);
            match entry & OFFSET_MASK {
                0 => part.fill(if entry & ALL_ONES != 0 { 0xff } else { 0 }),
                host if host % self.cluster_size == 0 => self.input.read_exact_at(part, host + in_cluster)?,
                host => {
                    return Err(Error::malformed(format!(
                        "a cluster of a bitmap at {host} is not aligned to {} bytes",
                        self.cluster_size
                    ))
                    .at(self.table_offset));
                }
            }
            rest = after;
            at += len;
        }
        Ok(())
    }
}
