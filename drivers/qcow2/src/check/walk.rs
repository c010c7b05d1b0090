//! Everything that refers to a cluster.

use std::collections::HashMap;

use imgtool_toolkit::{Error, Result};

use super::Checker;
use crate::layout::SECTOR;
use crate::layout::decode_table;
use crate::layout::entry::{L1Entry, L2Entry, Subclusters};
use crate::refcounts::Refcount;

/// L1 entries looked at over all snapshots. Ours: bounds time and memory; a disk of 64 TiB with a
/// hundred snapshots stays below.
const MAX_L1_ENTRIES: u64 = 16 << 20;

/// Longest encryption header that is counted. Ours: LUKS headers have a few MiB; a crafted one is as long
/// as a sparse file may be.
const MAX_CRYPTO_HEADER: u64 = 256 << 20;

/// Bytes of a bitmap table read at once. Ours.
const BITMAP_TABLE_STEP: u64 = 1 << 20;

/// Bits 9-55 of a bitmap table entry: a host cluster.
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// How often an L2 table is referred to.
#[derive(Default, Clone, Copy)]
struct L2Use {
    references: u32,
    /// By the active state too: only there bit 63 must be right.
    active: bool,
}

impl Checker {
    /// One walk over all tables.
    pub(super) fn walk(&mut self) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        let header = self.header.clone();
        self.count(0, cluster_size, 1);
        self.count(header.refcount_table_offset, u64::from(header.refcount_table_clusters) * cluster_size, 1);
        if let Some((offset, len)) = header.extensions.crypto_header {
            if len > MAX_CRYPTO_HEADER {
                return Err(Error::limit(format!(
                    "the encryption header has {len} bytes, at most {MAX_CRYPTO_HEADER} are looked at"
                )));
            }
            self.count(offset, len.checked_next_multiple_of(cluster_size).unwrap_or(u64::MAX), 1);
        }
        self.count(header.snapshots_offset, self.snapshots.len, 1);
        self.walk_bitmaps()?;
        self.walk_l1_tables()?;
        let blocks = self.refcounts.blocks(self.file_clusters);
        let mut seen = HashMap::new();
        for (index, block) in blocks {
            self.count(block, cluster_size, 1);
            let uses: &mut u32 = seen.entry(block).or_default();
            *uses += 1;
            if self.first_walk && *uses > 1 {
                self.report
                    .corruption(format!("ERROR refcount block {index} is used {uses} times, at {block}"));
            }
        }
        Ok(())
    }

    fn walk_bitmaps(&mut self) -> Result<()> {
        if self.bitmaps.is_empty() {
            return Ok(());
        }
        if let Some(pointer) = self.header.extensions.bitmaps {
            self.count(pointer.directory_offset, pointer.directory_len, 1);
        }
        let cluster_size = self.header.shape.cluster_size();
        for bitmap in self.bitmaps.clone() {
            let len = u64::from(bitmap.table_entries) * 8;
            self.count(bitmap.table_offset, len, 1);
            let mut done = 0;
            while done < len {
                let step = (len - done).min(BITMAP_TABLE_STEP);
                let at = bitmap.table_offset.saturating_add(done);
                // What is beyond the end has been reported.
                let Ok(bytes) = self.input.read_vec(at, step as usize) else { break };
                for entry in decode_table(&bytes) {
                    let offset = entry & BITMAP_OFFSET_MASK;
                    if offset != 0 {
                        self.count(offset, cluster_size, 1);
                    }
                }
                done += step;
            }
        }
        Ok(())
    }

    /// The L1 tables of the active state and of all snapshots. L2 tables are walked once each,
    /// however many L1 entries refer to them.
    fn walk_l1_tables(&mut self) -> Result<()> {
        let mut uses: HashMap<u64, L2Use> = HashMap::new();
        let mut order = Vec::new();
        let mut total = u64::from(self.header.l1_entries);
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries);
        self.count(offset, u64::from(entries) * 8, 1);
        self.walk_l1(offset, entries, true, &mut uses, &mut order)?;
        for snapshot in self.snapshots.snapshots.clone() {
            total += u64::from(snapshot.l1_entries);
            if total > MAX_L1_ENTRIES {
                return Err(Error::limit(format!(
                    "the snapshots have more than {MAX_L1_ENTRIES} L1 entries"
                )));
            }
            self.count(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8, 1);
            self.walk_l1(snapshot.l1_offset, snapshot.l1_entries, false, &mut uses, &mut order)?;
        }
        for offset in order {
            if let Some(known) = uses.get(&offset) {
                self.walk_l2(offset, *known)?;
            }
        }
        Ok(())
    }

    fn walk_l1(
        &mut self,
        offset: u64,
        entries: u32,
        active: bool,
        uses: &mut HashMap<u64, L2Use>,
        order: &mut Vec<u64>,
    ) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        // The header's check bounds it to 32 MiB.
        let len = usize::try_from(u64::from(entries) * 8).unwrap_or(usize::MAX);
        let bytes = match self.input.read_vec(offset, len) {
            Ok(bytes) => bytes,
            Err(e) if active => return Err(e),
            // Counting it has reported it already.
            Err(_) => return Ok(()),
        };
        for (index, entry) in decode_table(&bytes).into_iter().map(L1Entry).enumerate() {
            let l2_offset = entry.l2_offset();
            if l2_offset == 0 {
                continue;
            }
            if self.first_walk && entry.reserved() != 0 {
                self.report
                    .corruption(format!("ERROR L1 entry {index} has reserved bits set: {:x}", entry.0));
            }
            if active {
                self.check_copied(l2_offset, entry.is_copied(), || format!("L2 table: l1_index={index}"))?;
            }
            self.count(l2_offset, cluster_size, 1);
            if !l2_offset.is_multiple_of(cluster_size) {
                if self.first_walk {
                    self.report.corruption(format!(
                        "ERROR L1 entry {index}: the L2 table at {l2_offset} is not cluster aligned"
                    ));
                }
                continue;
            }
            let known = uses.entry(l2_offset).or_insert_with(|| {
                order.push(l2_offset);
                L2Use::default()
            });
            known.references = known.references.saturating_add(1);
            known.active |= active;
        }
        Ok(())
    }

    /// Bit 63 must say whether the refcount is one.
    fn check_copied(&mut self, host_offset: u64, copied: bool, what: impl Fn() -> String) -> Result<()> {
        if !self.first_walk {
            return Ok(());
        }
        let cluster = host_offset >> self.header.shape.cluster_bits;
        if let Refcount::Known(refcount) = self.refcounts.get(cluster)?
            && (refcount == 1) != copied
        {
            self.report.corruption(format!("ERROR OFLAG_COPIED {} refcount={refcount}", what()));
        }
        Ok(())
    }

    /// One L2 table.
    fn walk_l2(&mut self, offset: u64, known: L2Use) -> Result<()> {
        let shape = self.header.shape;
        // Where the next cluster would be if nothing were fragmented.
        let mut expected = 0;
        // At most 2 MiB. What is beyond the end has been reported.
        let Ok(bytes) = self.input.read_vec(offset, shape.cluster_size() as usize) else { return Ok(()) };
        let words = decode_table(&bytes);
        for pair in words.chunks_exact(shape.l2_entry_words()) {
            let entry = L2Entry(pair[0]);
            let subclusters = pair.get(1).map(|bitmap| Subclusters(*bitmap));
            if entry.is_compressed() {
                self.walk_compressed(entry, known);
            } else {
                self.walk_standard(entry, subclusters, known, &mut expected)?;
            }
        }
        Ok(())
    }

    fn walk_compressed(&mut self, entry: L2Entry, known: L2Use) {
        let place = entry.compressed_place(self.header.shape);
        if self.first_walk {
            if self.external_data {
                self.report.corruption(format!(
                    "ERROR compressed cluster at {}: the image has an external data file",
                    place.host_offset
                ));
            }
            if entry.is_copied() {
                self.report.corruption(format!(
                    "ERROR compressed cluster at {}: the copied flag must never be set",
                    place.host_offset
                ));
            }
            if known.active {
                *self.report.allocated_clusters.get_or_insert(0) += 1;
                *self.report.compressed_clusters.get_or_insert(0) += 1;
                // Compressed clusters are fragmented by nature.
                *self.report.fragmented_clusters.get_or_insert(0) += 1;
            }
        }
        // Whole sectors are referred to.
        let start = place.host_offset - place.host_offset % SECTOR;
        self.count(start, place.host_offset - start + place.max_len, known.references);
    }

    fn walk_standard(
        &mut self,
        entry: L2Entry,
        subclusters: Option<Subclusters>,
        known: L2Use,
        expected: &mut u64,
    ) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        let host = entry.host_offset();
        if self.first_walk && entry.reserved() != 0 {
            self.report.corruption(format!("ERROR L2 entry has reserved bits set: {:x}", entry.0));
        }
        let has_host = host != 0 || (self.external_data && entry.is_copied());
        if self.first_walk
            && let Some(bitmap) = subclusters
        {
            if bitmap.is_invalid() || (bitmap.any_allocated() && !has_host) {
                self.report.corruption(format!(
                    "ERROR L2 entry {:x}: invalid subcluster allocation bitmap {:x}",
                    entry.0, bitmap.0
                ));
            }
            if entry.reads_as_zeros() {
                self.report.corruption(format!(
                    "ERROR L2 entry {:x}: the zero flag is set in an image with subclusters",
                    entry.0
                ));
            }
        }
        if !has_host {
            return Ok(());
        }
        if self.first_walk {
            if known.active {
                *self.report.allocated_clusters.get_or_insert(0) += 1;
                if *expected != 0 && *expected != host {
                    *self.report.fragmented_clusters.get_or_insert(0) += 1;
                }
                *expected = host.saturating_add(cluster_size);
            }
            if !host.is_multiple_of(cluster_size) {
                self.report.corruption(format!("ERROR data cluster at {host} is not properly aligned"));
            }
        }
        if self.external_data {
            if self.first_walk && known.active && !entry.is_copied() {
                self.report.corruption(format!("ERROR OFLAG_COPIED data cluster: l2_entry={:x}", entry.0));
            }
            return Ok(());
        }
        if known.active {
            self.check_copied(host, entry.is_copied(), || format!("data cluster: l2_entry={:x}", entry.0))?;
        }
        self.count(host, cluster_size, known.references);
        Ok(())
    }
}
