//! Which clusters have come: every one must come once.

use imgtool_toolkit::{Device, DeviceId, DeviceKind, Error, Result};
use roaring::RoaringBitmap;

use crate::extent::{BlockInfo, ExtentHeader};
use crate::layout::{CLUSTER, CLUSTER_MAP_UNIT, SUB_BLOCK, TABLE_ENTRIES, clusters_of};

/// Clusters after which the bitmaps are packed: dense ones become runs, so that 64 TiB fit into a
/// few MiB.
const PACK_INTERVAL: u32 = 1 << 22;

/// Clusters of which the bitmaps note the first with some 60 bytes, the others with 2 or less: the unit of
/// the bitmaps, 4 GiB of guest.
const PART_BITS: u32 = 16;

/// Most such parts of all devices that anything may have come of. Ours: 4 PiB of guest. Of real archives
/// all of a part comes; one that has a cluster in each of millions was made to take memory.
const MAX_PARTS: usize = 1 << 20;

/// A slot that is legal, and where its content belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) device: DeviceId,
    pub(crate) cluster: u32,
    pub(crate) mask: u16,
    /// Position among the slots of the extent.
    pub(crate) slot: u8,
    /// First guest byte.
    pub(crate) start: u64,
    /// Guest bytes: less than a cluster at the device's end, none beyond it.
    pub(crate) len: u64,
}

impl Placed {
    /// Bytes that are stored for it.
    pub(crate) fn stored_len(&self) -> u64 {
        u64::from(self.mask.count_ones()) * SUB_BLOCK
    }

    /// The sub-blocks that are stored and not past the device's end.
    pub(crate) fn mask_within(&self) -> u16 {
        let blocks = self.len.div_ceil(SUB_BLOCK).min(u64::from(u16::BITS));
        self.mask & ((1u32 << blocks) - 1) as u16
    }

    /// Whether its content is left out: it lies beyond the device.
    pub(crate) fn is_beyond(&self) -> bool {
        self.len == 0
    }

    /// Whether `next` goes on in the guest where this one ends.
    pub(crate) fn joins(&self, next: &Placed) -> bool {
        self.device == next.device && self.len == CLUSTER && self.start + self.len == next.start
    }
}

/// The state of every device while the extents go by.
pub(crate) struct Tracker {
    devices: Vec<Tracked>,
    /// Index into `devices` by `dev_id`.
    by_id: [Option<u8>; TABLE_ENTRIES],
    /// The state of a running guest must come in order.
    state_in_order: bool,
    since_packed: u32,
    /// Parts that something has come of, over all devices.
    parts: usize,
}

struct Tracked {
    id: DeviceId,
    name: String,
    kind: DeviceKind,
    size: u64,
    clusters: u64,
    /// Clusters within the device that have come.
    come: u64,
    /// Clusters of a state beyond its size.
    beyond: u64,
    /// All that have come; zero clusters slightly beyond the device among them.
    seen: RoaringBitmap,
    /// Their parts.
    parts: RoaringBitmap,
}

impl Tracker {
    pub(crate) fn new(devices: &[Device]) -> Self {
        let mut by_id = [None; TABLE_ENTRIES];
        let mut tracked = Vec::new();
        for device in devices {
            // There are at most 254 devices, with ids below 255.
            by_id[device.id.0 as usize % TABLE_ENTRIES] = Some(tracked.len() as u8);
            tracked.push(Tracked {
                id: device.id,
                name: device.name.clone(),
                kind: device.kind,
                size: device.size,
                clusters: clusters_of(device.size),
                come: 0,
                beyond: 0,
                seen: RoaringBitmap::new(),
                parts: RoaringBitmap::new(),
            });
        }
        Self { devices: tracked, by_id, state_in_order: true, since_packed: 0, parts: 0 }
    }

    /// For salvage: what follows a gap in the state is as good as any.
    pub(crate) fn lenient(devices: &[Device]) -> Self {
        Self { state_in_order: false, ..Self::new(devices) }
    }

    /// Checks all slots of an extent in order and fills `placed` with those that own something.
    pub(crate) fn admit(&mut self, extent: &ExtentHeader, placed: &mut Vec<Placed>) -> Result<()> {
        placed.clear();
        let mut blocks = 0;
        for (number, slot) in extent.slots.iter().enumerate() {
            if slot.dev_id == 0 {
                continue;
            }
            blocks += slot.stored();
            let too_many = blocks > u32::from(extent.block_count);
            placed.push(self.take(slot, number as u8, too_many)?);
        }
        if blocks < u32::from(extent.block_count) {
            return Err(Error::malformed("vma extent error - missing blocks")
                .hint(format!("{} sub-blocks are announced, the masks name {blocks}", extent.block_count)));
        }
        Ok(())
    }

    /// Checks one slot, in the order in which the reference program does.
    pub(crate) fn take(&mut self, slot: &BlockInfo, number: u8, too_many: bool) -> Result<Placed> {
        let index = self.by_id[usize::from(slot.dev_id)];
        let Some(device) = index.and_then(|index| self.devices.get_mut(usize::from(index))) else {
            return Err(Error::malformed(format!("got wrong dev id {}", slot.dev_id))
                .hint("the archive header knows no such device"));
        };
        let cluster = slot.cluster_num;
        let start = u64::from(cluster) * CLUSTER;
        device
            .check(slot, self.state_in_order, too_many)
            .map_err(|e| e.device(&device.name).guest(start..start + CLUSTER))?;
        if device.parts.insert(cluster >> PART_BITS) {
            self.parts += 1;
        }
        if self.parts > MAX_PARTS {
            return Err(Error::limit("the clusters are scattered over more than 4 PiB of guest")
                .device(&device.name)
                .guest(start..start + CLUSTER)
                .hint("no archive of a real guest is"));
        }
        device.add(cluster);
        self.since_packed += 1;
        let len = device.size.saturating_sub(start).min(CLUSTER);
        let placed = Placed { device: device.id, cluster, mask: slot.mask, slot: number, start, len };
        if self.since_packed >= PACK_INTERVAL {
            self.pack();
        }
        Ok(placed)
    }

    fn pack(&mut self) {
        self.since_packed = 0;
        for device in &mut self.devices {
            device.seen.optimize();
        }
    }

    /// Whether every cluster of every device has come.
    pub(crate) fn is_complete(&self) -> bool {
        self.devices.iter().all(|device| device.come == device.clusters)
    }

    /// Clusters that have not come.
    pub(crate) fn missing_count(&self) -> u64 {
        self.devices.iter().map(|device| device.clusters - device.come).sum()
    }

    /// Refuses an archive in which a cluster is missing.
    pub(crate) fn check_complete(&self) -> Result<()> {
        let Some((device, first)) =
            self.devices.iter().find_map(|device| Some((device, device.next_missing(0)?.start)))
        else {
            return Ok(());
        };
        let missing = device.clusters - device.come;
        let end = ((first + 1) * CLUSTER).min(device.size);
        Err(Error::corrupt(format!("detected missing cluster {first} for stream {}", device.name))
            .device(&device.name)
            .guest(first * CLUSTER..end)
            .hint(format!(
                "{missing} of {} clusters are missing: the archive was cut or is damaged; --salvage restores what is whole",
                device.clusters
            )))
    }

    /// The next run of missing clusters of the device at `index`, from `from` on.
    pub(crate) fn next_missing(&self, index: usize, from: u64) -> Option<std::ops::Range<u64>> {
        self.devices.get(index)?.next_missing(from)
    }
}

impl Tracked {
    fn is_state(&self) -> bool {
        self.kind == DeviceKind::VmState
    }

    fn is_within(&self, cluster: u32) -> bool {
        u64::from(cluster) < self.clusters
    }

    /// Refuses a slot that may not come, or not now.
    fn check(&self, slot: &BlockInfo, state_in_order: bool, too_many: bool) -> Result<()> {
        let cluster = slot.cluster_num;
        let due = self.come + self.beyond;
        if self.is_state() && state_in_order && u64::from(cluster) != due {
            return Err(Error::malformed("found out of order vmstate data")
                .hint(format!("cluster {cluster} came where {due} was due")));
        }
        if self.seen.contains(cluster) {
            let message = format!("found duplicated cluster {cluster} for stream {}", self.name);
            return Err(Error::corrupt(message));
        }
        if too_many {
            return Err(Error::malformed("short vma extent - too many blocks")
                .hint("the masks name more sub-blocks than the extent announces"));
        }
        // The state may be longer than announced, without limit: only its order matters.
        let tolerated = self.clusters.next_multiple_of(CLUSTER_MAP_UNIT);
        let beyond = !self.is_within(cluster) && !self.is_state();
        if beyond && (slot.mask != 0 || u64::from(cluster) >= tolerated) {
            return Err(Error::out_of_bounds("got wrong block address - write beyond end")
                .hint(format!("the device ends at {}", self.size)));
        }
        Ok(())
    }

    /// Notes that a cluster has come.
    fn add(&mut self, cluster: u32) {
        let within = self.is_within(cluster);
        if self.is_state() && !within {
            self.beyond += 1;
        } else {
            self.seen.insert(cluster);
            self.come += u64::from(within);
        }
    }

    /// The next run of clusters that have not come, from `from` on. Goes over runs, not clusters, so
    /// that neither billions of clusters nor millions of gaps cost much.
    fn next_missing(&self, from: u64) -> Option<std::ops::Range<u64>> {
        if from >= self.clusters {
            return None;
        }
        // from < clusters <= 2^32
        let mut come = self.seen.range(from as u32..);
        let mut first = from;
        while let Some(run) = come.next_range() {
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
