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

    /// Returns all ranges in ascending order, as losses of `device`. Joins ranges with the same reason that
    /// threads added out of order.
    pub fn list(&self, device: DeviceId) -> Vec<Loss> {
        let mut list: Vec<Loss> = Vec::new();
        for (start, lost) in lock(&self.0).iter() {
            match list.last_mut().filter(|last| last.guest.end >= *start && last.reason == lost.reason) {
                Some(last) => last.guest.end = last.guest.end.max(lost.end),
                None => list.push(Loss {
                    class: LossClass::Lost,
                    offset: lost.offset,
                    device,
                    guest: *start..lost.end,
                    reason: lost.reason.clone(),
                }),
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_ranges_that_were_added_out_of_order() {
        let losses = Losses::default();
        let lost = Error::corrupt("the file ends early");
        for range in [4096..8192, 0..4096, 16384..20480] {
            losses.add(range, &lost);
        }
        losses.add(8192..12288, &Error::corrupt("another reason"));
        let ranges: Vec<Range<u64>> = losses.list(DeviceId(0)).into_iter().map(|loss| loss.guest).collect();
        assert_eq!(ranges, [0..8192, 8192..12288, 16384..20480]);
    }
}
