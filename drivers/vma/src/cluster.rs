//! Clusters of an archive with their guest ranges, and the pieces made from them.

use std::ops::Range;

use imgtool_core::{Buffer, DeviceId, Piece};

use crate::layout::{CLUSTER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};

/// Maximum number of clusters in a piece with data: 1 MiB, so that buffers stay in a core's cache.
const PIECE_CLUSTERS: usize = 16;

/// A cluster that a valid slot describes, with its range in the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmaCluster {
    pub(crate) device: DeviceId,
    /// Cluster number within the device.
    pub(crate) number: u32,
    /// Bit *i* is set if sub-block *i* is stored.
    pub(crate) mask: u16,
    /// Slot index within the extent, 0 to 58.
    pub(crate) slot: u8,
    /// Guest offset of the first byte.
    pub(crate) start: u64,
    /// Length in guest bytes: [`CLUSTER`], less at the end of the device, 0 past it.
    pub(crate) len: u64,
}

impl VmaCluster {
    /// Returns the number of bytes stored in the extent, including sub-blocks past the end of the device.
    pub(crate) fn stored_len(&self) -> u64 {
        u64::from(self.mask.count_ones()) * SUB_BLOCK
    }

    /// Returns the mask without sub-blocks past the end of the device.
    pub(crate) fn mask_within(&self) -> u16 {
        let blocks = self.len.div_ceil(SUB_BLOCK).min(u64::from(u16::BITS));
        self.mask & ((1u32 << blocks) - 1) as u16
    }

    /// True if the whole cluster is past the end of the device, so readers drop it.
    pub(crate) fn is_beyond(&self) -> bool {
        self.len == 0
    }

    /// True if `next` begins where this cluster ends, on the same device.
    fn joins(&self, next: &VmaCluster) -> bool {
        self.device == next.device && self.len == CLUSTER && self.start + self.len == next.start
    }
}

/// Returns the range of clusters, from index `from` on, that form one piece: consecutive in the guest, and
/// either all zero or all with data. The range is empty if `from` is past the last cluster.
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

/// Returns the byte ranges of the stored sub-blocks in a buffer that contains `clusters` one after the other.
/// The ranges are ascending, and adjacent ones are joined.
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

/// Creates a piece of `len` guest bytes of data, starting with the cluster `first`. Cuts off buffer bytes and
/// stored ranges past `len`, which are past the end of the device.
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
