//! What salvage could not restore of a device that is read at random.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::device::DeviceId;
use crate::error::Error;
use crate::source::Loss;

/// Ours: ranges that are kept one by one; beyond that neighbours are joined to one range.
const MAX_RANGES: usize = 65_536;

/// Guest ranges that were filled with zeros, by start.
#[derive(Debug, Default)]
pub struct Losses(Mutex<BTreeMap<u64, (u64, String)>>);

impl Losses {
    /// Notes a range; one that is read again is noted once.
    pub fn add(&self, guest: Range<u64>, why: &Error) {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let full = ranges.len() >= MAX_RANGES;
        let reason = why.message().to_owned();
        let before = ranges.range_mut(..=guest.start).next_back();
        if let Some((_, (end, known))) = before
            && (*end >= guest.end || *end >= guest.start && *known == reason || full)
        {
            *end = guest.end.max(*end);
            return;
        }
        ranges.insert(guest.start, (guest.end, reason));
    }

    /// All ranges, ascending.
    pub fn list(&self, device: DeviceId) -> Vec<Loss> {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges
            .iter()
            .map(|(start, (end, reason))| Loss { device, guest: *start..*end, reason: reason.clone() })
            .collect()
    }
}
