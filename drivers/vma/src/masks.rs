//! The masks of extents, read again from the file when they are needed.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use imgtool_toolkit::{Error, RandomInput, Result};

use crate::extent::ExtentHeader;
use crate::index::Run;
use crate::layout::{CLUSTERS_PER_EXTENT, EXTENT_HEADER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};

/// Extents whose masks are kept: 64 × 0.7 KiB. Ours: more than there are readers at work.
const KEPT: usize = 64;

/// Where the sub-blocks of one extent are.
pub(crate) struct ExtentMap {
    header: ExtentHeader,
    first_blocks: [u32; CLUSTERS_PER_EXTENT],
    /// Where its data begins in the file.
    data_offset: u64,
}

/// A maximal run of sub-blocks, in the guest, that are all stored one after the other, or all zero.
pub(crate) struct Stretch {
    /// Sub-blocks, counted from the first cluster of the run.
    pub(crate) blocks: Range<u64>,
    /// Where they are stored.
    pub(crate) file_offset: Option<u64>,
}

impl ExtentMap {
    /// The stretches of the sub-blocks `blocks` of `run`, in guest order. The run's slots have been
    /// compared with the header ([`MaskCache::extent`]).
    pub(crate) fn stretches(&self, run: &Run, blocks: Range<u64>) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for block in blocks {
            let file_offset = self.block_offset(run, block);
            match stretches.last_mut() {
                // Neighbours in the guest that are both stored are neighbours in the file.
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

/// An extent's offset in the file, and its map.
type Kept = (u64, Arc<ExtentMap>);

/// The extents that were needed last.
pub(crate) struct MaskCache {
    uuid: [u8; 16],
    kept: Vec<Mutex<Option<Kept>>>,
}

impl MaskCache {
    pub(crate) fn new(uuid: [u8; 16]) -> Self {
        Self { uuid, kept: (0..KEPT).map(|_| Mutex::new(None)).collect() }
    }

    /// The map of the extent at `file_offset`, which holds `run` of the device `dev_id`.
    pub(crate) fn extent(
        &self,
        input: &RandomInput,
        run: &Run,
        dev_id: u32,
        file_offset: u64,
    ) -> Result<Arc<ExtentMap>> {
        let place = &self.kept[(file_offset / EXTENT_HEADER as u64) as usize % KEPT];
        let known = place.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let map = match known {
            Some((offset, map)) if offset == file_offset => map,
            _ => {
                let map = Arc::new(self.read(input, file_offset)?);
                *place.lock().unwrap_or_else(PoisonError::into_inner) = Some((file_offset, Arc::clone(&map)));
                map
            }
        };
        let first = map.header.slots.get(run.first_slot());
        if first.is_none_or(|slot| u32::from(slot.dev_id) != dev_id || slot.cluster_num != run.first) {
            return Err(changed(file_offset));
        }
        Ok(map)
    }

    fn read(&self, input: &RandomInput, file_offset: u64) -> Result<ExtentMap> {
        let mut raw = [0; EXTENT_HEADER];
        input.read_exact_at(&mut raw, file_offset)?;
        let header = ExtentHeader::parse(&raw, &self.uuid).map_err(|_| changed(file_offset))?;
        let first_blocks = header.first_blocks();
        Ok(ExtentMap { header, first_blocks, data_offset: file_offset + EXTENT_HEADER as u64 })
    }
}

/// The header was right when the index was made.
fn changed(file_offset: u64) -> Error {
    Error::corrupt("the extent header has changed while the archive was being read")
        .at(file_offset)
        .hint("something else writes to the file; wait until it is done")
}
