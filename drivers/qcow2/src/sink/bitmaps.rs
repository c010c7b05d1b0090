//! Persistent bitmaps of a new image: their tables and bits in the order of the list, then the directory.

use imgtool_core::{Bitmap, Result, zero};

use super::alloc::Allocator;
use super::image::Qcow2Sink;
use crate::layout::bitmap::encode;
use crate::layout::extension::BitmapsExtension;
use crate::layout::table::write_table;

/// Number of entries of a bitmap table that are written at once. Our choice: 64 KiB.
const ENTRIES_PER_WRITE: usize = 8192;

/// Entry of a bitmap table for a cluster of ones. Specification, "Bitmap table".
const ALL_ONES: u64 = 1;

impl Qcow2Sink {
    /// Writes the bitmaps of a disk of `virtual_size` bytes. Returns the place of their directory, if there
    /// are any.
    pub(super) fn write_bitmaps(
        &self,
        virtual_size: u64,
        alloc: &mut Allocator,
    ) -> Result<Option<BitmapsExtension>> {
        let mut directory = Vec::new();
        for bitmap in &self.bitmaps {
            let len = bitmap.byte_len(virtual_size);
            let table_offset = self.write_bitmap(bitmap, len, virtual_size, alloc)?;
            // The source has bounded the length, so the number fits.
            let entries = len.div_ceil(self.cluster_size()) as u32;
            directory.extend(encode(bitmap, table_offset, entries));
        }
        if directory.is_empty() {
            return Ok(None);
        }
        let directory_len = directory.len() as u64;
        let cluster_size = self.cluster_size();
        let directory_offset = alloc.allocate(directory_len.div_ceil(cluster_size))?;
        directory.resize(directory_len.next_multiple_of(cluster_size) as usize, 0);
        write_table(self.output(), &directory, directory_offset)?;
        alloc.write_finished_blocks(self.output())?;
        // The format limits the number to 65535.
        Ok(Some(BitmapsExtension { count: self.bitmaps.len() as u32, directory_len, directory_offset }))
    }

    /// Writes the table and the bits of a bitmap, `len` bytes. Returns the host offset of the table. Clusters
    /// of zeros and of ones are not stored.
    fn write_bitmap(&self, bitmap: &Bitmap, len: u64, size: u64, alloc: &mut Allocator) -> Result<u64> {
        let cluster_size = self.cluster_size();
        let clusters = len.div_ceil(cluster_size);
        let table_clusters = (clusters * 8).div_ceil(cluster_size).max(1);
        let table_offset = alloc.allocate(table_clusters)?;
        alloc.write_finished_blocks(self.output())?;
        let mut entries: Vec<u8> = Vec::new();
        let mut written = table_offset;
        // A cluster has at most 2 MiB.
        let mut bits = vec![0; cluster_size as usize];
        for cluster in 0..clusters {
            let start = cluster * cluster_size;
            let (used, padding) = bits.split_at_mut((len - start).min(cluster_size) as usize);
            bitmap.content.read_at(used, start)?;
            padding.fill(0);
            if cluster + 1 == clusters {
                clear_after_end(used, size.div_ceil(bitmap.granularity));
            }
            let entry = if zero::is_zero(&bits) {
                0
            } else if bits.iter().all(|byte| *byte == 0xff) {
                ALL_ONES
            } else {
                let offset = alloc.allocate(1)?;
                self.output().write_at(&bits, offset)?;
                alloc.write_finished_blocks(self.output())?;
                offset
            };
            entries.extend_from_slice(&entry.to_be_bytes());
            if entries.len() == ENTRIES_PER_WRITE * 8 {
                write_table(self.output(), &entries, written)?;
                written += entries.len() as u64;
                entries.clear();
            }
        }
        let table_end = table_offset + table_clusters * cluster_size;
        // Less than what is written at once, or than a cluster.
        entries.resize((table_end - written) as usize, 0);
        write_table(self.output(), &entries, written)?;
        Ok(table_offset)
    }
}

/// Clears the bits of the last byte behind the last of `count` bits. Readers disagree about them.
fn clear_after_end(bytes: &mut [u8], count: u64) {
    if let Some(last) = bytes.last_mut()
        && !count.is_multiple_of(8)
    {
        *last &= (1 << (count % 8)) - 1;
    }
}
