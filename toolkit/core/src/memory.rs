//! [`Memory`], the ledger of a run's memory, from which every part of the run borrows.
//!
//! One limit bounds all parts together: a part cannot have a budget of its own, since a hostile image may need
//! several of them at once. There are two kinds of loan:
//!
//! * A [`Lease`] is taken when a part learns what it needs: a decoder reads the size of its window, an index
//!   grows, a copy starts its workers. The ledger refuses a lease beyond the limit, and the error names a
//!   limit that would suffice.
//! * A share is apportioned before a run starts, by [`shares`]. Tables of an image decide its layout, so their
//!   memory must follow from the limit and the number of images, not from what happens to be free.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::remedy::Remedy;
use crate::sync::lock;

/// Default limit in bytes. Our limit: the programs that the toolkit replaces run beside guests.
pub const DEFAULT_LIMIT: u64 = 256 << 20;

/// Minimum limit in bytes: the smallest for which one worker can copy pieces of any format.
pub const MIN_LIMIT: u64 = 64 << 20;

/// Part of the limit that the ledger does not lend, in bytes: program, libraries, the main stack, small
/// allocations, and what the allocator keeps after a part has freed it. Measured: 8 to 20 MiB.
const OVERHEAD: u64 = 24 << 20;

/// Memory in bytes without which no copy starts. Our limit: one worker with pieces of the usual size.
pub const COPY_FLOOR: u64 = 16 << 20;

/// Memory in bytes that a run usually needs beside the part that the ledger refuses: workers, their compressors,
/// caches. Our choice, so that a limit suffices that a refusal names.
const REST: u64 = 32 << 20;

/// Divisor of the limit: all tables of all outputs together may take an eighth. With the default limit, that
/// leaves space for a zstd window of 128 MiB and 64 MiB of incomplete clusters.
const TABLES_DIVISOR: u64 = 8;

/// Ledger of the memory of one run. Cloning gives another handle to the same ledger.
#[derive(Clone)]
pub struct Memory {
    ledger: Arc<Ledger>,
    /// Number of images that share the memory for caches.
    images: u64,
}

struct Ledger {
    limit: u64,
    /// Number of bytes lent.
    lent: Mutex<u64>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("limit", &self.limit()).field("free", &self.free()).finish()
    }
}

impl Memory {
    /// Creates a ledger for at most `limit` bytes of resident memory; at least [`MIN_LIMIT`].
    pub fn new(limit: u64) -> Self {
        let ledger = Ledger { limit: limit.max(MIN_LIMIT), lent: Mutex::new(0) };
        Self { ledger: Arc::new(ledger), images: 1 }
    }

    /// Returns the limit in bytes.
    pub fn limit(&self) -> u64 {
        self.ledger.limit
    }

    /// Returns the number of bytes that the ledger can still lend.
    pub fn free(&self) -> u64 {
        self.lendable().saturating_sub(*lock(&self.ledger.lent))
    }

    /// Returns a handle for an image that shares the memory for caches with other images, `images` in all.
    #[must_use]
    pub fn shared_by(&self, images: usize) -> Self {
        Self { ledger: Arc::clone(&self.ledger), images: (images as u64).max(1) }
    }

    /// Returns the part of `most` bytes that a cache of one image may take.
    pub fn cache_share(&self, most: u64) -> u64 {
        most / self.images
    }

    /// Returns the maximum total size in bytes of the tables of all outputs.
    pub fn tables(&self) -> u64 {
        self.limit() / TABLES_DIVISOR
    }

    /// Lends `bytes` bytes for `purpose`, which the error names ("a zstd window of 128 MiB").
    ///
    /// # Errors
    /// [`crate::ErrorKind::LimitExceeded`] with [`Remedy::AllowMemory`] if less is free.
    pub fn lease(&self, bytes: u64, purpose: impl fmt::Display) -> Result<Lease> {
        self.try_lease(bytes).ok_or_else(|| self.refusal(bytes, purpose))
    }

    /// Lends `bytes` bytes; returns `None` if less is free.
    pub fn try_lease(&self, bytes: u64) -> Option<Lease> {
        let mut lent = lock(&self.ledger.lent);
        let sum = lent.checked_add(bytes).filter(|sum| *sum <= self.lendable())?;
        *lent = sum;
        Some(Lease { memory: self.clone(), bytes })
    }

    /// Returns the error for `bytes` more bytes than the ledger can lend. It names a limit that leaves space for
    /// the tables of the outputs, which grow with the limit, and for a copy. Later parts of the run may still
    /// need more: a decoder shows what the layer below it needs only when it runs.
    pub fn refusal(&self, bytes: u64, purpose: impl fmt::Display) -> Error {
        let lent = self.lendable().saturating_sub(self.free());
        let others = lent.saturating_add(bytes).saturating_add(OVERHEAD + REST);
        let needed = others.saturating_add(others / (TABLES_DIVISOR - 1));
        let needed = needed.checked_next_multiple_of(MIB).unwrap_or(u64::MAX);
        let limit = self.limit() / MIB;
        Error::limit(format!("not enough memory for {purpose} within the limit of {limit} MiB"))
            .remedied_by(Remedy::AllowMemory { bytes: needed })
    }

    fn lendable(&self) -> u64 {
        self.limit() - OVERHEAD
    }
}

const MIB: u64 = 1 << 20;

/// Memory on loan, returned when dropped.
#[derive(Debug)]
pub struct Lease {
    memory: Memory,
    bytes: u64,
}

impl Lease {
    /// Returns the size of the loan in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Raises the loan to `bytes`; does nothing if it is as large already.
    ///
    /// # Errors
    /// Same as [`Memory::lease`].
    pub fn raise(&mut self, bytes: u64, purpose: impl fmt::Display) -> Result<()> {
        let more = bytes.saturating_sub(self.bytes);
        let mut loan = self.memory.lease(more, purpose)?;
        self.bytes += std::mem::take(&mut loan.bytes);
        Ok(())
    }

    /// Like [`Lease::raise`]; returns false if less is free.
    pub fn try_raise(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let Some(mut loan) = self.memory.try_lease(more) else { return false };
        self.bytes += std::mem::take(&mut loan.bytes);
        true
    }

    /// Lowers the loan to `bytes`; does nothing if it is as small already.
    pub fn lower(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        let mut lent = lock(&self.memory.ledger.lent);
        *lent = lent.saturating_sub(less);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.lower(0);
    }
}

/// Memory for the tables of a new image, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableMemory {
    /// Minimum with which the driver can write the image.
    pub least: u64,
    /// Maximum that the driver can use.
    pub most: u64,
}

/// Returns the share of each image in `total` bytes: an equal part, or the image's minimum or maximum if that
/// part is out of its bounds. The shares depend on nothing else, so equal requests give equal layouts.
pub fn shares(total: u64, images: &[TableMemory]) -> Vec<u64> {
    let equal = total / (images.len() as u64).max(1);
    images.iter().map(|image| equal.clamp(image.least, image.most.max(image.least))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn lends_up_to_the_limit_and_names_the_limit_that_would_suffice() {
        let memory = Memory::new(100 << 20);
        assert_eq!(memory.free(), 76 << 20);
        let first = memory.lease(70 << 20, "a window").expect("free");
        let error = memory.lease(10 << 20, "a window").expect_err("6 MiB are left");
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        assert_eq!(error.remedy(), Some(&Remedy::AllowMemory { bytes: 156 << 20 }));
        drop(first);
        assert_eq!(memory.free(), 76 << 20);
    }

    #[test]
    fn a_lease_grows_and_shrinks() {
        let memory = Memory::new(100 << 20);
        let mut lease = memory.lease(1 << 20, "an index").expect("free");
        lease.raise(50 << 20, "an index").expect("free");
        lease.raise(10 << 20, "an index").expect("larger already");
        assert_eq!((lease.bytes(), memory.free()), (50 << 20, 26 << 20));
        assert!(!lease.try_raise(77 << 20));
        lease.lower(5 << 20);
        assert_eq!(memory.free(), 71 << 20);
    }

    #[test]
    fn shares_are_equal_within_the_bounds_of_each_image() {
        let image = |least, most| TableMemory { least, most };
        assert_eq!(shares(64, &[image(1, 16)]), [16]);
        assert_eq!(shares(64, &[image(1, 16), image(40, 90), image(2, 64)]), [16, 40, 21]);
        assert_eq!(shares(64, &[image(0, 0); 3]), [0; 3]);
        assert_eq!(shares(64, &[]), [0; 0]);
    }
}
