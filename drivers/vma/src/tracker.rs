//! Record of the clusters read so far: each must occur exactly once.

use std::ops::Range;

use imgtool_core::{Device, DeviceId, DeviceKind, Error, Lease, Memory, Remedy, Result};
use roaring::RoaringBitmap;

use crate::cluster::VmaCluster;
use crate::device_ids::DeviceIds;
use crate::extent::{BlockInfo, ExtentHeader};
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, CLUSTER_MAP_UNIT, clusters_of};
use crate::reference;

/// Number of clusters read between two compactions of the bitmaps. Compaction turns dense bitmaps into runs:
/// the bitmaps of 64 TiB then take a few MiB.
const COMPACT_INTERVAL: u32 = 1 << 22;

/// Binary logarithm of the number of clusters that one container of a bitmap covers: 2^16 clusters, 4 GiB of
/// guest data. The first cluster in a container takes some 60 bytes, each further one at most 2.
const CONTAINER_BITS: u32 = 16;

/// Maximum number of containers of all devices together: 4 PiB of guest data. Our limit: real archives fill
/// their containers; an archive with a single cluster in each of millions of containers is made to exhaust
/// memory.
const MAX_CONTAINERS: usize = 1 << 20;

/// Number of clusters read between two loans. Our choice: they add at most 8 MiB, all of them to containers of
/// their own.
const LOAN_INTERVAL: u32 = 1 << 16;

/// Memory in bytes of a container besides its content. Measured with roaring 0.12.
const CONTAINER_BYTES: u64 = 96;

/// Purpose of the loan, for errors.
const PURPOSE: &str = "the record of an archive's scattered clusters";

/// Advice for an archive that contradicts itself.
const DAMAGED: &str = "the archive is damaged: copy it again, or use another backup";

/// Record of the clusters read so far, for all devices.
pub(crate) struct Tracker {
    /// One tracker for each device, in the order of the archive header.
    devices: Vec<DeviceTracker>,
    ids: DeviceIds,
    /// True if the clusters of guest state must be in order.
    state_in_order: bool,
    /// Number of clusters added since the last compaction.
    since_compaction: u32,
    /// Number of containers of all devices together.
    containers: usize,
    /// Number of clusters added since the memory was borrowed.
    since_loan: u32,
    /// Memory for the bitmaps.
    memory: Lease,
}

struct DeviceTracker {
    id: DeviceId,
    name: String,
    kind: DeviceKind,
    /// Size in bytes of the device.
    size: u64,
    /// Number of clusters in the device.
    clusters: u64,
    /// Number of clusters read within the device.
    seen_within: u64,
    /// Number of clusters read past the end of guest state.
    seen_beyond: u64,
    /// Numbers of all clusters read, except clusters past the end of guest state.
    seen: RoaringBitmap,
    /// Numbers of the containers of all clusters read.
    containers: RoaringBitmap,
}

impl Tracker {
    /// Creates a tracker, which borrows from `memory`.
    pub(crate) fn new(header: &ArchiveHeader, memory: &Memory) -> Result<Self> {
        let tracker_of = |device: &Device| DeviceTracker {
            id: device.id,
            name: device.name.clone(),
            kind: device.kind,
            size: device.size,
            clusters: clusters_of(device.size),
            seen_within: 0,
            seen_beyond: 0,
            seen: RoaringBitmap::new(),
            containers: RoaringBitmap::new(),
        };
        Ok(Self {
            devices: header.devices.iter().map(tracker_of).collect(),
            ids: header.ids.clone(),
            state_in_order: true,
            since_compaction: 0,
            containers: 0,
            since_loan: 0,
            memory: memory.lease(0, PURPOSE)?,
        })
    }

    /// Creates a tracker for salvage, which accepts guest state that continues after a gap.
    pub(crate) fn lenient(header: &ArchiveHeader, memory: &Memory) -> Result<Self> {
        Ok(Self { state_in_order: false, ..Self::new(header, memory)? })
    }

    /// Borrows the memory that the bitmaps take.
    fn borrow(&mut self) -> Result<()> {
        self.since_loan = 0;
        let bitmaps = self.devices.iter().map(|device| device.seen.serialized_size() as u64).sum::<u64>();
        self.memory.raise(bitmaps + self.containers as u64 * CONTAINER_BYTES, PURPOSE)
    }

    /// Checks all slots of an extent in order, and fills `clusters` from the slots that are not empty.
    pub(crate) fn admit_extent(
        &mut self,
        extent: &ExtentHeader,
        clusters: &mut Vec<VmaCluster>,
    ) -> Result<()> {
        clusters.clear();
        let mut blocks = 0;
        for (index, slot) in extent.slots.iter().enumerate() {
            if slot.dev_id == 0 {
                continue;
            }
            blocks += slot.stored();
            let too_many = blocks > u32::from(extent.block_count);
            clusters.push(self.admit_slot(slot, index as u8, too_many)?);
        }
        if blocks < u32::from(extent.block_count) {
            return Err(Error::malformed(reference::MISSING_BLOCKS).hint(format!(
                "the extent header counts {} sub-blocks, its masks mark {blocks}; {DAMAGED}",
                extent.block_count
            )));
        }
        Ok(())
    }

    /// Checks the slot at `index` of an extent, which must not be empty, and records its cluster. The checks
    /// run in the same order as in the reference program. `too_many` is true if the masks up to and including
    /// this slot mark more sub-blocks than the extent header counts.
    pub(crate) fn admit_slot(&mut self, slot: &BlockInfo, index: u8, too_many: bool) -> Result<VmaCluster> {
        let device = self.ids.index_of(DeviceId(u32::from(slot.dev_id)));
        let Some(device) = device.and_then(|index| self.devices.get_mut(index)) else {
            return Err(Error::malformed(format!("got wrong dev id {}", slot.dev_id))
                .hint(format!("the archive header has no such device; {DAMAGED}")));
        };
        let number = slot.cluster_num;
        let start = u64::from(number) * CLUSTER;
        device
            .check(slot, self.state_in_order, too_many)
            .map_err(|e| e.device(&device.name).guest(start..start + CLUSTER))?;
        if device.containers.insert(number >> CONTAINER_BITS) {
            self.containers += 1;
        }
        if self.containers > MAX_CONTAINERS {
            return Err(Error::limit("the clusters are scattered over more than 4 PiB of guest data")
                .device(&device.name)
                .guest(start..start + CLUSTER)
                .hint(
                    "do not trust this archive: it looks made to exhaust memory, unlike those of real guests",
                ));
        }
        device.add(number);
        self.since_compaction += 1;
        let len = device.size.saturating_sub(start).min(CLUSTER);
        let cluster = VmaCluster { device: device.id, number, mask: slot.mask, slot: index, start, len };
        if self.since_compaction >= COMPACT_INTERVAL {
            self.compact();
        }
        self.since_loan += 1;
        if self.since_loan >= LOAN_INTERVAL {
            self.borrow()?;
        }
        Ok(cluster)
    }

    fn compact(&mut self) {
        self.since_compaction = 0;
        for device in &mut self.devices {
            device.seen.optimize();
        }
    }

    /// True if every cluster of every device has been read.
    pub(crate) fn is_complete(&self) -> bool {
        self.devices.iter().all(|device| device.seen_within == device.clusters)
    }

    /// Returns the number of clusters of all devices that have not been read.
    pub(crate) fn missing_count(&self) -> u64 {
        self.devices.iter().map(|device| device.clusters - device.seen_within).sum()
    }

    /// Fails if a cluster of any disk has not been read. The end of guest state may be missing: its size in
    /// the header is the estimate of the program that saved it.
    pub(crate) fn check_complete(&self) -> Result<()> {
        let mut disks = self.devices.iter().filter(|device| !device.is_state());
        let Some((device, first)) = disks.find_map(|device| Some((device, device.next_missing(0)?.start)))
        else {
            return Ok(());
        };
        let missing = device.clusters - device.seen_within;
        let end = ((first + 1) * CLUSTER).min(device.size);
        Err(Error::corrupt(format!("detected missing cluster {first} for stream {}", device.name))
            .device(&device.name)
            .guest(first * CLUSTER..end)
            .remedied_by(Remedy::Salvage(
                format!(
                    "{missing} of {} clusters are missing: the archive was cut or is damaged",
                    device.clusters
                )
                .into(),
            )))
    }

    /// Returns the unstored ends of guest state after the last extent: the device and the guest range.
    pub(crate) fn short_states(&self) -> Vec<(DeviceId, Range<u64>)> {
        let states = self.devices.iter().filter(|device| device.is_state());
        // The clusters of guest state come in order, so only its end can be missing.
        let missing = states.filter_map(|device| Some((device, device.next_missing(0)?.start)));
        missing.map(|(device, first)| (device.id, first * CLUSTER..device.size)).collect()
    }

    /// Returns the next run of missing clusters, from cluster `from` on, of the device at `index` in the
    /// header, or `None` if no cluster from there on is missing.
    pub(crate) fn next_missing(&self, index: usize, from: u64) -> Option<Range<u64>> {
        self.devices.get(index)?.next_missing(from)
    }
}

impl DeviceTracker {
    fn is_state(&self) -> bool {
        self.kind == DeviceKind::VmState
    }

    fn is_within(&self, cluster: u32) -> bool {
        u64::from(cluster) < self.clusters
    }

    /// Refuses a slot that is out of order, repeated or past the end of the device, or that marks more
    /// sub-blocks than its extent counts.
    fn check(&self, slot: &BlockInfo, state_in_order: bool, too_many: bool) -> Result<()> {
        let cluster = slot.cluster_num;
        let expected = self.seen_within + self.seen_beyond;
        if self.is_state() && state_in_order && u64::from(cluster) != expected {
            return Err(Error::malformed("found out of order vmstate data")
                .hint(format!("found cluster {cluster}, expected {expected}; {DAMAGED}")));
        }
        if self.seen.contains(cluster) {
            let message = format!("found duplicated cluster {cluster} for stream {}", self.name);
            return Err(Error::corrupt(message));
        }
        if too_many {
            return Err(Error::malformed(reference::TOO_MANY_BLOCKS)
                .hint(format!("the masks mark more sub-blocks than the extent header counts; {DAMAGED}")));
        }
        // Guest state may exceed its size in the header without limit; only the order matters.
        let tolerated = self.clusters.next_multiple_of(CLUSTER_MAP_UNIT);
        let beyond = !self.is_within(cluster) && !self.is_state();
        if beyond && (slot.mask != 0 || u64::from(cluster) >= tolerated) {
            return Err(Error::out_of_bounds("got wrong block address - write beyond end")
                .hint(format!("the device ends at {}; {DAMAGED}", self.size)));
        }
        Ok(())
    }

    /// Records a cluster that passed [`DeviceTracker::check`].
    fn add(&mut self, cluster: u32) {
        let within = self.is_within(cluster);
        if self.is_state() && !within {
            self.seen_beyond += 1;
        } else {
            self.seen.insert(cluster);
            self.seen_within += u64::from(within);
        }
    }

    /// Returns the next run of missing clusters, from `from` on. Steps over whole runs instead of single
    /// clusters, so billions of clusters or millions of gaps cost little.
    fn next_missing(&self, from: u64) -> Option<Range<u64>> {
        if from >= self.clusters {
            return None;
        }
        // from < clusters <= 2^32
        let mut seen = self.seen.range(from as u32..);
        let mut first = from;
        while let Some(run) = seen.next_range() {
            let start = u64::from(*run.start());
            if start > first {
                return Some(first..start.min(self.clusters));
            }
            first = u64::from(*run.end()) + 1;
            if first >= self.clusters {
                return None;
            }
        }
        Some(first..self.clusters)
    }
}
