//! [`Sectors`], the parts of a disk that are looked at, read from an open disk or kept from a stream
//! ([`Glimpse`]).

use std::collections::BTreeMap;

use imgtool_core::sync::lock;
use imgtool_core::{Access, BufferPool, Disk, Error, ImageSource, Result};

use crate::partitions::{PartitionTable, SECTOR_SIZES};

/// The bytes of a disk.
pub trait Sectors {
    /// Returns the size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `start`. All of them are on the disk.
    ///
    /// # Errors
    /// Any error of reading the disk.
    fn read(&self, buf: &mut [u8], start: u64) -> Result<()>;
}

impl Sectors for Disk {
    fn size(&self) -> u64 {
        Disk::size(self)
    }

    fn read(&self, buf: &mut [u8], start: u64) -> Result<()> {
        self.read_at(buf, start)
    }
}

/// Number of bytes that are kept of the start and of the end of a disk. Our limit: they contain the tables.
const ENDS: u64 = 64 << 10;

/// Length in bytes of a kept block.
const BLOCK: u64 = 4096;

/// The parts of a disk in a stream that are looked at: its start, its end, and the first block of each
/// partition. Everything else reads as zeros.
#[derive(Debug)]
pub struct Glimpse {
    size: u64,
    /// Blocks with data, by their number. At most 32 for the ends, and one for each partition.
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Numbers of the first blocks of the partitions, once the start is known.
    wanted: Vec<u64>,
}

impl Glimpse {
    /// Reads the stream of an image with a single device to its end.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] for an image of several devices or of unknown size; any error
    /// of reading the stream.
    pub fn read(image: &dyn ImageSource) -> Result<Self> {
        let device = image.info().single("an image that is read in one pass")?;
        let Access::Stream(stream) = image.access() else {
            return Err(Error::usage("an image that is read by position needs no glimpse"));
        };
        if device.open_ended {
            return Err(Error::unsupported("the size of the disk is known only at the end of its stream"));
        }
        let size = device.size;
        let mut glimpse = Self { size, blocks: BTreeMap::new(), wanted: Vec::new() };
        let mut stream = lock(stream);
        let pool = BufferPool::new();
        let mut knows_start = false;
        while let Some(piece) = stream.next_piece(&pool)? {
            if let Some(data) = &piece.data {
                glimpse.keep(piece.start, data);
            }
            if !knows_start && piece.end() >= ENDS.min(size) {
                knows_start = true;
                glimpse.want_partitions()?;
                // The piece may contain the start of a partition as well.
                if let Some(data) = &piece.data {
                    glimpse.keep(piece.start, data);
                }
            }
        }
        Ok(glimpse)
    }

    fn want_partitions(&mut self) -> Result<()> {
        for sector_size in SECTOR_SIZES {
            let table = PartitionTable::read(self, sector_size)?;
            let starts = table.into_iter().flat_map(|table| table.partitions);
            self.wanted.extend(starts.map(|partition| partition.start / BLOCK));
        }
        Ok(())
    }

    /// Keeps what is needed of a part of the disk.
    fn keep(&mut self, start: u64, data: &[u8]) {
        let end = start.saturating_add(data.len() as u64);
        let tail = self.size.saturating_sub(ENDS) / BLOCK;
        let mut at = start;
        while at < end {
            let block = at / BLOCK;
            let next = (block + 1).saturating_mul(BLOCK).min(end);
            if block < ENDS / BLOCK || block >= tail || self.wanted.contains(&block) {
                let kept = self.blocks.entry(block).or_insert_with(|| vec![0; BLOCK as usize]);
                // Both are within a block, and within the data.
                let (to, from, len) = ((at % BLOCK) as usize, (at - start) as usize, (next - at) as usize);
                kept[to..to + len].copy_from_slice(&data[from..from + len]);
            }
            at = next;
        }
    }
}

impl Sectors for Glimpse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], start: u64) -> Result<()> {
        for (index, byte) in (0u64..).zip(buf.iter_mut()) {
            let at = start.saturating_add(index);
            let block = self.blocks.get(&(at / BLOCK));
            *byte = block.and_then(|block| block.get((at % BLOCK) as usize)).copied().unwrap_or(0);
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A disk in memory.
    pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

    impl Sectors for Bytes<'_> {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn read(&self, buf: &mut [u8], start: u64) -> Result<()> {
            let start = usize::try_from(start).unwrap();
            buf.copy_from_slice(&self.0[start..start + buf.len()]);
            Ok(())
        }
    }

    #[test]
    fn both_ends_are_kept_and_the_middle_is_not() {
        let disk: Vec<u8> = (0..400_000u32).map(|at| (at / 7) as u8 | 1).collect();
        let mut glimpse = Glimpse { size: disk.len() as u64, blocks: BTreeMap::new(), wanted: vec![40] };
        for (index, part) in disk.chunks(10_007).enumerate() {
            glimpse.keep(index as u64 * 10_007, part);
        }
        for (start, is_kept) in
            [(0, true), (60_000, true), (40 * 4096, true), (200_000, false), (390_000, true)]
        {
            let mut found = [0; 512];
            glimpse.read(&mut found, start).unwrap();
            let start = usize::try_from(start).unwrap();
            assert_eq!(found == disk[start..start + 512], is_kept, "{start}");
        }
        assert!(glimpse.blocks.len() <= 34);
    }
}
