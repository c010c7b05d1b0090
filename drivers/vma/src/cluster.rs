//! Stored clusters with their guest range, and the pieces made of them.

use std::ops::Range;

use imgtool_core::{Buffer, DeviceId, Piece};

use crate::layout::{CLUSTER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};

/// Maximum number of clusters in a piece with data: 1 MiB, so that buffers stay in a core's cache.
const PIECE_CLUSTERS: usize = 16;

/// A cluster named by a valid slot, with its range in the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmaCluster {
    pub(crate) device: DeviceId,
    /// Cluster number within the device.
    pub(crate) number: u32,
    /// Bit *i* is set if sub-block *i* is stored.
    pub(crate) mask: u16,
    /// Slot index within the extent, 0 to 58.
    pub(crate) slot: u8,
    /// First guest byte.
    pub(crate) start: u64,
    /// Guest bytes: [`CLUSTER`], fewer at the end of the device, 0 past it.
    pub(crate) len: u64,
}

impl VmaCluster {
    /// Bytes stored in the extent, sub-blocks past the end of the device included.
    pub(crate) fn stored_len(&self) -> u64 {
        u64::from(self.mask.count_ones()) * SUB_BLOCK
    }

    /// The mask without sub-blocks past the end of the device.
    pub(crate) fn mask_within(&self) -> u16 {
        let blocks = self.len.div_ceil(SUB_BLOCK).min(u64::from(u16::BITS));
        self.mask & ((1u32 << blocks) - 1) as u16
    }

    /// True if the whole cluster lies past the end of the device, so readers drop it.
    pub(crate) fn is_beyond(&self) -> bool {
        self.len == 0
    }

    /// True if `next` begins in the guest where this cluster ends.
    fn joins(&self, next: &VmaCluster) -> bool {
        self.device == next.device && self.len == CLUSTER && self.start + self.len == next.start
    }
}

/// Returns the indices of the clusters from `from` on that make one piece: consecutive in the guest,
/// and either all zero or all with data.
pub(crate) fn piece_group(clusters: &[VmaCluster], from: usize) -> Range<usize> {
    let Some(first) = clusters.get(from) else { return from..from };
    let limit = if first.mask == 0 { usize::MAX } else { PIECE_CLUSTERS };
    let mut end = from + 1;
    while let (Some(last), Some(next)) = (clusters.get(end - 1), clusters.get(end)) {
        let alike = (last.mask == 0) == (next.mask == 0) && !next.is_beyond();
        if !alike || !last.joins(next) || end - from >= limit {
            break;
        }
        end += 1;
    }
    from..end
}

/// Byte ranges of the stored sub-blocks in a buffer that holds `clusters` one after the other;
/// ascending, adjacent ones joined.
pub(crate) fn stored_ranges(clusters: &[VmaCluster]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let unit = SUB_BLOCK as usize;
    for (index, cluster) in clusters.iter().enumerate() {
        for bit in (0..SUB_BLOCKS_PER_CLUSTER as usize).filter(|bit| cluster.mask >> bit & 1 == 1) {
            let start = index * CLUSTER as usize + bit * unit;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += unit,
                _ => ranges.push(start..start + unit),
            }
        }
    }
    ranges
}

/// Makes a data piece of `len` guest bytes that begins with `first`. Buffer bytes and stored ranges
/// past the end of the device are cut off.
pub(crate) fn data_piece(
    first: &VmaCluster,
    len: u64,
    mut buffer: Buffer,
    stored: Vec<Range<usize>>,
) -> Piece {
    let end = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    buffer.truncate(end);
    let runs =
        stored.into_iter().map(|run| run.start..run.end.min(end)).filter(|run| run.start < run.end).collect();
    Piece { device: first.device, start: first.start, len, data: Some(buffer), runs }
}
