//! What `map` shows: each run with the image of the chain that it is of, and its place there.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::extent::{MAX_EXTENTS_PER_ANSWER, push_map_extent};
use imgtool_toolkit::{Extent, ExtentKind, ExtentList, MapExtent, MapPlace, Result};

use super::{Place, Segment, VhdxImage};

impl VhdxImage {
    /// The runs of `range`, which was checked.
    pub(super) fn map_extents(&self, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let file: Arc<Path> = self.image.file.path().into();
        let mut list = Vec::new();
        let mut position = range.start;
        while position < range.end && list.len() < MAX_EXTENTS_PER_ANSWER {
            let Segment { len, place } = self.segment(position, range.end - position)?;
            let uniform = |kind| MapExtent::of(Extent { start: position, len, kind });
            let runs = match place {
                Place::Zero => vec![uniform(ExtentKind::Zero)],
                Place::Hole => vec![uniform(ExtentKind::Hole)],
                Place::File(file_offset) => self.map_file(&file, position, len, file_offset)?,
                Place::Parent => self.map_parent(position, len)?,
            };
            for run in runs {
                position = run.end();
                push_map_extent(&mut list, run);
            }
        }
        Ok(list)
    }

    /// A block in the file, holes of the file told apart.
    fn map_file(&self, file: &Arc<Path>, start: u64, len: u64, file_offset: u64) -> Result<Vec<MapExtent>> {
        let mut extents = ExtentList::new();
        self.push_file_runs(&mut extents, start, len, file_offset, None)?;
        let describe = |extent: Extent| MapExtent {
            data: true,
            place: Some(MapPlace {
                file: Arc::clone(file),
                file_offset: file_offset + (extent.start - start),
            }),
            ..MapExtent::of(extent)
        };
        Ok(extents.into_vec().into_iter().map(describe).collect())
    }

    /// What the parent says, one level down.
    fn map_parent(&self, start: u64, len: u64) -> Result<Vec<MapExtent>> {
        let Some(parent) = &self.parent else { return Err(self.no_parent()) };
        if start >= parent.virtual_size {
            return Ok(vec![MapExtent::of(Extent { start, len, kind: ExtentKind::Hole })]);
        }
        let (random, device) = parent.random()?;
        let end = (start + len).min(parent.virtual_size);
        let below = random.map(device, start..end)?;
        Ok(below.into_iter().map(|run| MapExtent { depth: run.depth + 1, ..run }).collect())
    }
}
