//! A fingerprint of the content, gathered by many threads in any order.
//!
//! GUIDs of a new file are made from it, so that the same content gives the same file and different
//! content different GUIDs. Each unit of 4 KiB that is not zero is hashed with XXH3; the hashes are
//! weighted with the unit's number and summed: a sum does not depend on order, threads or how the
//! content was cut into pieces. It tells disks apart, it does not resist somebody who wants two disks
//! to look the same.

use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_toolkit::zero::ZERO_GRANULARITY;
use twox_hash::XxHash3_128;
use uuid::Uuid;

/// The sum so far, in two halves that are summed on their own.
#[derive(Debug, Default)]
pub(crate) struct Fingerprint {
    low: AtomicU64,
    high: AtomicU64,
}

impl Fingerprint {
    /// Adds a run of content: `bytes` at `guest_offset`, a multiple of 4 KiB, without units that are
    /// zero throughout.
    pub(crate) fn add(&self, guest_offset: u64, bytes: &[u8]) {
        let (mut low, mut high) = (0u64, 0u64);
        let first = guest_offset / ZERO_GRANULARITY as u64;
        for (number, unit) in (first..).zip(bytes.chunks(ZERO_GRANULARITY)) {
            let hash = XxHash3_128::oneshot(unit);
            // Odd weights lose nothing in a product modulo 2^64.
            let weight = number.wrapping_mul(2).wrapping_add(1);
            low = low.wrapping_add((hash as u64).wrapping_mul(weight));
            high = high.wrapping_add(((hash >> 64) as u64).wrapping_mul(weight));
        }
        self.low.fetch_add(low, Ordering::Relaxed);
        self.high.fetch_add(high, Ordering::Relaxed);
    }

    /// A GUID for `purpose`, in a file with these parameters. Version 8 of RFC 9562: made by a rule of
    /// one's own.
    pub(crate) fn guid(&self, purpose: &str, parameters: &[u64]) -> Uuid {
        let mut bytes = purpose.as_bytes().to_vec();
        for number in [self.low.load(Ordering::Relaxed), self.high.load(Ordering::Relaxed)] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for number in parameters {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        Uuid::new_v8(XxHash3_128::oneshot(&bytes).to_be_bytes())
    }
}
