//! Memory of a new image: how much its tables need, and how they divide their share.
//!
//! The division decides when tables leave memory, and so their places in the file. It depends on the options,
//! the size of the disk and the share alone.

use imgtool_core::TableMemory;

use super::alloc::BATCH_BYTES;
use crate::layout::MAX_REFCOUNT_TABLE_BYTES;
use crate::options::WriteOptions;

/// Maximum size in bytes of the L2 tables in memory. Our limit: with clusters of 64 KiB, these tables map
/// 128 GiB of disk before one is written early.
const OPEN_BYTES: u64 = 16 << 20;

/// Unit in bytes in which memory becomes resident.
const PAGE: u64 = 4096;

/// Division of an image's share of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Division {
    /// Maximum number of L2 tables in memory.
    pub(super) open_tables: usize,
    /// Length in bytes of a batch of refcount blocks.
    pub(super) batch: usize,
}

/// Sizes of the tables of a disk, in bytes.
struct Sizes {
    /// L1 table, and the offsets of the refcount blocks.
    fixed: u64,
    /// One L2 table. The only table of a small disk counts only as far as the disk reaches.
    l2_table: u64,
    /// All L2 tables, at most [`OPEN_BYTES`].
    l2_tables: u64,
    refcount_block: u64,
    /// The longest batch of refcount blocks.
    batch: u64,
    /// The refcounts of all clusters of the image.
    refcounts: u64,
}

impl Sizes {
    /// `virtual_size` is `None` if it is unknown until the source ends.
    fn new(options: &WriteOptions, virtual_size: Option<u64>) -> Self {
        let (shape, refcount_order) = (options.shape, options.refcount_order);
        // An encryption header is at most 3 MiB, of which the material of one slot is in memory.
        let header = options.encryption.map_or(0, |volume| volume.payload_offset());
        let cluster_size = shape.cluster_size();
        let tables = virtual_size.map(|size| shape.l1_entries(size));
        let entries = |size: u64| size.div_ceil(cluster_size) * shape.l2_entry_words() as u64 * 8;
        let l2_table = match virtual_size {
            Some(size) if shape.l1_entries(size) <= 1 => entries(size).min(cluster_size),
            _ => cluster_size,
        };
        // A refcount block of this many clusters has an entry of 8 bytes; the image may be a little longer.
        let block_entries = (cluster_size * 8) >> refcount_order;
        let blocks = virtual_size.map_or(0, |size| size.div_ceil(cluster_size) / block_entries + 1);
        Self {
            fixed: header / 4 + tables.unwrap_or(0) * 8 + (blocks * 8).min(MAX_REFCOUNT_TABLE_BYTES),
            l2_table,
            l2_tables: tables
                .map_or(OPEN_BYTES, |tables| tables.saturating_mul(l2_table).min(OPEN_BYTES))
                .max(l2_table),
            refcount_block: cluster_size,
            batch: (BATCH_BYTES as u64).max(cluster_size),
            // The tables add less than a hundredth to the data, and a few clusters.
            refcounts: virtual_size.map_or(u64::MAX, |size| {
                let clusters = size.div_ceil(cluster_size) + header.div_ceil(cluster_size);
                ((clusters + clusters / 64 + 64) << refcount_order).div_ceil(8).next_multiple_of(PAGE)
            }),
        }
    }

    /// Memory of the refcounts: a batch waits while compressed data may be added to its clusters.
    fn pending_refcounts(&self, batch: u64) -> u64 {
        batch.saturating_mul(2).min(self.refcounts)
    }
}

/// Returns the memory for the tables of a disk. `is_linear` is true if every cluster has its place from the
/// start, so that the tables are only written at the end.
pub(super) fn table_memory(
    options: &WriteOptions,
    virtual_size: Option<u64>,
    is_linear: bool,
) -> TableMemory {
    if virtual_size.is_some_and(|size| options.check_size(size).is_err()) {
        // No memory suffices for this image; creating it fails.
        return TableMemory::default();
    }
    let sizes = Sizes::new(options, virtual_size);
    if is_linear {
        let all = sizes.fixed.saturating_add(sizes.pending_refcounts(sizes.batch));
        return TableMemory { least: all, most: all };
    }
    let sum = |refcounts, tables| sizes.fixed.saturating_add(sizes.pending_refcounts(refcounts) + tables);
    TableMemory { least: sum(sizes.refcount_block, sizes.l2_table), most: sum(sizes.batch, sizes.l2_tables) }
}

/// Divides the `share` of an image in bytes; `None` for as much as it can use.
pub(super) fn divide(options: &WriteOptions, virtual_size: Option<u64>, share: Option<u64>) -> Division {
    let sizes = Sizes::new(options, virtual_size);
    let most = table_memory(options, virtual_size, false).most;
    let rest = share.unwrap_or(most).min(most).saturating_sub(sizes.fixed);
    let full = sizes.pending_refcounts(sizes.batch) + sizes.l2_tables;
    let batch = if rest >= full {
        sizes.batch
    } else {
        // An eighth of the share is for refcounts; at least one block.
        let part = rest / 8 / 2;
        (part - part % sizes.refcount_block).clamp(sizes.refcount_block, sizes.batch)
    };
    let tables = rest.saturating_sub(sizes.pending_refcounts(batch)) / sizes.l2_table.max(1);
    Division { open_tables: usize::try_from(tables).unwrap_or(usize::MAX).max(1), batch: batch as usize }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use imgtool_core::{CreateOptions, OptionValues};

    use super::*;
    use crate::options::OPTIONS;

    const GIB: Option<u64> = Some(1 << 30);

    fn options(pairs: &[(&str, &str)]) -> WriteOptions {
        let values: OptionValues = OptionValues::parse("qcow2", OPTIONS, pairs.iter().copied()).unwrap();
        WriteOptions::parse(&CreateOptions { values, ..CreateOptions::default() }).unwrap()
    }

    #[test]
    fn a_single_image_keeps_sixteen_mebibytes_of_tables() {
        for (cluster, tables) in [("512", 32_768), ("64k", 256), ("2M", 8)] {
            let options = options(&[("cluster_size", cluster)]);
            for share in [None, Some(u64::MAX), Some(table_memory(&options, None, false).most)] {
                assert_eq!(divide(&options, None, share).open_tables, tables, "{cluster}");
                assert_eq!(
                    divide(&options, None, share).batch,
                    BATCH_BYTES.max(options.shape.cluster_size() as usize)
                );
            }
        }
    }

    #[test]
    fn a_small_disk_needs_little() {
        let small = options(&[]);
        let memory = table_memory(&small, GIB, false);
        assert!(memory.most < 1 << 20, "{memory:?}");
        // One table of 2 MiB would describe 512 GiB.
        let memory = table_memory(&options(&[("cluster_size", "2M")]), GIB, false);
        assert_eq!(memory.least, 8 + 8 + 512 * 8 + PAGE);
    }

    #[test]
    fn the_least_share_is_one_table_and_one_block() {
        let options = options(&[]);
        let least = table_memory(&options, Some(1 << 40), false).least;
        assert!(least < 256 << 10, "{least}");
        assert_eq!(
            divide(&options, Some(1 << 40), Some(least)),
            Division { open_tables: 1, batch: 64 << 10 }
        );
    }
}
