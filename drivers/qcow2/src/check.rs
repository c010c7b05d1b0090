//! Image check: compares refcounts with the references to each cluster.
//!
//! References are counted in one window of the file at a time, so memory does not grow with the file size.
//! The first walk over all tables counts the first window, reports damaged entries and collects the windows
//! with references. Each further window takes another walk. The counts of corruptions and the wording of
//! findings follow `qemu-img check`.

mod references;
mod walk;

use std::collections::{BTreeSet, HashSet};

use imgtool_core::error::escape_control;
use imgtool_core::{CheckReport, Error, Input, OpenOptions, RandomInput, Result};

use crate::layout::bitmap::walk_bitmaps;
use crate::layout::header::{Header, INCOMPATIBLE_DATA_FILE};
use crate::layout::snapshot::{check_l1, walk_snapshots};
use crate::refcounts::{Refcount, RefcountGeometry, Refcounts};
use crate::update::refcounts::RefcountEditor;

use references::{CHUNK_CLUSTERS, Checker, SnapshotTable, WINDOW_CLUSTERS};

/// Maximum number of windows; each takes one walk. Our limit: a file of 64 TiB has 128 windows with clusters
/// of 16 KiB, the smallest that QEMU's L1 limit allows. Only crafted images with large holes have more.
const MAX_WINDOWS: usize = 256;

/// Checks the structures of an image; reads no guest data.
pub fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    Ok(check_counting(input.into_random()?, options)?.report)
}

/// Result of a check, for a repair.
pub struct Found {
    /// Report.
    pub report: CheckReport,
    /// Number of its corruptions that are only wrong refcounts or copied flags.
    pub refcount_faults: u64,
}

/// Checks the structures of an image, and counts the corruptions that follow from refcounts alone.
pub fn check_counting(input: RandomInput, _options: &OpenOptions) -> Result<Found> {
    let mut checker = checker(input)?;
    checker.run()?;
    Ok(Found { report: checker.report, refcount_faults: checker.refcount_faults })
}

/// Direction in which refcounts are corrected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Correction {
    /// Refcounts below the number of references.
    Raise,
    /// Refcounts above it.
    Lower,
}

/// Sets the refcounts of an image with intact tables to the number of references.
pub fn correct(
    input: RandomInput,
    _options: &OpenOptions,
    refcounts: &mut RefcountEditor,
    correction: Correction,
) -> Result<()> {
    let mut checker = checker(input)?;
    checker.corrected = Some((refcounts, correction));
    checker.run()
}

/// Prepares a check.
fn checker<'a>(input: RandomInput) -> Result<Checker<'a>> {
    let header = Header::read(&input)?;
    if header.unknown_features() != 0 {
        return Err(Error::unsupported(format!(
            "the image needs unknown features: {}",
            header.feature_list(header.unknown_features())
        ))
        .at(72));
    }
    let file_clusters = input.len().div_ceil(header.shape.cluster_size());
    let mut report = CheckReport::default();
    let snapshots = read_snapshot_table(&input, &header, &mut report)?;
    let bitmaps = read_bitmap_directory(&input, &header, &mut report)?;
    let refcounts = Refcounts::read(&input, RefcountGeometry::of(&header))?;
    Ok(Checker {
        external_data: header.has(INCOMPATIBLE_DATA_FILE),
        input,
        header,
        snapshots,
        bitmaps,
        refcounts,
        file_clusters,
        report,
        l2_tables: Vec::new(),
        first_walk: true,
        v2_zero_cluster: None,
        window_start: 0,
        counts: Vec::new(),
        touched_chunks: Vec::new(),
        windows: BTreeSet::new(),
        refcount_faults: 0,
        corrected: None,
    })
}

/// Reads the snapshot table and reports damaged entries.
fn read_snapshot_table(
    input: &RandomInput,
    header: &Header,
    report: &mut CheckReport,
) -> Result<SnapshotTable> {
    let mut l1_tables = Vec::new();
    let mut incomplete = Vec::new();
    let mut damaged = Vec::new();
    let len = walk_snapshots(input, header, |index, snapshot| {
        // The walk passes the entry again, zero-filled. `Checker::count` reports a table that extends past
        // the end of the file by a cluster or more.
        let Ok(snapshot) = snapshot else { return Ok(()) };
        if snapshot.incomplete {
            incomplete.push(index);
        }
        match check_l1(header, &snapshot) {
            Ok(()) => l1_tables.push((snapshot.l1_offset, snapshot.l1_entries)),
            Err(e) => damaged.push(format!(
                "ERROR snapshot {} ({}): {e:#}; snapshot table entry corrupted",
                snapshot.id, snapshot.name
            )),
        }
        Ok(())
    })?;
    for index in incomplete {
        report.corruption(format!("ERROR snapshot table entry {index} is incomplete"));
    }
    damaged.into_iter().for_each(|finding| report.corruption(finding));
    Ok(SnapshotTable { len, l1_tables })
}

/// Returns the host offset and the number of entries of each bitmap table, and reports repeated names: QEMU opens no
/// image with two bitmaps of one name.
fn read_bitmap_directory(
    input: &RandomInput,
    header: &Header,
    report: &mut CheckReport,
) -> Result<Vec<(u64, u32)>> {
    // At most as long as the directory, which has 64 MiB at most.
    let (mut tables, mut names) = (Vec::new(), HashSet::new());
    walk_bitmaps(input, header, |bitmap| {
        tables.push((bitmap.table_offset, bitmap.table_entries));
        if names.contains(&bitmap.name) {
            let name = escape_control(&bitmap.name);
            report.corruption(format_args!("ERROR bitmap '{name}' has the name of another bitmap"));
        }
        names.insert(bitmap.name);
    })?;
    Ok(tables)
}

impl Checker<'_> {
    /// Counts the references of one window at a time and compares them with the refcounts.
    fn run(&mut self) -> Result<()> {
        self.refcounts.report_damage(self.file_clusters, &mut self.report);
        self.windows = self.refcounts.covered_windows(WINDOW_CLUSTERS, self.file_clusters);
        self.windows.insert(0);
        // The cluster of the header is always in use.
        let mut image_end = 1;
        let mut next_window = Some(0);
        while let Some(window) = next_window {
            self.window_start = window * WINDOW_CLUSTERS;
            // One more than the file has, because a table may extend past its end by less than a cluster.
            let len = (self.file_clusters + 1).saturating_sub(self.window_start).min(WINDOW_CLUSTERS);
            self.counts.clear();
            // At most WINDOW_CLUSTERS.
            self.counts.resize(len as usize, 0);
            self.touched_chunks.clear();
            self.touched_chunks.resize(self.counts.len().div_ceil(CHUNK_CLUSTERS), false);
            self.walk()?;
            self.first_walk = false;
            if self.windows.len() > MAX_WINDOWS {
                return Err(Error::limit(format!(
                    "the clusters are scattered over more than {} bytes of the file",
                    (MAX_WINDOWS as u64 * WINDOW_CLUSTERS).saturating_mul(self.header.shape.cluster_size())
                )));
            }
            if let Some(last) = self.compare()? {
                image_end = last + 1;
            }
            next_window = self.windows.range(window + 1..).next().copied();
        }
        let shape = self.header.shape;
        self.report.image_end_offset = Some(image_end << shape.cluster_bits);
        self.report.total_clusters = Some(self.header.virtual_size.div_ceil(shape.cluster_size()));
        self.report_v2_zero_cluster();
        Ok(())
    }

    /// Reports the zero clusters of a version 2 image as one corruption, if the check found nothing else.
    /// Reading them fails, so the image must not pass; but `qemu-img check` ignores them, and the counts must
    /// otherwise agree with it.
    fn report_v2_zero_cluster(&mut self) {
        let sound = self.report.corruptions + self.report.check_errors == 0;
        if let Some(entry) = self.v2_zero_cluster.filter(|_| sound) {
            self.corruption(1, format!("ERROR L2 entry {:x}: a zero cluster in a version 2 image", entry.0));
        }
    }

    /// Compares the reference counts of the window with the refcounts. Returns the last cluster in use.
    fn compare(&mut self) -> Result<Option<u64>> {
        let mut last = None;
        for chunk in 0..self.touched_chunks.len() {
            let start = chunk * CHUNK_CLUSTERS;
            let end = (start + CHUNK_CLUSTERS).min(self.counts.len());
            let clusters = self.window_start + start as u64..self.window_start + end as u64;
            if !self.touched_chunks[chunk] && self.refcounts.lacks_blocks(clusters) {
                continue;
            }
            for index in start..end {
                if self.compare_cluster(index)? {
                    last = Some(self.window_start + index as u64);
                }
            }
        }
        Ok(last)
    }

    /// Compares the reference count of the cluster at `index` with its refcount. Returns true if it is in
    /// use.
    fn compare_cluster(&mut self, index: usize) -> Result<bool> {
        let cluster = self.window_start + index as u64;
        let references = u64::from(self.counts[index]);
        if cluster >= self.file_clusters && references == 0 {
            return Ok(false);
        }
        let Refcount::Known(refcount) = self.refcounts.get(cluster)? else {
            self.report.check_errors += 1;
            return Ok(false);
        };
        if let Some((refcounts, correction)) = &mut self.corrected {
            let wrong = match correction {
                Correction::Raise => refcount < references,
                // Counts stop at 65535.
                Correction::Lower => refcount > references && references < u64::from(u16::MAX),
            };
            if wrong {
                refcounts.set(cluster << self.header.shape.cluster_bits, references)?;
            }
            return Ok(refcount > 0 || references > 0);
        }
        if refcount < references {
            self.refcount_faults += 1;
            self.report.corruption(format_args!(
                "ERROR cluster {cluster} refcount={refcount} reference={references}"
            ));
        } else if refcount > references && references < u64::from(u16::MAX) {
            self.report
                .leak(1, format_args!("Leaked cluster {cluster} refcount={refcount} reference={references}"));
        }
        Ok(refcount > 0 || references > 0)
    }
}
