//! Backing image of a new image. The new image stores only its differences from the backing image.

use std::ops::Range;

use imgtool_core::{Disk, Result, zero};

/// Backing image, or `None` if the caller did not open it. Its content is then unknown, so the new image
/// stores everything, zeros included.
pub struct Base(pub Option<Disk>);

impl Base {
    /// Returns the guest offset in `range` up to which the backing image reads as zeros: `range.start` if its
    /// content is unknown, `range.end` if the whole range reads as zeros.
    pub fn zeros_until(&self, range: Range<u64>) -> Result<u64> {
        let Some(disk) = &self.0 else { return Ok(range.start) };
        let mut reached = range.start;
        while reached < range.end.min(disk.size()) {
            for extent in disk.extents(reached..range.end.min(disk.size()))? {
                if extent.is_data() {
                    return Ok(reached);
                }
                reached = extent.end();
            }
        }
        Ok(range.end)
    }

    /// Returns true if the backing image reads as `expected` from the guest offset `start` on, with zeros
    /// behind, for the length of `scratch`.
    pub fn matches(&self, start: u64, expected: &[u8], scratch: &mut [u8]) -> Result<bool> {
        let Some(disk) = &self.0 else { return Ok(false) };
        let covered = disk.size().saturating_sub(start).min(scratch.len() as u64);
        // `covered` is at most the length of `scratch`.
        let (known, beyond) = scratch.split_at_mut(covered as usize);
        beyond.fill(0);
        if !known.is_empty() {
            disk.read_at(known, start)?;
        }
        Ok(scratch.starts_with(expected) && zero::is_zero(&scratch[expected.len()..]))
    }
}
