//! State of a check: references to host clusters, counted in one window of the file, and the report.

use std::collections::BTreeSet;

use imgtool_core::{CheckReport, RandomInput};

use super::Correction;
use crate::layout::entry::L2Entry;
use crate::layout::header::Header;
use crate::refcounts::Refcounts;
use crate::update::refcounts::RefcountEditor;

/// Number of host clusters in a window, the part of the file whose references are counted in one walk. Our
/// limit: 64 MiB of counters.
pub(super) const WINDOW_CLUSTERS: u64 = 32 << 20;

/// Number of host clusters in a chunk, which is skipped if it has neither references nor refcounts. Our
/// choice: a file may be large and mostly empty.
pub(super) const CHUNK_CLUSTERS: usize = 4096;

/// Length of the snapshot table, and the L1 tables that it refers to.
pub(super) struct SnapshotTable {
    /// Length in bytes.
    pub(super) len: u64,
    /// Host offset and number of entries of each L1 table with a valid location.
    pub(super) l1_tables: Vec<(u64, u32)>,
}

/// References to an L2 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct L2Use {
    pub(super) host_offset: u64,
    /// Number of L1 entries that refer to the table, in the active state and all snapshots.
    pub(super) references: u32,
    /// Number of these entries in the active state, where the copied flag (bit 63) must be correct.
    pub(super) active_references: u32,
}

/// State of a check.
pub(super) struct Checker<'a> {
    pub(super) input: RandomInput,
    pub(super) header: Header,
    pub(super) snapshots: SnapshotTable,
    /// Host offset and number of entries of each bitmap table.
    pub(super) bitmaps: Vec<(u64, u32)>,
    /// L2 tables, sorted by host offset; complete after the first walk.
    pub(super) l2_tables: Vec<L2Use>,
    pub(super) refcounts: Refcounts,
    /// True if guest data is in an external data file.
    pub(super) external_data: bool,
    /// Number of clusters in the file, including a partial last one.
    pub(super) file_clusters: u64,
    pub(super) report: CheckReport,
    /// True during the first walk. Only this walk reports damaged entries and collects windows.
    pub(super) first_walk: bool,
    /// First zero cluster found in a version 2 image. Only version 3 has zero clusters.
    pub(super) v2_zero_cluster: Option<L2Entry>,
    /// Index of the first host cluster of the window.
    pub(super) window_start: u64,
    /// Number of references to each cluster of the window, capped at the maximum refcount and at 65535.
    pub(super) counts: Vec<u16>,
    /// True for each chunk of `counts` that has a reference.
    pub(super) touched_chunks: Vec<bool>,
    /// Indices of the windows that have references or refcounts.
    pub(super) windows: BTreeSet<u64>,
    /// Number of corruptions that are only wrong refcounts or copied flags.
    pub(super) refcount_faults: u64,
    /// Refcounts to correct, and in which direction; `None` for a check.
    pub(super) corrected: Option<(&'a mut RefcountEditor, Correction)>,
}

impl Checker<'_> {
    /// Reports `finding` once and counts it `times` times, as qemu-img does for shared tables.
    pub(super) fn corruption(&mut self, times: u32, finding: String) {
        self.report.corruption(finding);
        self.report.corruptions = self.report.corruptions.saturating_add(u64::from(times).saturating_sub(1));
    }

    /// Counts `weight` references to each cluster of the window that the `len` bytes at `host_offset` touch.
    /// Like qemu-img, reports bytes that extend past the end of the file by a cluster or more and, as a
    /// separate corruption, a count above the image's maximum refcount.
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
                let finding = format!(
                    "ERROR cluster at {offset} has more references than a refcount of this width can count"
                );
                self.corruption(too_many, finding);
            }
        }
    }

    /// Returns the number of references to a cluster so far; `None` if it is outside the window.
    pub(super) fn counted(&self, host_offset: u64) -> Option<u16> {
        let cluster = host_offset >> self.header.shape.cluster_bits;
        let index = usize::try_from(cluster.checked_sub(self.window_start)?).ok()?;
        self.counts.get(index).copied()
    }
}
