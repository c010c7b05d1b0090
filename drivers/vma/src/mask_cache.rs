//! Cache of extent headers, for the masks that the index does not keep.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Cache, DeviceId, Error, RandomInput, Result};

use crate::extent::ExtentHeader;
use crate::index::Run;
use crate::layout::{CLUSTERS_PER_EXTENT, EXTENT_HEADER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};

/// Maximum number of extents in the cache, 0.7 KiB each. Our choice: more than the expected number of
/// concurrent readers.
const CACHED_EXTENTS: usize = 64;

/// Decoded header of one extent, which locates the extent's sub-blocks.
pub(crate) struct ExtentMap {
    header: ExtentHeader,
    /// For each slot, the number of sub-blocks stored before its own.
    first_blocks: [u32; CLUSTERS_PER_EXTENT],
    /// File offset of the extent's data.
    data_offset: u64,
}

/// Consecutive sub-blocks of a run, either all stored and contiguous in the file, or all zero.
pub(crate) struct Stretch {
    /// Range of sub-blocks, counted from the start of the run.
    pub(crate) blocks: Range<u64>,
    /// File offset of the data, or `None` for zeros.
    pub(crate) file_offset: Option<u64>,
}

impl ExtentMap {
    /// Returns the stretches of the sub-blocks `blocks` of `run`, in guest order. The map must come
    /// from [`MaskCache::extent`] for the same run.
    pub(crate) fn stretches(&self, run: &Run, blocks: Range<u64>) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for block in blocks {
            let file_offset = self.block_offset(run, block);
            match stretches.last_mut() {
                // Within a run, stored sub-blocks that are adjacent in the guest are adjacent in the file.
                Some(last) if last.file_offset.is_some() == file_offset.is_some() => last.blocks.end += 1,
                _ => stretches.push(Stretch { blocks: block..block + 1, file_offset }),
            }
        }
        stretches
    }

    fn block_offset(&self, run: &Run, block: u64) -> Option<u64> {
        let slot = run.first_slot() + usize::try_from(block / SUB_BLOCKS_PER_CLUSTER).ok()?;
        let bit = 1u16 << (block % SUB_BLOCKS_PER_CLUSTER);
        let mask = self.header.slots.get(slot)?.mask;
        let before = self.first_blocks[slot] + (mask & (bit - 1)).count_ones();
        (mask & bit != 0).then(|| self.data_offset + u64::from(before) * SUB_BLOCK)
    }
}

/// Cache of extent maps.
pub(crate) struct MaskCache {
    uuid: [u8; 16],
    /// Maps by the file offset of their extents. One lock suffices: readers hold it only for look-ups and
    /// insertions, which take less time than reading a header.
    entries: Mutex<Cache<u64, Arc<ExtentMap>>>,
}

impl MaskCache {
    pub(crate) fn new(uuid: [u8; 16]) -> Self {
        Self { uuid, entries: Mutex::new(Cache::new(CACHED_EXTENTS)) }
    }

    /// Returns the map of the extent at `file_offset`, which must contain `run` of `device`.
    ///
    /// # Errors
    /// Fails if the extent header cannot be read or no longer matches the index.
    pub(crate) fn extent(
        &self,
        input: &RandomInput,
        run: &Run,
        device: DeviceId,
        file_offset: u64,
    ) -> Result<Arc<ExtentMap>> {
        let cached = lock(&self.entries).get(&file_offset).cloned();
        let map = match cached {
            Some(map) => map,
            None => {
                let map = Arc::new(self.read(input, file_offset)?);
                lock(&self.entries).insert(file_offset, Arc::clone(&map));
                map
            }
        };
        let first = map.header.slots.get(run.first_slot());
        if first.is_none_or(|slot| u32::from(slot.dev_id) != device.0 || slot.cluster_num != run.first) {
            return Err(header_changed(file_offset));
        }
        Ok(map)
    }

    fn read(&self, input: &RandomInput, file_offset: u64) -> Result<ExtentMap> {
        let mut raw = [0; EXTENT_HEADER];
        // `parse` verifies the checksum of the header.
        input.read_unverified_at(&mut raw, file_offset)?;
        let header = ExtentHeader::parse(&raw, &self.uuid).map_err(|_| header_changed(file_offset))?;
        let first_blocks = header.first_blocks();
        Ok(ExtentMap { header, first_blocks, data_offset: file_offset + EXTENT_HEADER as u64 })
    }
}

/// Returns the error for an extent header that was valid when the index was built but no longer is.
fn header_changed(file_offset: u64) -> Error {
    Error::corrupt("the extent header changed while the archive was being read")
        .at(file_offset)
        .hint("another program is writing to the file; wait until it has finished")
}
