//! An image together with its parent: content, extents and the map of guest ranges.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::extent::{MAX_EXTENTS_PER_ANSWER, push_map_extent};
use imgtool_core::{Disk, Error, Extent, ExtentKind, ExtentList, Location, MapExtent, MapPlace, Result};

use super::segment::{Origin, Segment};
use crate::image::Image;

/// An image and its parent. Guest ranges passed to the methods must lie within the disk.
pub(super) struct Chain {
    pub(super) image: Image,
    /// `None` if the disk has no parent or was opened for information only. The parent may be smaller than
    /// the child, which can be resized; past the end of the parent, its content counts as zeros.
    pub(super) parent: Option<Disk>,
}

impl Chain {
    /// Fills `buf` with the content of the segment at `guest_offset`, which is as long as `buf`.
    pub(super) fn read_segment(&self, buf: &mut [u8], guest_offset: u64, origin: Origin) -> Result<()> {
        match origin {
            Origin::File(file_offset) => self.image.file.read_exact_at(buf, file_offset),
            Origin::Zero | Origin::Hole => {
                buf.fill(0);
                Ok(())
            }
            Origin::Parent => {
                let parent = self.parent()?;
                let in_parent = parent.size().saturating_sub(guest_offset).min(buf.len() as u64);
                let (from_parent, behind) = buf.split_at_mut(in_parent as usize);
                behind.fill(0);
                if from_parent.is_empty() {
                    return Ok(());
                }
                parent.read_at(from_parent, guest_offset)
            }
        }
    }

    /// Lists the extents of `range`, exactly or for a caller that reads in pieces of `resolution` bytes. In
    /// salvage, a block without a valid segment counts as data; reading it fills in zeros and records the
    /// loss.
    pub(super) fn extents(
        &self,
        range: Range<u64>,
        resolution: Option<u64>,
        salvage: bool,
    ) -> Result<Vec<Extent>> {
        let mut extents = ExtentList::new();
        let mut guest_offset = range.start;
        while guest_offset < range.end && !extents.is_full() {
            let max_len = range.end - guest_offset;
            let (len, origin) = match self.image.segment(guest_offset, max_len) {
                Ok(Segment { len, origin }) => (len, origin),
                Err(_) if salvage => {
                    let len = self.image.to_block_end(guest_offset, max_len);
                    guest_offset = push(&mut extents, guest_offset, len, ExtentKind::Data);
                    continue;
                }
                Err(e) => return Err(e),
            };
            guest_offset = match origin {
                Origin::File(file_offset) => {
                    self.push_file_runs(&mut extents, guest_offset, len, file_offset, resolution)?
                }
                Origin::Zero => push(&mut extents, guest_offset, len, ExtentKind::Zero),
                Origin::Hole => push(&mut extents, guest_offset, len, ExtentKind::Hole),
                Origin::Parent => self.push_parent_extents(&mut extents, guest_offset, len, resolution)?,
            };
        }
        Ok(extents.into_vec())
    }

    /// Lists the runs of `range`, each with its image in the chain and its place in that image's file.
    pub(super) fn map(&self, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let file = Arc::new(self.image.file.location().clone());
        let mut list = Vec::new();
        let mut guest_offset = range.start;
        while guest_offset < range.end && list.len() < MAX_EXTENTS_PER_ANSWER {
            let Segment { len, origin } = self.image.segment(guest_offset, range.end - guest_offset)?;
            let uniform = |kind| MapExtent::of(Extent { start: guest_offset, len, kind });
            let runs = match origin {
                Origin::Zero => vec![uniform(ExtentKind::Zero)],
                Origin::Hole => vec![uniform(ExtentKind::Hole)],
                Origin::File(file_offset) => self.map_file(&file, guest_offset, len, file_offset)?,
                Origin::Parent => self.map_parent(guest_offset, len)?,
            };
            for run in runs {
                guest_offset = run.end();
                push_map_extent(&mut list, run);
            }
        }
        Ok(list)
    }

    fn parent(&self) -> Result<&Disk> {
        self.parent.as_ref().ok_or_else(|| {
            Error::unsupported("the parent is not open: the image was opened for information only")
                .path(self.image.file.location())
        })
    }

    /// Adds the runs of data and holes for `len` bytes at guest offset `start`, stored from `file_offset` on,
    /// until the list is full. Returns the guest offset of their end.
    fn push_file_runs(
        &self,
        extents: &mut ExtentList,
        start: u64,
        len: u64,
        file_offset: u64,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let mut listed = 0;
        while listed < len && !extents.is_full() {
            let run_at = file_offset + listed;
            let run = match resolution {
                Some(resolution) => {
                    let to_piece_end = resolution - (start + listed) % resolution;
                    self.image.file.rough_run(run_at, run_at.saturating_add(to_piece_end))?
                }
                None => self.image.file.run(run_at)?,
            };
            let run_len = run.end.saturating_sub(run_at).clamp(1, len - listed);
            let kind = if run.is_data { ExtentKind::Data } else { ExtentKind::Zero };
            extents.push(start + listed, run_len, kind);
            listed += run_len;
        }
        Ok(start + listed)
    }

    /// Adds the parent's extents for `len` bytes at guest offset `start`, as many as the parent lists in one
    /// answer. Returns the guest offset of their end.
    fn push_parent_extents(
        &self,
        extents: &mut ExtentList,
        start: u64,
        len: u64,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let parent = self.parent()?;
        let end = start + len;
        if start >= parent.size() {
            return Ok(push(extents, start, len, ExtentKind::Hole));
        }
        let mut guest_offset = start;
        let in_parent = start..end.min(parent.size());
        let parent_extents = match resolution {
            Some(resolution) => parent.rough_extents(in_parent, resolution)?,
            None => parent.extents(in_parent)?,
        };
        for extent in parent_extents {
            guest_offset = push(extents, guest_offset, extent.len, extent.kind);
        }
        Ok(guest_offset)
    }

    /// Maps a segment stored in the file to its runs of data and holes.
    fn map_file(
        &self,
        file: &Arc<Location>,
        start: u64,
        len: u64,
        file_offset: u64,
    ) -> Result<Vec<MapExtent>> {
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

    /// Maps a segment of the parent, one level deeper in the chain.
    fn map_parent(&self, start: u64, len: u64) -> Result<Vec<MapExtent>> {
        let parent = self.parent()?;
        if start >= parent.size() {
            return Ok(vec![MapExtent::of(Extent { start, len, kind: ExtentKind::Hole })]);
        }
        let end = (start + len).min(parent.size());
        let parent_map = parent.map(start..end)?;
        Ok(parent_map.into_iter().map(|run| MapExtent { depth: run.depth + 1, ..run }).collect())
    }
}

/// Adds an extent. Returns the guest offset of its end.
fn push(extents: &mut ExtentList, start: u64, len: u64, kind: ExtentKind) -> u64 {
    extents.push(start, len, kind);
    start + len
}
