//! Checking: the refcounts against everything that refers to a cluster.
//!
//! References are counted in windows of the file, so that memory stays the same for any size: the
//! first walk over all tables reports what is wrong with the entries themselves and notes which
//! windows are referred to at all; there is one more walk for each further window. What counts as a
//! corruption, and how often, follows qemu-img check; so do the lines.

mod walk;

use std::collections::BTreeSet;

use imgtool_toolkit::{CheckReport, Error, Input, OpenOptions, RandomInput, Result};

use crate::layout::bitmap::walk_bitmaps;
use crate::layout::entry::L2Entry;
use crate::layout::header::{Header, INCOMPATIBLE_DATA_FILE};
use crate::layout::snapshot::{check_l1, walk_snapshots};
use crate::refcounts::{Refcount, RefcountPlace, Refcounts};

use walk::L2Use;

/// Host clusters whose references are counted at once. Ours: 64 MiB of counters.
const WINDOW_CLUSTERS: u64 = 32 << 20;

/// Host clusters of which nothing is looked at when nothing refers to them and they have no refcounts:
/// a file may be large and empty.
const CHUNK_CLUSTERS: usize = 4096;

/// Windows that are looked at, with one walk each. Ours: 64 TiB in clusters of 16 KiB, the smallest for
/// which an L1 table within QEMU's limit has room, are 128; only crafted images with far holes have more.
const MAX_WINDOWS: usize = 256;

/// Checks an image.
pub fn check(input: Input, _options: &OpenOptions) -> Result<CheckReport> {
    let input = input.into_random()?;
    let header = Header::read(&input)?;
    if header.unknown_features() != 0 {
        return Err(Error::unsupported(format!(
            "the image needs features that are not known: {}",
            header.feature_list(header.unknown_features())
        ))
        .at(72));
    }
    let file_clusters = input.len().div_ceil(header.shape.cluster_size());
    let mut report = CheckReport::default();
    let snapshots = sound_snapshots(&input, &header, &mut report)?;
    let mut bitmaps = Vec::new();
    walk_bitmaps(&input, &header, |bitmap| bitmaps.push((bitmap.table_offset, bitmap.table_entries)))?;
    let refcounts = Refcounts::read(&input, RefcountPlace::of(&header))?;
    let mut checker = Checker {
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
        unreadable: None,
        window_start: 0,
        counts: Vec::new(),
        touched: Vec::new(),
        windows: BTreeSet::new(),
    };
    checker.run()?;
    Ok(checker.report)
}

/// The snapshot table.
struct SnapshotTable {
    /// Its bytes.
    len: u64,
    /// Offset and entries of each L1 table that can be one.
    l1_tables: Vec<(u64, u32)>,
}

/// Reads the snapshot table and reports what is wrong with its entries.
fn sound_snapshots(input: &RandomInput, header: &Header, report: &mut CheckReport) -> Result<SnapshotTable> {
    let mut l1_tables = Vec::new();
    let mut incomplete = Vec::new();
    let mut damaged = Vec::new();
    let len = walk_snapshots(input, header, |number, snapshot| {
        // What is cut off reads as zeros, and counting its clusters reports it.
        let Ok(snapshot) = snapshot else { return Ok(()) };
        if snapshot.incomplete {
            incomplete.push(number);
        }
        match check_l1(header, &snapshot) {
            Ok(()) => l1_tables.push((snapshot.l1_offset, snapshot.l1_entries)),
            Err(e) => damaged.push(format!(
                "ERROR snapshot {} ({}): {e}; snapshot table entry corrupted",
                snapshot.id, snapshot.name
            )),
        }
        Ok(())
    })?;
    for number in incomplete {
        report.corruption(format!("ERROR snapshot table entry {number} is incomplete"));
    }
    damaged.into_iter().for_each(|finding| report.corruption(finding));
    Ok(SnapshotTable { len, l1_tables })
}

struct Checker {
    input: RandomInput,
    header: Header,
    snapshots: SnapshotTable,
    /// Offset and entries of the table of each bitmap.
    bitmaps: Vec<(u64, u32)>,
    /// All L2 tables by offset, after the first walk.
    l2_tables: Vec<L2Use>,
    refcounts: Refcounts,
    external_data: bool,
    /// Clusters of the file, the last one perhaps in part.
    file_clusters: u64,
    report: CheckReport,
    /// Entries are reported and windows noted only once.
    first_walk: bool,
    /// The first zero cluster of a version 2 image, which has none.
    unreadable: Option<L2Entry>,
    /// The first host cluster that `counts` is for.
    window_start: u64,
    /// References per cluster; what is beyond 65535 counts as that.
    counts: Vec<u16>,
    /// The chunks of `counts` that hold anything.
    touched: Vec<bool>,
    /// Windows that something refers to.
    windows: BTreeSet<u64>,
}

impl Checker {
    fn run(&mut self) -> Result<()> {
        self.refcounts.report(self.file_clusters, &mut self.report);
        self.windows = self.refcounts.covered_windows(WINDOW_CLUSTERS, self.file_clusters);
        self.windows.insert(0);
        // The header's cluster at least.
        let mut image_end = 1;
        let mut next_window = Some(0);
        while let Some(window) = next_window {
            self.window_start = window * WINDOW_CLUSTERS;
            // One more than the file has: a table may leave it by less than a cluster.
            let len = (self.file_clusters + 1).saturating_sub(self.window_start).min(WINDOW_CLUSTERS);
            self.counts.clear();
            // At most WINDOW_CLUSTERS.
            self.counts.resize(len as usize, 0);
            self.touched.clear();
            self.touched.resize(self.counts.len().div_ceil(CHUNK_CLUSTERS), false);
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
        self.report_unreadable();
        Ok(())
    }

    /// qemu-img check takes no notice of zero clusters in a version 2 image, on which reading fails. To
    /// count as it does and yet call no image clean that can't be read, they are one corruption where
    /// there is no other.
    fn report_unreadable(&mut self) {
        let sound = self.report.corruptions + self.report.check_errors == 0;
        if let Some(entry) = self.unreadable.filter(|_| sound) {
            self.corruption(1, format!("ERROR L2 entry {:x}: a zero cluster in a version 2 image", entry.0));
        }
    }

    /// Reports what was found as often as the same place was come by.
    fn corruption(&mut self, times: u32, finding: String) {
        self.report.corruption(finding);
        self.report.corruptions = self.report.corruptions.saturating_add(u64::from(times).saturating_sub(1));
    }

    /// Counts `weight` references to `len` bytes at `host_offset`. As qemu-img: what leaves the file
    /// by less than a cluster is counted, and a count that the image's refcounts can't hold is an
    /// error of its own.
    fn count(&mut self, host_offset: u64, len: u64, weight: u32) {
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
            // Within the window.
            let index = (cluster - self.window_start) as usize;
            self.touched[index / CHUNK_CLUSTERS] = true;
            let wanted = u64::from(self.counts[index]) + u64::from(weight);
            self.counts[index] = u16::try_from(wanted.min(max)).unwrap_or(u16::MAX);
            if let Ok(too_many @ 1..) = u32::try_from(wanted.saturating_sub(max)) {
                let offset = cluster << bits;
                let finding =
                    format!("ERROR cluster at {offset} has more references than refcounts of its width hold");
                self.corruption(too_many, finding);
            }
        }
    }

    /// Compares the window's counts with the refcounts; the last cluster that is in use.
    fn compare(&mut self) -> Result<Option<u64>> {
        let mut last = None;
        for chunk in 0..self.touched.len() {
            let start = chunk * CHUNK_CLUSTERS;
            let end = (start + CHUNK_CLUSTERS).min(self.counts.len());
            let clusters = self.window_start + start as u64..self.window_start + end as u64;
            if !self.touched[chunk] && self.refcounts.has_none(clusters) {
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

    /// Compares a cluster of the window; whether it is in use.
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
        if refcount < references {
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
