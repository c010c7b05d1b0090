//! Refcounts of an existing image, changed while new clusters are allocated.
//!
//! The editor writes refcount blocks at any time: until the tables of the image refer to a new cluster, its
//! refcount is at worst a leak. New blocks become part of the image in [`RefcountEditor::commit`], because
//! a crash may keep an entry of the refcount table without the block that it refers to.

use imgtool_core::{Cache, Error, Lease, Memory, Output, Result};

use crate::layout::MAX_REFCOUNT_TABLE_BYTES;
use crate::layout::entry::{RefcountTableEntry, max_refcount, refcount, set_refcount};
use crate::layout::header::Header;
use crate::layout::table::{decode_table, encode_table};

/// Memory in bytes for refcount blocks, unless two blocks are larger. Our choice: with clusters of 64 KiB,
/// these blocks count 64 GiB of file.
const CACHE_BYTES: u64 = 2 << 20;

/// Minimum number of blocks in memory: one for allocation, one for the clusters that are looked up.
const MIN_BLOCKS: u64 = 2;

/// End of the host offsets that fit into L1 and L2 entries, 56 bits. Specification, "L1 table entry".
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// File offset of the field "refcount_table_offset", which "refcount_table_clusters" follows. Specification,
/// "Header".
const REFCOUNT_TABLE_FIELD: u64 = 48;

/// Advice for tables that no repair here mends.
pub(crate) const NEW_IMAGE: &str =
    "convert it to a new image, which has new tables; QEMU's own qemu-img may mend a copy: check -r all";

/// A refcount block in memory.
struct Block {
    bytes: Vec<u8>,
    changed: bool,
}

/// A run of host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clusters {
    /// Host offset of the first cluster.
    pub offset: u64,
    /// Number of clusters.
    pub count: u64,
}

/// Refcounts of an image, and the allocator of its free clusters.
pub struct RefcountEditor {
    output: Output,
    cluster_bits: u32,
    order: u32,
    /// Entries of the refcount table, with those of new blocks.
    table: Vec<u64>,
    /// Location of the refcount table in the file.
    place: Clusters,
    /// First and last index of the entries that the file lacks.
    unwritten: Option<(usize, usize)>,
    blocks: Cache<u64, Block>,
    /// Index of the host cluster at which the search for a free one goes on.
    next: u64,
    /// Host offset of the end of the latest compressed data, where more may follow; 0 if there is none.
    cursor: u64,
    _lease: Lease,
}

impl RefcountEditor {
    /// Reads the refcount table. The header check bounds it to 8 MiB.
    pub fn open(output: &Output, header: &Header, memory: &Memory) -> Result<Self> {
        let cluster_bits = header.shape.cluster_bits;
        let place = Clusters {
            offset: header.refcount_table_offset,
            count: u64::from(header.refcount_table_clusters),
        };
        let blocks = (CACHE_BYTES >> cluster_bits).max(MIN_BLOCKS);
        // The table may grow up to its limit while this exists.
        let cost = MAX_REFCOUNT_TABLE_BYTES.saturating_add(blocks << cluster_bits);
        let lease = memory.lease(cost, "the refcounts of a qcow2 image")?;
        let mut bytes = vec![0; usize::try_from(place.count << cluster_bits).unwrap_or(usize::MAX)];
        output.read_exact_at(&mut bytes, place.offset)?;
        Ok(Self {
            output: output.clone(),
            cluster_bits,
            order: header.refcount_order,
            table: decode_table(&bytes),
            place,
            unwritten: None,
            blocks: Cache::new(usize::try_from(blocks).unwrap_or(usize::MAX)),
            next: 0,
            cursor: 0,
            _lease: lease,
        })
    }

    /// Returns the number of entries of a refcount block.
    fn block_entries(&self) -> u64 {
        (1 << (self.cluster_bits + 3)) >> self.order
    }

    /// Returns the host offset of the refcount block at `index` of the table; 0 if there is none.
    fn block_offset(&self, index: u64) -> u64 {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        entry.map_or(0, |entry| RefcountTableEntry(*entry).block_offset())
    }

    /// Returns the refcount block at `index` of the table, which exists.
    fn block(&mut self, index: u64) -> Result<&mut Block> {
        if self.blocks.get(&index).is_none() {
            let mut bytes = vec![0; 1 << self.cluster_bits];
            self.output.read_exact_at(&mut bytes, self.block_offset(index))?;
            self.insert(index, Block { bytes, changed: false })?;
        }
        self.blocks.get(&index).ok_or_else(|| Error::limit("a refcount block is missing"))
    }

    fn insert(&mut self, index: u64, block: Block) -> Result<()> {
        if self.blocks.is_full() {
            let older = self.blocks.evict_older_half();
            self.write_blocks(older)?;
        }
        self.blocks.insert(index, block);
        Ok(())
    }

    fn write_blocks(&self, mut blocks: Vec<(u64, Block)>) -> Result<()> {
        blocks.retain(|(_, block)| block.changed);
        blocks.sort_unstable_by_key(|(index, _)| self.block_offset(*index));
        blocks
            .iter()
            .try_for_each(|(index, block)| self.output.write_at(&block.bytes, self.block_offset(*index)))
    }

    /// Returns the refcount of the host cluster at `host_offset`.
    pub fn get(&mut self, host_offset: u64) -> Result<u64> {
        let cluster = host_offset >> self.cluster_bits;
        let (index, within) = (cluster / self.block_entries(), cluster % self.block_entries());
        if self.block_offset(index) == 0 {
            return Ok(0);
        }
        let order = self.order;
        // Less than the entries of a block, at most 2^24.
        Ok(refcount(&self.block(index)?.bytes, order, within as usize))
    }

    /// Removes one reference from each of `clusters`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Corrupt`] if the refcount is 0 already.
    pub fn release(&mut self, clusters: Clusters) -> Result<()> {
        let first = clusters.offset >> self.cluster_bits;
        for cluster in first..first.saturating_add(clusters.count) {
            let host_offset = cluster << self.cluster_bits;
            let count = self.get(host_offset)?.checked_sub(1).ok_or_else(|| {
                Error::corrupt("a cluster in use has a refcount of 0")
                    .path(self.output.location())
                    .at(host_offset)
                    .hint("check the image to list its damage")
            })?;
            self.set(host_offset, count)?;
        }
        Ok(())
    }

    /// Sets the refcount of the host cluster at `host_offset`, which a refcount block counts.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] without that block.
    pub fn set(&mut self, host_offset: u64, count: u64) -> Result<()> {
        let cluster = host_offset >> self.cluster_bits;
        let (entries, order) = (self.block_entries(), self.order);
        if self.block_offset(cluster / entries) == 0 {
            let what = format!("the refcount block of the cluster at {host_offset} is missing");
            return Err(Error::refused(what).path(self.output.location()).hint(NEW_IMAGE));
        }
        let block = self.block(cluster / entries)?;
        set_refcount(&mut block.bytes, order, (cluster % entries) as usize, count);
        block.changed = true;
        Ok(())
    }

    /// Allocates a free cluster with a refcount of one. Returns its host offset.
    pub fn allocate(&mut self) -> Result<u64> {
        loop {
            let (entries, order) = (self.block_entries(), self.order);
            let (index, within) = (self.next / entries, self.next % entries);
            if self.block_offset(index) == 0 {
                self.add_block(index)?;
                continue;
            }
            let block = self.block(index)?;
            let free = (within..entries).find(|entry| refcount(&block.bytes, order, *entry as usize) == 0);
            let Some(free) = free else {
                self.next = (index + 1) * entries;
                continue;
            };
            set_refcount(&mut block.bytes, order, free as usize, 1);
            block.changed = true;
            let cluster = index * entries + free;
            self.next = cluster + 1;
            return self.host_offset(cluster);
        }
    }

    /// Allocates `len` bytes, less than a cluster, for compressed data. Returns their host offset: right after the
    /// latest compressed data where possible. No table of the image refers to that yet.
    pub fn allocate_bytes(&mut self, len: u64) -> Result<u64> {
        let cluster_size = 1u64 << self.cluster_bits;
        let (latest, within) = (self.cursor & !(cluster_size - 1), self.cursor & (cluster_size - 1));
        let available = cluster_size - within;
        if within != 0 && len <= available && self.add_reference(latest)? {
            self.cursor += len;
            return Ok(self.cursor - len);
        }
        let new = self.allocate()?;
        let is_adjacent = within != 0 && len > available && new == latest.saturating_add(cluster_size);
        let start = if is_adjacent && self.add_reference(latest)? { self.cursor } else { new };
        self.cursor = start + len;
        Ok(start)
    }

    /// Adds a reference to the cluster at `host_offset`. Returns false if its refcount is at the maximum.
    fn add_reference(&mut self, host_offset: u64) -> Result<bool> {
        let count = self.get(host_offset)?;
        if count >= max_refcount(self.order) {
            return Ok(false);
        }
        self.set(host_offset, count + 1)?;
        Ok(true)
    }

    /// Returns the host offset of `cluster`, or an error if it does not fit into a table entry.
    fn host_offset(&self, cluster: u64) -> Result<u64> {
        if cluster >= MAX_HOST_OFFSET >> self.cluster_bits {
            return Err(
                Error::limit("the image would be larger than 2^56 bytes").path(self.output.location())
            );
        }
        Ok(cluster << self.cluster_bits)
    }

    /// Adds the missing refcount block at `index` of the table. None of its clusters is in use, so that it
    /// counts itself: its place is the first cluster that the search has not passed.
    fn add_block(&mut self, index: u64) -> Result<()> {
        let entries = self.block_entries();
        let cluster = self.next.max(index * entries);
        self.set_block(index, cluster)?;
        let mut bytes = vec![0; 1 << self.cluster_bits];
        set_refcount(&mut bytes, self.order, (cluster % entries) as usize, 1);
        self.next = cluster + 1;
        self.insert(index, Block { bytes, changed: true })
    }

    /// Stores the place of a new block in the table in memory.
    fn set_block(&mut self, index: u64, cluster: u64) -> Result<()> {
        let host_offset = self.host_offset(cluster)?;
        let too_large = || {
            Error::limit(format!("the image needs a refcount table above {MAX_REFCOUNT_TABLE_BYTES} bytes"))
                .path(self.output.location())
        };
        let at = usize::try_from(index).ok().filter(|at| (*at as u64) < MAX_REFCOUNT_TABLE_BYTES / 8);
        let at = at.ok_or_else(too_large)?;
        if at >= self.table.len() {
            self.table.resize(at + 1, 0);
        }
        self.table[at] = host_offset;
        let (first, last) = self.unwritten.unwrap_or((at, at));
        self.unwritten = Some((first.min(at), last.max(at)));
        Ok(())
    }

    /// Writes all changed refcount blocks.
    pub fn write_changed(&mut self) -> Result<()> {
        let all = self.blocks.drain().collect();
        self.write_blocks(all)
    }

    /// True if the refcount table needs more space than it has.
    fn outgrows_table(&self) -> bool {
        (self.table.len() as u64 * 8) > self.place.count << self.cluster_bits
    }

    /// Allocates `count` adjacent clusters with a refcount of one each.
    pub fn allocate_run(&mut self, count: u64) -> Result<Clusters> {
        let (entries, order) = (self.block_entries(), self.order);
        let mut free = 0;
        for cluster in 0..self.counted_blocks().saturating_mul(entries) {
            let is_free = self.block_offset(cluster / entries) != 0
                && refcount(&self.block(cluster / entries)?.bytes, order, (cluster % entries) as usize) == 0;
            free = if is_free { free + 1 } else { 0 };
            if free == count {
                let offset = self.host_offset(cluster + 1 - count)?;
                for added in 0..count {
                    self.set(offset + (added << self.cluster_bits), 1)?;
                }
                return Ok(Clusters { offset, count });
            }
        }
        self.append(count)
    }

    /// Returns the number of refcount blocks up to the last one.
    fn counted_blocks(&self) -> u64 {
        let last = self.table.iter().rposition(|entry| RefcountTableEntry(*entry).block_offset() != 0);
        last.map_or(0, |last| last as u64 + 1)
    }

    /// Allocates `count` adjacent clusters after all clusters that any block counts, with a refcount of one each.
    fn append(&mut self, count: u64) -> Result<Clusters> {
        let entries = self.block_entries();
        let first_index = self.counted_blocks();
        let first = first_index * entries;
        let mut blocks = 1u64;
        // The blocks count themselves. The number only grows.
        while (blocks + count).div_ceil(entries) > blocks {
            blocks = (blocks + count).div_ceil(entries);
        }
        for number in 0..blocks {
            self.set_block(first_index + number, first + number)?;
            let mut bytes = vec![0; 1 << self.cluster_bits];
            let counted = (blocks + count).saturating_sub(number * entries).min(entries);
            for entry in 0..counted {
                set_refcount(&mut bytes, self.order, entry as usize, 1);
            }
            self.insert(first_index + number, Block { bytes, changed: true })?;
        }
        Ok(Clusters { offset: self.host_offset(first + blocks)?, count })
    }

    /// Moves the refcount table to a larger place. Returns the old one. The caller stores the new place in the
    /// header after [`RefcountEditor::write_table`].
    fn move_table(&mut self) -> Result<Clusters> {
        let mut clusters = 1;
        // The new table also lists the blocks that count it. The number only grows.
        loop {
            let entries = self.block_entries();
            let blocks = clusters / entries + 2;
            let length = self.table.len() as u64 + blocks;
            // Half as much again, so that the next image does not move it at once.
            let bytes = ((length + length / 2) * 8).min(MAX_REFCOUNT_TABLE_BYTES).max(length * 8);
            let needed = bytes.div_ceil(1 << self.cluster_bits);
            if needed <= clusters {
                break;
            }
            clusters = needed;
        }
        let new = self.append(clusters)?;
        self.table.resize(((clusters << self.cluster_bits) / 8) as usize, 0);
        self.unwritten = Some((0, self.table.len() - 1));
        Ok(std::mem::replace(&mut self.place, new))
    }

    /// Makes all new clusters part of the image: writes the refcount blocks, then the table, and stores a new
    /// place of the table in the header. Flushes what precedes each step.
    pub fn commit(&mut self) -> Result<()> {
        let old_table = self.outgrows_table().then(|| self.move_table()).transpose()?;
        self.write_changed()?;
        self.output.sync()?;
        self.write_table()?;
        if let Some(old_table) = old_table {
            self.output.sync()?;
            let mut fields = self.place.offset.to_be_bytes().to_vec();
            // At most 8 MiB of clusters.
            fields.extend_from_slice(&(self.place.count as u32).to_be_bytes());
            self.output.write_at(&fields, REFCOUNT_TABLE_FIELD)?;
            self.output.sync()?;
            self.release(old_table)?;
        }
        Ok(())
    }

    /// Writes the entries of new blocks into the refcount table.
    fn write_table(&mut self) -> Result<()> {
        let Some((first, last)) = self.unwritten.take() else { return Ok(()) };
        let mut bytes = Vec::new();
        encode_table(&self.table[first..=last], &mut bytes);
        self.output.write_at(&bytes, self.place.offset + first as u64 * 8)
    }
}
