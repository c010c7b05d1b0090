//! [`Losses`], a thread-safe list of the guest ranges that salvage could not restore.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use crate::device::DeviceId;
use crate::error::Error;
use crate::source::{Loss, LossClass};
use crate::sync::lock;

/// Maximum number of separate ranges. Beyond it, a new range extends the one before it, including the gap
/// between them. Our limit: bounds the memory for a badly damaged image.
const MAX_RANGES: usize = 65_536;

/// A lost range, without its start.
#[derive(Debug)]
struct Lost {
    end: u64,
    reason: String,
    offset: Option<u64>,
}

/// Lost guest ranges of one device, in bytes, by their start.
#[derive(Debug, Default)]
pub struct Losses(Mutex<BTreeMap<u64, Lost>>);

impl Losses {
    /// Adds a range. A range that is already in the list, because a caller read it again, is not added twice.
    pub fn add(&self, guest: Range<u64>, why: &Error) {
        let mut ranges = lock(&self.0);
        let full = ranges.len() >= MAX_RANGES;
        let reason = match why.io_error() {
            Some(cause) => format!("can't {}: {cause}", why.message()),
            None => why.message().to_owned(),
        };
        let before = ranges.range_mut(..=guest.start).next_back();
        if let Some((_, before)) = before
            && (before.end >= guest.end || before.end >= guest.start && before.reason == reason || full)
        {
            before.end = guest.end.max(before.end);
            return;
        }
        ranges.insert(guest.start, Lost { end: guest.end, reason, offset: why.file_offset() });
    }

    /// True if all of `guest` is known to be lost.
    pub fn cover(&self, guest: &Range<u64>) -> bool {
        let ranges = lock(&self.0);
        ranges.range(..=guest.start).next_back().is_some_and(|(_, lost)| lost.end >= guest.end)
    }

    /// Returns all ranges in ascending order, as losses of `device`.
    pub fn list(&self, device: DeviceId) -> Vec<Loss> {
        let ranges = lock(&self.0);
        ranges
            .iter()
            .map(|(start, lost)| Loss {
                class: LossClass::Lost,
                offset: lost.offset,
                device,
                guest: *start..lost.end,
                reason: lost.reason.clone(),
            })
            .collect()
    }
}
