//! What `map` shows: each run with the image of the chain that it is of, and its place there.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::extent::{MAX_EXTENTS_PER_ANSWER, push_map_extent};
use imgtool_toolkit::storage::os;
use imgtool_toolkit::{Error, Extent, ExtentKind, MapExtent, MapPlace, RandomInput, Result};

use super::{Content, Qcow2Source};
use crate::mapping::Mapped;
use crate::refcounts::Refcounts;

impl Qcow2Source {
    /// The runs of `range`, which was checked.
    pub(super) fn map_extents(&self, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let content = self.content()?;
        let file: Arc<Path> = content.data.path().into();
        let mut list = Vec::new();
        let mut position = range.start;
        while position < range.end && list.len() < MAX_EXTENTS_PER_ANSWER {
            let run = content.mapping.run(position..range.end)?;
            let place = |file_offset| Some(MapPlace { file: Arc::clone(&file), file_offset });
            let of = |kind| MapExtent::of(Extent { start: position, len: run.len, kind });
            let parts = match run.mapped {
                Mapped::Data { host_offset } => {
                    let data = MapExtent { place: place(host_offset), ..of(ExtentKind::Data) };
                    if self.looks_into_clusters()? { split_by_file(&content.data, data)? } else { vec![data] }
                }
                Mapped::Zero { host_offset } => {
                    vec![MapExtent { place: host_offset.and_then(place), ..of(ExtentKind::Zero) }]
                }
                Mapped::Compressed(_) => vec![MapExtent { compressed: true, ..of(ExtentKind::Data) }],
                Mapped::Unallocated { host_offset } => {
                    content.map_below(position..position + run.len, host_offset.and_then(place))?
                }
            };
            for part in parts {
                position = part.end();
                push_map_extent(&mut list, part);
            }
        }
        Ok(list)
    }

    /// Whether holes of the file within clusters are shown as zeros: only where far more clusters are
    /// allocated than the file occupies (preallocated, never written). This is qemu-img's rule, found
    /// by experiment: those of an ordinary image would tear its map to pieces.
    fn looks_into_clusters(&self) -> Result<bool> {
        if let Some(known) = self.sparse_clusters.get() {
            return Ok(*known);
        }
        let found = self.is_preallocated()?;
        Ok(*self.sparse_clusters.get_or_init(|| found))
    }

    fn is_preallocated(&self) -> Result<bool> {
        let has_data_file = self.content()?.data.path() != self.input.path();
        let meta = self.input.file().and_then(|file| file.metadata().ok());
        let Some(meta) = meta.filter(|_| !has_data_file) else { return Ok(false) };
        let occupied = os::allocated_len(&meta) / self.shape.cluster_size();
        let wanted = (occupied.saturating_mul(10) / 9).max(occupied.saturating_add(2));
        Refcounts::read(&self.input, self.refcount_table)?.has_in_use(wanted, occupied.saturating_add(2))
    }
}

impl Content {
    /// What the backing file says, one level down. Beyond its end `place` is told: an unused part of
    /// an allocated cluster.
    fn map_below(&self, range: Range<u64>, place: Option<MapPlace>) -> Result<Vec<MapExtent>> {
        let below = self.backing.as_ref().filter(|backing| range.start < backing.size);
        let Some(backing) = below else {
            let hole = Extent { start: range.start, len: range.end - range.start, kind: ExtentKind::Hole };
            return Ok(vec![MapExtent { place, ..MapExtent::of(hole) }]);
        };
        let Some(random) = backing.source.random() else {
            return Err(Error::unsupported("the backing file can only be read as a stream"));
        };
        let runs = random.map(backing.device, range.start..range.end.min(backing.size))?;
        Ok(runs.into_iter().map(|run| MapExtent { depth: run.depth + 1, ..run }).collect())
    }
}

/// A run of data in parts that are and parts that are no holes of the file.
fn split_by_file(input: &RandomInput, whole: MapExtent) -> Result<Vec<MapExtent>> {
    let mut parts = Vec::new();
    let Some(place) = whole.place.clone() else { return Ok(vec![whole]) };
    let mut done = 0;
    while done < whole.len && parts.len() < MAX_EXTENTS_PER_ANSWER {
        let host = place.file_offset + done;
        // What is beyond the end of the file reads as an error, not as zeros.
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
