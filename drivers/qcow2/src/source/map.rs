//! Map of an image: each run with its depth in the backing chain and its location in a file.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use imgtool_core::extent::{MAX_EXTENTS_PER_ANSWER, push_map_extent};
use imgtool_core::{Extent, ExtentKind, MapExtent, MapPlace, RandomInput, Result};

use super::content::Content;
use crate::layout::header::{Header, INCOMPATIBLE_DATA_FILE};
use crate::mapping::RunKind;
use crate::refcounts::{RefcountGeometry, Refcounts};

/// Test for a preallocated and mostly unwritten image. Runs at most once, and only for `map`.
pub(super) struct PreallocationTest {
    input: RandomInput,
    has_data_file: bool,
    cluster_size: u64,
    refcounts: RefcountGeometry,
    result: OnceLock<bool>,
}

impl PreallocationTest {
    /// Creates the test for an image; reads nothing yet.
    pub(super) fn new(input: &RandomInput, header: &Header) -> Self {
        Self {
            input: input.clone(),
            has_data_file: header.has(INCOMPATIBLE_DATA_FILE),
            cluster_size: header.shape.cluster_size(),
            refcounts: RefcountGeometry::of(header),
            result: OnceLock::new(),
        }
    }

    /// True if the image has at least 10/9 as many allocated clusters as the file occupies, and at least two
    /// more. Only then does `map` show holes of the file within clusters as zeros. This is qemu-img's rule,
    /// found by experiment: the holes of an ordinary image would fragment its map.
    fn passes(&self) -> Result<bool> {
        if let Some(known) = self.result.get() {
            return Ok(*known);
        }
        let result = self.run()?;
        Ok(*self.result.get_or_init(|| result))
    }

    fn run(&self) -> Result<bool> {
        let allocated = self.input.file().filter(|_| !self.has_data_file).and_then(allocated_len);
        let Some(allocated) = allocated else { return Ok(false) };
        let occupied = allocated / self.cluster_size;
        let threshold = (occupied.saturating_mul(10) / 9).max(occupied.saturating_add(2));
        Refcounts::read(&self.input, self.refcounts)?.uses_at_least(threshold, occupied.saturating_add(2))
    }
}

/// Returns the number of bytes that `file` takes on its file system; `None` if the system does not report it.
#[cfg(unix)]
fn allocated_len(file: &File) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // `st_blocks` counts units of 512 bytes, whatever the block size of the file system.
    Some(file.metadata().ok()?.blocks().saturating_mul(512))
}

#[cfg(not(unix))]
fn allocated_len(_file: &File) -> Option<u64> {
    None
}

impl Content {
    /// Maps `range`, which must be within the disk. Stops early, at about [`MAX_EXTENTS_PER_ANSWER`] extents.
    pub(super) fn map(&self, range: Range<u64>, preallocation: &PreallocationTest) -> Result<Vec<MapExtent>> {
        let file = Arc::new(self.data.location().clone());
        // As in qemu-img: what an encrypted image stores at a place is not what the guest reads.
        let has_places = !self.is_encrypted;
        let mut list = Vec::new();
        let mut position = range.start;
        while position < range.end && list.len() < MAX_EXTENTS_PER_ANSWER {
            let run = self.mapping.run(position..range.end)?;
            let place = |file_offset| has_places.then(|| MapPlace { file: Arc::clone(&file), file_offset });
            let of = |kind| MapExtent::of(Extent { start: position, len: run.len, kind });
            let parts = match run.kind {
                RunKind::Data { host_offset } => {
                    let data = MapExtent { place: place(host_offset), ..of(ExtentKind::Data) };
                    if has_places && preallocation.passes()? {
                        split_at_holes(&self.data, data)?
                    } else {
                        vec![data]
                    }
                }
                RunKind::Zero { host_offset } => {
                    vec![MapExtent { place: host_offset.and_then(place), ..of(ExtentKind::Zero) }]
                }
                RunKind::Compressed(_) => vec![MapExtent { compressed: true, ..of(ExtentKind::Data) }],
                RunKind::Unallocated { host_offset } => {
                    self.map_backing(position..position + run.len, host_offset.and_then(place))?
                }
            };
            for part in parts {
                position = part.end();
                push_map_extent(&mut list, part);
            }
        }
        Ok(list)
    }

    /// Maps an unallocated range through the backing image, one level deeper. Without a backing image or
    /// beyond its end, the range is a hole. Its `place`, if any, is an unused part of an allocated cluster.
    fn map_backing(&self, range: Range<u64>, place: Option<MapPlace>) -> Result<Vec<MapExtent>> {
        let covering = self.backing.as_ref().filter(|backing| range.start < backing.size());
        let Some(backing) = covering else {
            let hole = Extent { start: range.start, len: range.end - range.start, kind: ExtentKind::Hole };
            return Ok(vec![MapExtent { place, ..MapExtent::of(hole) }]);
        };
        let runs = backing.map(range.start..range.end.min(backing.size()))?;
        Ok(runs.into_iter().map(|run| MapExtent { depth: run.depth + 1, ..run }).collect())
    }
}

/// Splits a run of data where holes in the file begin and end. Holes become zeros.
fn split_at_holes(input: &RandomInput, whole: MapExtent) -> Result<Vec<MapExtent>> {
    let mut parts = Vec::new();
    let Some(place) = whole.place.clone() else { return Ok(vec![whole]) };
    let mut done = 0;
    while done < whole.len && parts.len() < MAX_EXTENTS_PER_ANSWER {
        let host = place.file_offset + done;
        // Bytes beyond the end of the file are data: reading them is an error.
        let (end, is_data) = match host < input.len() {
            true => input.run(host).map(|run| (run.end, run.is_data))?,
            false => (u64::MAX, true),
        };
        let len = end.saturating_sub(host).clamp(1, whole.len - done);
        let place = Some(MapPlace { file: Arc::clone(&place.file), file_offset: host });
        parts.push(MapExtent { start: whole.start + done, len, zero: !is_data, place, ..whole.clone() });
        done += len;
    }
    Ok(parts)
}
