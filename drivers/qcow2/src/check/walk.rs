//! Walk over all tables of an image: counts the references to each cluster and reports damaged entries.

use imgtool_core::{Error, Result};

use super::references::{Checker, L2Use};
use crate::encryption::MAX_CRYPTO_HEADER;
use crate::layout::SECTOR;
use crate::layout::entry::{L1Entry, L2Entry, Subclusters};
use crate::layout::table::{decode_table, read_zero_filled};
use crate::refcounts::Refcount;

/// Maximum number of L1 entries in the active state and all snapshots. Our limit, which bounds time and
/// memory: a disk of 64 TiB with clusters of 64 KiB and a hundred snapshots has fewer.
const MAX_L1_ENTRIES: u64 = 16 << 20;

/// Length in bytes of one read of a bitmap table. Our choice.
const BITMAP_TABLE_STEP: u64 = 1 << 20;

/// Bits 9-55 of a bitmap table entry: a host offset. Specification, "Bitmap table".
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Maximum size in bytes of all bitmap tables together. Our limit: a bitmap of 64 TiB with a granularity of
/// 64 KiB has a table of 2 MiB with the smallest clusters.
const MAX_BITMAP_TABLE_BYTES: u64 = 1 << 30;

/// Maximum number of distinct L2 tables. Our limit: a disk of 64 TiB with clusters of 64 KiB has 2^17.
const MAX_L2_TABLES: usize = 5 << 20;

impl Checker<'_> {
    /// Walks over all tables once and counts the references to the clusters of the current window, the part
    /// of the file whose counters are in memory.
    pub(super) fn walk(&mut self) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        let header = self.header.clone();
        self.count(0, cluster_size, 1);
        self.count(header.refcount_table_offset, u64::from(header.refcount_table_clusters) * cluster_size, 1);
        if let Some((offset, len)) = header.extensions.crypto_header {
            if len > MAX_CRYPTO_HEADER {
                return Err(Error::limit(format!(
                    "the encryption header has {len} bytes, above {MAX_CRYPTO_HEADER}"
                )));
            }
            self.count(offset, len.checked_next_multiple_of(cluster_size).unwrap_or(u64::MAX), 1);
        }
        self.count(header.snapshots_offset, self.snapshots.len, 1);
        self.walk_bitmaps()?;
        self.walk_l1_tables()?;
        for (index, block) in self.refcounts.blocks(self.file_clusters) {
            self.count(block, cluster_size, 1);
            // All other references are counted by now. A refcount block must have only this one.
            let uses = self.counted(block);
            if uses.is_some_and(|uses| uses > 1) {
                self.report.corruption(format!(
                    "ERROR refcount block {index} is used {} times, at {block}",
                    uses.unwrap_or(0)
                ));
            }
        }
        Ok(())
    }

    /// Counts the references to the bitmap directory, the bitmap tables and the bitmap data.
    fn walk_bitmaps(&mut self) -> Result<()> {
        if self.bitmaps.is_empty() {
            return Ok(());
        }
        if let Some(pointer) = self.header.extensions.bitmaps {
            self.count(pointer.directory_offset, pointer.directory_len, 1);
        }
        let cluster_size = self.header.shape.cluster_size();
        let mut total = 0;
        for (table_offset, entries) in self.bitmaps.clone() {
            let len = u64::from(entries) * 8;
            total += len;
            if total > MAX_BITMAP_TABLE_BYTES {
                return Err(Error::limit(format!(
                    "the bitmap tables have more than {MAX_BITMAP_TABLE_BYTES} bytes"
                )));
            }
            self.count(table_offset, len, 1);
            let mut done = 0;
            while done < len {
                let step = (len - done).min(BITMAP_TABLE_STEP);
                let step_offset = table_offset.saturating_add(done);
                done += step;
                if self.is_hole(step_offset, step)? {
                    continue;
                }
                // `count` has reported a table that extends past the end of the file by a cluster or more.
                let Ok(bytes) = self.input.read_vec(step_offset, step as usize) else { break };
                for entry in decode_table(&bytes) {
                    let host_offset = entry & BITMAP_OFFSET_MASK;
                    if host_offset != 0 {
                        self.count(host_offset, cluster_size, 1);
                    }
                }
            }
        }
        Ok(())
    }

    /// True if the `len` bytes at `host_offset` are a hole in the file or beyond its end. A table there is
    /// empty, so the caller need not read it: crafted images have large tables that are mostly holes.
    fn is_hole(&self, host_offset: u64, len: u64) -> Result<bool> {
        if host_offset >= self.input.len() {
            return Ok(true);
        }
        let run = self.input.run(host_offset)?;
        Ok(!run.is_data && run.end >= host_offset.saturating_add(len).min(self.input.len()))
    }

    /// Counts the references to the L1 tables of the active state and all snapshots, their L2 tables, and the
    /// clusters of those. Walks each L2 table only once, even if several L1 entries refer to it.
    fn walk_l1_tables(&mut self) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        let active = (self.header.l1_offset, self.header.l1_entries);
        let snapshots = self.snapshots.l1_tables.clone();
        let all = std::iter::once((active, true)).chain(snapshots.into_iter().map(|table| (table, false)));
        let mut total = 0;
        for ((l1_offset, entries), active) in all {
            total += u64::from(entries);
            if total > MAX_L1_ENTRIES {
                return Err(Error::limit(format!("there are more than {MAX_L1_ENTRIES} L1 entries")));
            }
            self.count(l1_offset, u64::from(entries) * 8, 1);
            if self.first_walk {
                self.walk_l1(l1_offset, entries, active)?;
            }
        }
        let tables = std::mem::take(&mut self.l2_tables);
        for table in &tables {
            self.count(table.host_offset, cluster_size, table.references);
            self.walk_l2(table)?;
        }
        self.l2_tables = tables;
        Ok(())
    }

    /// Collects the L2 tables of an L1 table, of the active state if `active`, and reports damaged entries.
    fn walk_l1(&mut self, l1_offset: u64, entries: u32, active: bool) -> Result<()> {
        let cluster_size = self.header.shape.cluster_size();
        // `check_table` has bounded the length to 32 MiB.
        let len = usize::try_from(u64::from(entries) * 8).unwrap_or(usize::MAX);
        if self.is_hole(l1_offset, len as u64)? {
            return Ok(());
        }
        let bytes = read_zero_filled(&self.input, l1_offset, len)?;
        let mut found = Vec::new();
        for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let entry = L1Entry(u64::from_be_bytes(*entry));
            // As in qemu-img, a nonzero entry without an offset refers to a table at host offset 0.
            if entry.0 == 0 {
                continue;
            }
            let l2_offset = entry.l2_offset();
            if entry.reserved() != 0 {
                self.report
                    .corruption(format!("ERROR L1 entry {index} has reserved bits set: {:x}", entry.0));
            }
            if !l2_offset.is_multiple_of(cluster_size) {
                self.report.corruption(format!(
                    "ERROR L1 entry {index}: the L2 table at {l2_offset} is not cluster aligned"
                ));
            }
            if active {
                self.check_copied(1, l2_offset, entry.is_copied(), || format!("L2 table: l1_index={index}"))?;
            }
            found.push(L2Use { host_offset: l2_offset, references: 1, active_references: u32::from(active) });
        }
        drop(bytes);
        self.l2_tables.append(&mut found);
        self.l2_tables.sort_unstable_by_key(|table| table.host_offset);
        self.l2_tables.dedup_by(|next, first| {
            let same = next.host_offset == first.host_offset;
            if same {
                first.references = first.references.saturating_add(next.references);
                first.active_references = first.active_references.saturating_add(next.active_references);
            }
            same
        });
        if self.l2_tables.len() > MAX_L2_TABLES {
            return Err(Error::limit(format!("there are more than {MAX_L2_TABLES} L2 tables")));
        }
        Ok(())
    }

    /// Reports a copied flag (bit 63) that contradicts the refcount, as `times` corruptions. The flag must be
    /// set if and only if the refcount is one.
    fn check_copied(
        &mut self,
        times: u32,
        host_offset: u64,
        copied: bool,
        what: impl Fn() -> String,
    ) -> Result<()> {
        if !self.first_walk {
            return Ok(());
        }
        let cluster = host_offset >> self.header.shape.cluster_bits;
        if let Refcount::Known(refcount) = self.refcounts.get(cluster)?
            && (refcount == 1) != copied
        {
            self.refcount_faults += u64::from(times);
            self.corruption(times, format!("ERROR OFLAG_COPIED {} refcount={refcount}", what()));
        }
        Ok(())
    }

    /// Counts the references from one L2 table to clusters.
    fn walk_l2(&mut self, table: &L2Use) -> Result<()> {
        let shape = self.header.shape;
        // Host offset of the next cluster in an unfragmented image; 0 before the first cluster.
        let mut expected = 0;
        if self.is_hole(table.host_offset, shape.cluster_size())? {
            return Ok(());
        }
        // At most 2 MiB. `count` has reported a table beyond the end of the file.
        let bytes = read_zero_filled(&self.input, table.host_offset, shape.cluster_size() as usize)?;
        let words = decode_table(&bytes);
        for pair in words.chunks_exact(shape.l2_entry_words()) {
            let entry = L2Entry(pair[0]);
            let subclusters = pair.get(1).map(|bitmap| Subclusters(*bitmap));
            if entry.is_compressed() {
                if let Some(bitmap) = subclusters.filter(|bitmap| bitmap.0 != 0) {
                    if self.first_walk {
                        self.corruption(
                            table.references,
                            format!(
                                "ERROR compressed cluster {:x}: its subcluster allocation bitmap is {:x}, not 0",
                                entry.0, bitmap.0
                            ),
                        );
                    }
                    continue;
                }
                self.walk_compressed(entry, table);
            } else {
                self.walk_standard(entry, subclusters, table, &mut expected)?;
            }
        }
        Ok(())
    }

    /// Counts the references to the host clusters of a compressed cluster and reports damage to its entry.
    fn walk_compressed(&mut self, entry: L2Entry, table: &L2Use) {
        let range = entry.compressed_range(self.header.shape);
        if self.first_walk {
            if self.external_data {
                self.corruption(
                    table.references,
                    format!(
                        "ERROR compressed cluster at {}: the image has an external data file",
                        range.host_offset
                    ),
                );
            }
            if entry.is_copied() {
                self.corruption(
                    table.references,
                    format!(
                        "ERROR compressed cluster at {}: the copied flag must never be set",
                        range.host_offset
                    ),
                );
            }
            if table.active_references > 0 {
                let times = u64::from(table.active_references);
                *self.report.allocated_clusters.get_or_insert(0) += times;
                *self.report.compressed_clusters.get_or_insert(0) += times;
                // Like qemu-img, count every compressed cluster as fragmented.
                *self.report.fragmented_clusters.get_or_insert(0) += times;
            }
        }
        // A compressed cluster occupies whole sectors.
        let start = range.host_offset - range.host_offset % SECTOR;
        self.count(start, range.host_offset - start + range.max_len, table.references);
    }

    /// Counts the references to an uncompressed cluster and reports damage to its entry. `expected` is the
    /// host offset of the next cluster in an unfragmented image.
    fn walk_standard(
        &mut self,
        entry: L2Entry,
        subclusters: Option<Subclusters>,
        table: &L2Use,
        expected: &mut u64,
    ) -> Result<()> {
        let host = entry.host_offset();
        let has_host = host != 0 || (self.external_data && entry.is_copied());
        if self.header.version < 3 && entry.reads_as_zeros() {
            self.v2_zero_cluster.get_or_insert(entry);
        }
        if self.first_walk {
            self.report_standard_entry(entry, subclusters, has_host, table.references);
        }
        if !has_host {
            return Ok(());
        }
        if self.first_walk {
            self.report_host_cluster(host, table, expected);
        }
        if self.external_data {
            self.check_copied_in_data_file(entry, table);
            return Ok(());
        }
        if table.active_references > 0 {
            self.check_copied(table.active_references, host, entry.is_copied(), || {
                format!("data cluster: l2_entry={:x}", entry.0)
            })?;
        }
        self.count(host, self.header.shape.cluster_size(), table.references);
        Ok(())
    }

    /// Reports reserved bits that are set, and a subcluster bitmap that is invalid or contradicts the entry.
    fn report_standard_entry(
        &mut self,
        entry: L2Entry,
        subclusters: Option<Subclusters>,
        has_host: bool,
        times: u32,
    ) {
        if entry.reserved() != 0 {
            self.corruption(times, format!("ERROR L2 entry has reserved bits set: {:x}", entry.0));
        }
        if let Some(bitmap) = subclusters
            && (bitmap.is_invalid() || (bitmap.any_allocated() && !has_host))
        {
            self.corruption(
                times,
                format!("ERROR L2 entry {:x}: invalid subcluster allocation bitmap {:x}", entry.0, bitmap.0),
            );
        }
    }

    /// Reports a host cluster that is not aligned. Adds a cluster of the active state to the totals and sets
    /// `expected` to its end.
    fn report_host_cluster(&mut self, host: u64, table: &L2Use, expected: &mut u64) {
        let cluster_size = self.header.shape.cluster_size();
        if table.active_references > 0 {
            let times = u64::from(table.active_references);
            *self.report.allocated_clusters.get_or_insert(0) += times;
            if *expected != 0 && *expected != host {
                *self.report.fragmented_clusters.get_or_insert(0) += times;
            }
            *expected = host.saturating_add(cluster_size);
        }
        if !host.is_multiple_of(cluster_size) {
            self.corruption(
                table.references,
                format!("ERROR data cluster at {host} is not properly aligned"),
            );
        }
    }

    /// Reports an active entry without the copied flag, which every cluster in a data file must have.
    fn check_copied_in_data_file(&mut self, entry: L2Entry, table: &L2Use) {
        if self.first_walk && table.active_references > 0 && !entry.is_copied() {
            self.corruption(
                table.active_references,
                format!("ERROR OFLAG_COPIED data cluster: l2_entry={:x}", entry.0),
            );
            self.refcount_faults += u64::from(table.active_references);
        }
    }
}
