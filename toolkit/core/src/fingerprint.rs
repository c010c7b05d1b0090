//! [`Fingerprint`] of a guest's content, summed by many threads in any order.
//!
//! Sinks derive the identifiers of a new image from it and from the image's parameters: the same content and
//! parameters give the same identifiers, and different content almost certainly gives different ones. Each 4 KiB
//! unit that is not all zeros is hashed with XXH3, and the hash is multiplied by a weight derived from the
//! unit's index. The fingerprint is the sum of these products, so it does not depend on the order in which
//! pieces are added, their size or the number of threads. It is not cryptographic: an attacker can construct
//! different disks with the same fingerprint.

use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_128;
use uuid::Uuid;

use crate::zero::ZERO_GRANULARITY;

/// The running sum; the two halves of the 128-bit hashes are summed separately.
#[derive(Debug, Default)]
pub struct Fingerprint {
    low: AtomicU64,
    high: AtomicU64,
}

impl Fingerprint {
    /// Adds the content at `guest_offset`, a multiple of 4 KiB. The caller must omit units of zeros.
    pub fn add(&self, guest_offset: u64, bytes: &[u8]) {
        let (mut low, mut high) = (0u64, 0u64);
        let first_unit = guest_offset / ZERO_GRANULARITY as u64;
        for (index, unit) in (first_unit..).zip(bytes.chunks(ZERO_GRANULARITY)) {
            let hash = XxHash3_128::oneshot(unit);
            // The weight is odd, so multiplying by it modulo 2^64 loses no information.
            let weight = index.wrapping_mul(2).wrapping_add(1);
            low = low.wrapping_add((hash as u64).wrapping_mul(weight));
            high = high.wrapping_add(((hash >> 64) as u64).wrapping_mul(weight));
        }
        self.low.fetch_add(low, Ordering::Relaxed);
        self.high.fetch_add(high, Ordering::Relaxed);
    }

    /// Returns a name as parameters of [`Self::guid`], for images that differ in nothing else.
    pub fn parameters_of(name: &str) -> Vec<u64> {
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word: u64, byte| word << 8 | u64::from(*byte));
        name.as_bytes().chunks(8).map(word).collect()
    }

    /// Derives the GUID for `purpose` in a file with these parameters. It is a version 8 UUID (RFC 9562),
    /// whose content the application defines.
    pub fn guid(&self, purpose: &str, parameters: &[u64]) -> Uuid {
        let mut bytes = purpose.as_bytes().to_vec();
        for half in [self.low.load(Ordering::Relaxed), self.high.load(Ordering::Relaxed)] {
            bytes.extend_from_slice(&half.to_le_bytes());
        }
        for parameter in parameters {
            bytes.extend_from_slice(&parameter.to_le_bytes());
        }
        Uuid::new_v8(XxHash3_128::oneshot(&bytes).to_be_bytes())
    }
}
