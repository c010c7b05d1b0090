//! Lookup of guest ranges: the BAT and the sector bitmaps determine the origin of every byte.

use imgtool_core::layered::{Origin, Segment, StoredBytes};
use imgtool_core::{Error, Remedy, Result};

use crate::image::{DISK_NAME, Image};
use crate::layout::bat::{
    BatEntry, ENTRY_LEN, PayloadState, SECTOR_BITMAP_LEN, SECTORS_PER_BITMAP, SectorBitmapState,
};

impl Image {
    /// Looks up the segment at `guest_offset`, at most `max_len` bytes of it.
    ///
    /// # Errors
    /// If the BAT entry or the sector bitmap of the payload block can't be read or is not valid. If
    /// it is not valid, the error contains the block's guest range.
    pub(super) fn look_up(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let shape = &self.shape;
        let payload_block = guest_offset / shape.block_size;
        let entry_at = self.regions.bat.file_offset + shape.payload_bat_index(payload_block) * ENTRY_LEN;
        let page = self.file.table_page(entry_at)?;
        if page.is_zero() {
            // All entries in this page of the BAT are zero, so none of their blocks is present.
            let next = (page.end() - self.regions.bat.file_offset) / ENTRY_LEN;
            let end = shape.payload_block_from(next).saturating_mul(shape.block_size);
            let len = end.saturating_sub(guest_offset).min(max_len);
            return Ok(Segment { len, origin: self.not_present() });
        }
        let entry = BatEntry(page.u64_at(entry_at));
        let len = self.to_block_end(guest_offset, max_len);
        let origin = match entry.payload_state() {
            PayloadState::NotPresent => self.not_present(),
            PayloadState::Zero => Origin::Zero,
            PayloadState::Undefined | PayloadState::Unmapped => Origin::Hole,
            PayloadState::FullyPresent => {
                let block_at = self.check_block(payload_block, entry)?;
                stored_at(block_at + guest_offset % shape.block_size)
            }
            PayloadState::PartiallyPresent if self.metadata.has_parent => {
                let block_at = self.check_block(payload_block, entry)?;
                return self.partial_segment(payload_block, block_at, guest_offset, len);
            }
            PayloadState::PartiallyPresent => {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed("the block is partially present, but the disk has no parent"),
                ));
            }
            PayloadState::Reserved(state) => {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed(format!("the BAT entry has the reserved state {state}")),
                ));
            }
        };
        Ok(Segment { len, origin })
    }

    /// Returns the number of bytes from `guest_offset` to the end of its payload block, at most `max_len`.
    pub(super) fn to_block_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let block_size = self.shape.block_size;
        (block_size - guest_offset % block_size).min(max_len)
    }

    /// Returns the origin of a block that is not present in this file.
    fn not_present(&self) -> Origin {
        if self.metadata.has_parent { Origin::Parent } else { Origin::Hole }
    }

    /// Checks a present block and returns its file offset. The block must not overlap the file's structures,
    /// and the file must contain the bytes that the guest uses; it may end within the disk's last block.
    fn check_block(&self, payload_block: u64, entry: BatEntry) -> Result<u64> {
        let file_offset = entry.file_offset();
        let guest_start = payload_block * self.shape.block_size;
        let used = self.shape.block_size.min(self.metadata.virtual_size.saturating_sub(guest_start));
        for (name, region) in self.reserved_regions() {
            if region.overlaps(file_offset, used) {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed(format!("the block at {file_offset} overlaps the file's {name}"))
                        .at(file_offset),
                ));
            }
        }
        if file_offset.checked_add(used).is_none_or(|end| end > self.file.len()) {
            return Err(self.block_error(
                payload_block,
                Error::corrupt(format!(
                    "the block needs {used} bytes at {file_offset}, but the file ends at {}",
                    self.file.len()
                ))
                .at(file_offset)
                .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())),
            ));
        }
        Ok(file_offset)
    }

    /// Looks up the run of sectors that starts at `guest_offset` and has equal bits in the sector bitmap, at
    /// most `max_len` bytes of it. `block_at` is the file offset of the payload block.
    fn partial_segment(
        &self,
        payload_block: u64,
        block_at: u64,
        guest_offset: u64,
        max_len: u64,
    ) -> Result<Segment> {
        let bitmap_at = self.check_sector_bitmap(payload_block)?;
        let sector_size = self.shape.logical_sector_size;
        let end = guest_offset + max_len;
        // Keep the page: the bits of neighbouring sectors are usually in the same page.
        let mut page = self.file.table_page(bitmap_at)?;
        let mut is_here = |sector: u64| -> Result<bool> {
            let bit = sector % SECTORS_PER_BITMAP;
            let byte_at = bitmap_at + bit / 8;
            if !page.contains(byte_at) {
                page = self.file.table_page(byte_at)?;
            }
            Ok(page.byte_at(byte_at) >> (bit % 8) & 1 == 1)
        };
        let first_sector = guest_offset / sector_size;
        let here = is_here(first_sector)?;
        let mut sector = first_sector + 1;
        while sector * sector_size < end && is_here(sector)? == here {
            sector += 1;
        }
        let len = (sector * sector_size).min(end) - guest_offset;
        let origin =
            if here { stored_at(block_at + guest_offset % self.shape.block_size) } else { Origin::Parent };
        Ok(Segment { len, origin })
    }

    /// Checks the sector bitmap of a partially present block and returns the bitmap's file offset.
    fn check_sector_bitmap(&self, payload_block: u64) -> Result<u64> {
        let entry = self.bat_entry(self.shape.sector_bitmap_bat_index(payload_block))?;
        let bitmap_at = entry.file_offset();
        if entry.sector_bitmap_state() != SectorBitmapState::Present {
            return Err(self.block_error(
                payload_block,
                Error::malformed("the block is partially present, but its sector bitmap is missing"),
            ));
        }
        let bitmap_end = bitmap_at.checked_add(SECTOR_BITMAP_LEN);
        if bitmap_end.is_none_or(|end| end > self.file.len()) || bitmap_at == 0 {
            return Err(self.block_error(
                payload_block,
                Error::corrupt(format!(
                    "the sector bitmap at {bitmap_at} is not inside the file, which ends at {}",
                    self.file.len()
                )),
            ));
        }
        Ok(bitmap_at)
    }

    /// Adds the file, the device and the block's guest range to an error, and the file offset of the block's
    /// BAT entry if the error has no file offset.
    fn block_error(&self, payload_block: u64, error: Error) -> Error {
        let start = payload_block * self.shape.block_size;
        let end = start.saturating_add(self.shape.block_size).min(self.metadata.virtual_size);
        let entry_at = self.regions.bat.file_offset + self.shape.payload_bat_index(payload_block) * ENTRY_LEN;
        error.path(self.file.location()).device(DISK_NAME).guest(start..end).at(entry_at)
    }
}

/// Returns the origin of bytes in the image's only file.
fn stored_at(file_offset: u64) -> Origin {
    Origin::File { index: 0, file_offset }
}
