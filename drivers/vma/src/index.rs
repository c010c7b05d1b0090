//! Index of an archive in a file: the location of every cluster, found in one pass over the extent headers.
//!
//! The pass does not read data. For each device, the index stores *runs* of two kinds: clusters that are
//! consecutive both in the guest and in the slots of one extent (16 bytes for up to 59 clusters), and
//! consecutive zero clusters, which may span extents. The index does not keep the masks;
//! [`crate::mask_cache`] reads the extent headers again to get them.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{DeviceId, Lease, Memory, OpenOptions, RandomInput, Result};

use crate::bytes::{ArchiveBytes, FileCursor};
use crate::cluster::VmaCluster;
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, EXTENT_HEADER, SUB_BLOCK};
use crate::tracker::Tracker;
use crate::walker::{ExtentSpan, Walker};

/// Maximum number of runs of all devices together, which take 92 MiB of memory. Our limit: 20 TiB of full
/// extents stay below it. The source reads longer or more scattered archives as streams instead.
pub(crate) const MAX_RUNS: usize = 6_000_000;

/// Number of bytes that the index borrows at a time. Our choice.
const LOAN_STEP: u64 = 1 << 20;

/// Consecutive clusters of one device, either in consecutive slots of one extent or all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Number of the first cluster.
    pub(crate) first: u32,
    /// Number of clusters.
    pub(crate) count: u32,
    /// [`Run::ZERO`], or the extent's distance from the first extent (upper 56 bits, in [`Run::UNIT`]s) and
    /// the first slot (lower 8 bits).
    place: u64,
}

impl Run {
    /// Value of `place` that marks a run of zero clusters.
    const ZERO: u64 = u64::MAX;
    /// Unit in bytes of extent positions: extents begin at `header_size` plus a multiple of it. Any file
    /// offset in this unit fits into 56 bits.
    const UNIT: u64 = EXTENT_HEADER as u64;

    /// True if all clusters are zero, so the run has no place in the file.
    pub(crate) fn is_zero(&self) -> bool {
        self.place == Self::ZERO
    }

    /// Returns the distance of the extent from the first extent, in [`Run::UNIT`]s.
    fn extent_unit(&self) -> u64 {
        self.place >> 8
    }

    /// Returns the index of the first cluster's slot.
    pub(crate) fn first_slot(&self) -> usize {
        (self.place & 0xff) as usize
    }

    /// Returns the number of the cluster after the last one.
    pub(crate) fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }
}

/// Runs and counts of one device.
#[derive(Debug, Default)]
pub(crate) struct DeviceIndex {
    /// Runs in ascending order of their first clusters; together they cover the device.
    pub(crate) runs: Vec<Run>,
    /// Total size in bytes of the stored sub-blocks that begin within the device.
    pub(crate) stored: u64,
    /// Number of clusters past the end of the device: only zero clusters for a disk, any clusters for the
    /// guest state.
    pub(crate) beyond: u64,
    /// Number of sub-blocks stored past the end of the device in its last cluster.
    pub(crate) dropped_blocks: u64,
    /// True if some cluster does not follow its predecessor in the guest.
    is_shuffled: bool,
    /// Number of the next cluster, if the clusters are in guest order.
    next_cluster: u64,
    /// Ordinal numbers of the device's first and last cluster among the clusters of the archive.
    span: Option<(u64, u64)>,
}

/// Index of all devices, or just their counts.
pub(crate) struct Index {
    /// One index per device, in the order of the archive header.
    pub(crate) devices: Vec<DeviceIndex>,
    header: Arc<ArchiveHeader>,
    /// Number of extents in the archive.
    pub(crate) extents: u64,
    /// Number of clusters in the archive.
    clusters: u64,
    /// True if the index stores runs, not only counts.
    keeps_runs: bool,
    /// Unstored ends of guest state: the device and the guest range.
    pub(crate) short_states: Vec<(DeviceId, Range<u64>)>,
    /// Memory for the runs.
    memory: Lease,
}

impl Index {
    fn new(header: &Arc<ArchiveHeader>, keeps_runs: bool, memory: &Memory) -> Result<Self> {
        let devices = header.devices.iter().map(|_| DeviceIndex::default()).collect();
        let memory = memory.lease(0, "the index of an archive")?;
        Ok(Self {
            devices,
            header: Arc::clone(header),
            extents: 0,
            clusters: 0,
            keeps_runs,
            short_states: Vec::new(),
            memory,
        })
    }

    /// Returns the archive offset of the first extent.
    fn header_size(&self) -> u64 {
        u64::from(self.header.header_size)
    }

    /// Counts the extents and their content, without keeping runs. `bytes` must be positioned directly after
    /// the archive header. Returns `None` if the archive does not end before the archive offset `limit`.
    pub(crate) fn count(
        bytes: impl ArchiveBytes,
        header: &Arc<ArchiveHeader>,
        options: &OpenOptions,
        limit: u64,
    ) -> Result<Option<Self>> {
        let mut index = Self::new(header, false, &options.memory)?;
        let mut walker = Walker::new(bytes, header, options)?;
        while walker.bytes.position() < limit {
            let Some(span) = walker.next_extent()? else {
                index.short_states = walker.tracker.short_states();
                return Ok(Some(index));
            };
            if span.file_offset.saturating_add(span.data_len) >= limit {
                return Ok(None);
            }
            if walker.bytes.skip(span.data_len)? < span.data_len {
                return Err(walker.short_extent(span));
            }
            for cluster in &walker.clusters {
                index.add(cluster, span);
            }
            index.extents += 1;
        }
        Ok(None)
    }

    /// Indexes the whole archive. Returns `None` if the index needs more than `max_runs` runs, or more than
    /// half of the memory that is free.
    pub(crate) fn build(
        input: &RandomInput,
        header: &Arc<ArchiveHeader>,
        options: &OpenOptions,
        max_runs: usize,
    ) -> Result<Option<Self>> {
        let mut cursor = FileCursor::new(input.clone());
        let mut index = Self::new(header, true, &options.memory)?;
        let max_bytes = options.memory.free() / 2;
        cursor.skip(index.header_size())?;
        let mut walker = Walker::new(cursor, header, options)?;
        while let Some(span) = walker.next_extent()? {
            walker.bytes.skip(span.data_len)?;
            for cluster in &walker.clusters {
                index.add(cluster, span);
            }
            index.extents += 1;
            let runs: usize = index.devices.iter().map(|device| device.runs.len()).sum();
            let bytes = runs as u64 * size_of::<Run>() as u64;
            if bytes > index.memory.bytes() {
                let more = bytes.saturating_add(LOAN_STEP).min(max_bytes.max(bytes));
                if bytes > max_bytes || !index.memory.try_raise(more) {
                    return Ok(None);
                }
            }
            if runs > max_runs {
                return Ok(None);
            }
        }
        index.add_short_states(&walker.tracker);
        for device in &mut index.devices {
            if !device.runs.is_sorted_by_key(|run| run.first) {
                device.runs.sort_unstable_by_key(|run| run.first);
            }
            device.runs.shrink_to_fit();
        }
        Ok(Some(index))
    }

    fn add(&mut self, cluster: &VmaCluster, span: ExtentSpan) {
        let unit = (span.file_offset - self.header_size()) / Run::UNIT;
        let keeps_runs = self.keeps_runs;
        let index = self.header.ids.index_of(cluster.device);
        let Some(device) = index.and_then(|index| self.devices.get_mut(index)) else { return };
        if cluster.is_beyond() {
            device.beyond += 1;
            return;
        }
        device.is_shuffled |= u64::from(cluster.number) != device.next_cluster;
        device.next_cluster = u64::from(cluster.number) + 1;
        device.span = Some((device.span.map_or(self.clusters, |(first, _)| first), self.clusters));
        self.clusters += 1;
        let mask_within = cluster.mask_within();
        device.stored += u64::from(mask_within.count_ones()) * SUB_BLOCK;
        device.dropped_blocks += u64::from((cluster.mask & !mask_within).count_ones());
        if keeps_runs {
            device.add_to_runs(cluster, mask_within == 0, unit);
        }
    }

    /// Adds the unstored ends of guest state, as runs of zeros.
    fn add_short_states(&mut self, tracker: &Tracker) {
        self.short_states = tracker.short_states();
        for (id, guest) in &self.short_states {
            let index = self.header.ids.index_of(*id);
            let Some(device) = index.and_then(|index| self.devices.get_mut(index)) else { continue };
            // Fits: a device has at most 2^32 clusters, so the number of each fits into 32 bits.
            let clusters = guest.start / CLUSTER..guest.end.div_ceil(CLUSTER);
            let mut first = clusters.start;
            while first < clusters.end {
                let count = (clusters.end - first).min(u64::from(u32::MAX)) as u32;
                device.runs.push(Run { first: first as u32, count, place: Run::ZERO });
                first += u64::from(count);
            }
        }
    }

    /// True if the archive contains these devices one after another, each in guest order.
    pub(crate) fn is_sequential(&self, devices: &[DeviceId]) -> bool {
        let mut end = None;
        devices.iter().filter_map(|id| self.device(*id)).all(|device| {
            let Some((first, last)) = device.span else { return true };
            let follows = end.is_none_or(|end| end < first);
            end = Some(last);
            follows && !device.is_shuffled
        })
    }

    /// Returns the runs and counts of the device `id`, or `None` if the archive has no such device.
    pub(crate) fn device(&self, id: DeviceId) -> Option<&DeviceIndex> {
        self.devices.get(self.header.ids.index_of(id)?)
    }

    /// Returns the file offset of the extent that contains `run`, which must not be a zero run.
    pub(crate) fn extent_offset(&self, run: &Run) -> u64 {
        self.header_size() + run.extent_unit() * Run::UNIT
    }
}

impl DeviceIndex {
    /// Extends the last run by a cluster, or begins a new run. `unit` is the distance of the cluster's extent
    /// from the first extent, in [`Run::UNIT`]s.
    fn add_to_runs(&mut self, cluster: &VmaCluster, is_zero: bool, unit: u64) {
        let slot = u64::from(cluster.slot);
        if let Some(last) = self.runs.last_mut()
            && last.end() == u64::from(cluster.number)
            && last.count < u32::MAX
        {
            let next_slot = last.first_slot() as u64 + u64::from(last.count);
            let same_extent = !last.is_zero() && last.extent_unit() == unit && next_slot == slot;
            if same_extent || (last.is_zero() && is_zero) {
                last.count += 1;
                return;
            }
        }
        let place = if is_zero { Run::ZERO } else { unit << 8 | slot };
        self.runs.push(Run { first: cluster.number, count: 1, place });
    }

    /// Returns the run that contains cluster number `cluster`, or `None` if there is none.
    pub(crate) fn run_of(&self, cluster: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| u64::from(run.first) <= cluster);
        self.runs.get(after.checked_sub(1)?).filter(|run| cluster < run.end())
    }
}
