//! The index of an archive in a file: where each cluster is, from one pass over the extent headers.
//!
//! The data is not touched. What is kept is a list of *runs* per device: clusters that follow each
//! other in the guest and in the slots of one extent (16 bytes for up to 59 clusters), and runs of
//! zero clusters, which join across extents. The masks stay in the file: they are read again with
//! the extent's header, and the last few headers are kept ([`crate::masks`]).

use std::sync::Arc;

use imgtool_toolkit::{DeviceId, OpenOptions, RandomInput, Result};

use crate::bytes::{ArchiveBytes, Cursor};
use crate::header::ArchiveHeader;
use crate::layout::{EXTENT_HEADER, SUB_BLOCK, TABLE_ENTRIES};
use crate::tracker::Placed;
use crate::walker::{Entered, Walker};

/// Most runs of all devices: 92 MiB. Ours. An archive whose extents are full stays below it up to 20 TiB of
/// data; what is longer or more scattered is read in one pass instead.
pub(crate) const MAX_RUNS: usize = 6_000_000;

/// Clusters that are found together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first cluster.
    pub(crate) first: u32,
    /// How many.
    pub(crate) count: u32,
    /// [`Run::ZERO`], or where the extent is and at which of its slots the run begins.
    place: u64,
}

impl Run {
    const ZERO: u64 = u64::MAX;
    /// Extents stand at `header_size` plus a multiple of this; 56 bits of such units are enough.
    const UNIT: u64 = EXTENT_HEADER as u64;

    pub(crate) fn is_zero(&self) -> bool {
        self.place == Self::ZERO
    }

    /// The extent, counted in units of 512 bytes from the first.
    pub(crate) fn extent_unit(&self) -> u64 {
        self.place >> 8
    }

    /// The slot of the first cluster.
    pub(crate) fn first_slot(&self) -> usize {
        (self.place & 0xff) as usize
    }

    pub(crate) fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }
}

/// What is known of one device.
#[derive(Debug, Default)]
pub(crate) struct DeviceIndex {
    /// By first cluster; together they cover the device.
    pub(crate) runs: Vec<Run>,
    /// Bytes of sub-blocks that are stored.
    pub(crate) stored: u64,
    /// Zero clusters past the end, and clusters of a state that is longer than announced.
    pub(crate) beyond: u64,
    /// Sub-blocks that are stored past the end.
    pub(crate) dropped_blocks: u64,
}

/// The index.
pub(crate) struct Index {
    devices: Vec<DeviceIndex>,
    by_id: [Option<u8>; TABLE_ENTRIES],
    /// Extents in the archive.
    pub(crate) extents: u64,
    pub(crate) header_size: u64,
    /// Otherwise it only counts.
    keeps_runs: bool,
}

impl Index {
    fn new(header: &ArchiveHeader, keeps_runs: bool) -> Self {
        let mut index = Self {
            devices: header.devices.iter().map(|_| DeviceIndex::default()).collect(),
            by_id: [None; TABLE_ENTRIES],
            extents: 0,
            header_size: u64::from(header.header_size),
            keeps_runs,
        };
        for (number, device) in header.devices.iter().enumerate() {
            // There are at most 254 devices, with ids below 255.
            index.by_id[device.id.0 as usize % TABLE_ENTRIES] = Some(number as u8);
        }
        index
    }

    /// Walks over the rest of an archive behind its header, and counts; `None` when it reaches
    /// beyond `limit`, a position in the archive.
    pub(crate) fn count(
        bytes: impl ArchiveBytes,
        header: &Arc<ArchiveHeader>,
        options: &OpenOptions,
        limit: u64,
    ) -> Result<Option<Self>> {
        let mut index = Self::new(header, false);
        let mut walker = Walker::new(bytes, header, options);
        while walker.bytes.position() < limit {
            let Some(entered) = walker.enter()? else { return Ok(Some(index)) };
            if entered.file_offset.saturating_add(entered.data_len) >= limit {
                return Ok(None);
            }
            if walker.bytes.skip(entered.data_len)? < entered.data_len {
                return Err(walker.short(entered));
            }
            for placed in &walker.placed {
                index.add(placed, entered);
            }
            index.extents += 1;
        }
        Ok(None)
    }

    /// Walks over the whole archive; `None` when there would be more than `max_runs` runs.
    pub(crate) fn build(
        input: &RandomInput,
        header: &Arc<ArchiveHeader>,
        options: &OpenOptions,
        max_runs: usize,
    ) -> Result<Option<Self>> {
        let mut cursor = Cursor::new(input.clone());
        let mut index = Self::new(header, true);
        cursor.skip(index.header_size)?;
        let mut walker = Walker::new(cursor, header, options);
        while let Some(entered) = walker.enter()? {
            walker.bytes.skip(entered.data_len)?;
            for placed in &walker.placed {
                index.add(placed, entered);
            }
            index.extents += 1;
            if index.devices.iter().map(|device| device.runs.len()).sum::<usize>() > max_runs {
                return Ok(None);
            }
        }
        for device in &mut index.devices {
            if !device.runs.is_sorted_by_key(|run| run.first) {
                device.runs.sort_unstable_by_key(|run| run.first);
            }
            device.runs.shrink_to_fit();
        }
        Ok(Some(index))
    }

    fn add(&mut self, placed: &Placed, entered: Entered) {
        let unit = (entered.file_offset - self.header_size) / Run::UNIT;
        let keeps_runs = self.keeps_runs;
        let Some(device) = self.device_mut(placed.device) else { return };
        if placed.is_beyond() {
            device.beyond += 1;
            return;
        }
        let mask_within = placed.mask_within();
        device.stored += u64::from(mask_within.count_ones()) * SUB_BLOCK;
        device.dropped_blocks += u64::from((placed.mask & !mask_within).count_ones());
        if keeps_runs {
            device.add_run(placed, mask_within == 0, unit);
        }
    }

    /// The index of a device.
    pub(crate) fn device(&self, id: DeviceId) -> Option<&DeviceIndex> {
        let number = (*self.by_id.get(id.0 as usize)?)?;
        self.devices.get(usize::from(number))
    }

    fn device_mut(&mut self, id: DeviceId) -> Option<&mut DeviceIndex> {
        let number = (*self.by_id.get(id.0 as usize)?)?;
        self.devices.get_mut(usize::from(number))
    }

    /// Where the extent of a run stands in the file.
    pub(crate) fn extent_offset(&self, run: &Run) -> u64 {
        self.header_size + run.extent_unit() * Run::UNIT
    }
}

impl DeviceIndex {
    /// Adds a cluster of the extent at `unit`, to the last run if it goes on there.
    fn add_run(&mut self, placed: &Placed, is_zero: bool, unit: u64) {
        let slot = u64::from(placed.slot);
        if let Some(last) = self.runs.last_mut()
            && last.end() == u64::from(placed.cluster)
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
        self.runs.push(Run { first: placed.cluster, count: 1, place });
    }

    /// The run that holds `cluster`.
    pub(crate) fn run_of(&self, cluster: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| u64::from(run.first) <= cluster);
        self.runs.get(after.checked_sub(1)?).filter(|run| cluster < run.end())
    }
}
