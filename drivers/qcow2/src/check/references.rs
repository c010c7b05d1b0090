//! State of a check: references to host clusters, counted in a window of the file, and the report.

use std::collections::BTreeSet;

use imgtool_core::{CheckReport, RandomInput};

use crate::layout::entry::L2Entry;
use crate::layout::header::Header;
use crate::refcounts::Refcounts;

/// Host clusters of a window, whose references are counted at once. Our limit: 64 MiB of counters.
pub(super) const WINDOW_CLUSTERS: u64 = 32 << 20;

/// Host clusters of a chunk, which is skipped if it has neither references nor refcounts. Our choice: a
/// file may be large and empty.
pub(super) const CHUNK_CLUSTERS: usize = 4096;

/// Snapshot table, as far as references need it.
pub(super) struct SnapshotTable {
    /// Length in bytes.
    pub(super) len: u64,
    /// Host offset and entries of each L1 table with a sound place.
    pub(super) l1_tables: Vec<(u64, u32)>,
}

/// References to an L2 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct L2Use {
    pub(super) host_offset: u64,
    /// Number of L1 entries, over all states.
    pub(super) references: u32,
    /// Number of L1 entries of the active state, the only one in which bit 63 must be right.
    pub(super) active_references: u32,
}

/// State of a check.
pub(super) struct Checker {
    pub(super) input: RandomInput,
    pub(super) header: Header,
    pub(super) snapshots: SnapshotTable,
    /// Host offset and entries of each bitmap table.
    pub(super) bitmaps: Vec<(u64, u32)>,
    /// L2 tables by host offset, complete after the first walk.
    pub(super) l2_tables: Vec<L2Use>,
    pub(super) refcounts: Refcounts,
    /// True if guest data is in an external data file.
    pub(super) external_data: bool,
    /// Clusters of the file, including a partial last one.
    pub(super) file_clusters: u64,
    pub(super) report: CheckReport,
    /// True during the first walk, the only one that reports entries and collects windows.
    pub(super) first_walk: bool,
    /// First zero cluster of a version 2 image, which version 2 does not have.
    pub(super) v2_zero_cluster: Option<L2Entry>,
    /// First host cluster of the window.
    pub(super) window_start: u64,
    /// References per cluster of the window, at most 65535.
    pub(super) counts: Vec<u16>,
    /// True for each chunk of `counts` with a reference.
    pub(super) touched_chunks: Vec<bool>,
    /// Indices of the windows with references or refcounts.
    pub(super) windows: BTreeSet<u64>,
}

impl Checker {
    /// Reports `finding` once and counts it `times` times, as qemu-img does for shared tables.
    pub(super) fn corruption(&mut self, times: u32, finding: String) {
        self.report.corruption(finding);
        self.report.corruptions = self.report.corruptions.saturating_add(u64::from(times).saturating_sub(1));
    }

    /// Counts `weight` references to `len` bytes at `host_offset`. As in qemu-img, bytes that leave the
    /// file by less than a cluster count, and a count above the maximum refcount of the image is an error
    /// of its own.
    pub(super) fn count(&mut self, host_offset: u64, len: u64, weight: u32) {
        let bits = self.header.shape.cluster_bits;
        let end = host_offset.checked_add(len);
        let end = end.filter(|end| end.saturating_sub(self.input.len()) < self.header.shape.cluster_size());
        let Some(end) = end else {
            if self.first_walk && len > 0 {
                let finding = format!(
                    "ERROR: {len} bytes at {host_offset} are referred to, beyond the end of the file"
                );
                self.corruption(weight, finding);
            }
            return;
        };
        if len == 0 {
            return;
        }
        let (first, last) = (host_offset >> bits, (end - 1) >> bits);
        if self.first_walk {
            self.windows.extend(first / WINDOW_CLUSTERS..=last / WINDOW_CLUSTERS);
        }
        let max = self.header.max_refcount();
        let window_end = self.window_start + self.counts.len() as u64;
        for cluster in first.max(self.window_start)..(last + 1).min(window_end) {
            // Less than the length of the window.
            let index = (cluster - self.window_start) as usize;
            self.touched_chunks[index / CHUNK_CLUSTERS] = true;
            let references = u64::from(self.counts[index]) + u64::from(weight);
            self.counts[index] = u16::try_from(references.min(max)).unwrap_or(u16::MAX);
            if let Ok(too_many @ 1..) = u32::try_from(references.saturating_sub(max)) {
                let offset = cluster << bits;
                let finding =
                    format!("ERROR cluster at {offset} has more references than refcounts of its width hold");
                self.corruption(too_many, finding);
            }
        }
    }

    /// Number of references to a cluster so far, if it is in the window.
    pub(super) fn counted(&self, host_offset: u64) -> Option<u16> {
        let cluster = host_offset >> self.header.shape.cluster_bits;
        let index = usize::try_from(cluster.checked_sub(self.window_start)?).ok()?;
        self.counts.get(index).copied()
    }
}
