//! [`Losses`], a thread-safe list of the guest ranges that salvage could not restore or verify.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use crate::device::DeviceId;
use crate::error::Error;
use crate::source::{Loss, LossClass};
use crate::sync::lock;

/// Maximum number of separate ranges of a class. Beyond it, a new range is joined with a neighbour, including
/// the gap between them. Our limit: bounds the memory for a badly damaged image.
const MAX_RANGES: usize = 65_536;

/// End of the reason of a range that was joined over a gap.
const INTACT_PARTS: &str = ", with intact parts in between";

/// Damaged guest ranges of one device, in bytes.
#[derive(Debug, Default)]
pub struct Losses(Mutex<Classes>);

#[derive(Debug, Default)]
struct Classes {
    lost: Ranges,
    unverified: Ranges,
}

impl Losses {
    /// Adds a range that reads as zeros. A range that is already in the list, because a caller read it again, is
    /// not added twice.
    pub fn add(&self, guest: Range<u64>, why: &Error) {
        lock(&self.0).lost.add(guest, why);
    }

    /// Adds a range that was restored, but may be wrong.
    pub fn add_unverified(&self, guest: Range<u64>, why: &Error) {
        lock(&self.0).unverified.add(guest, why);
    }

    /// True if all of `guest` is known to be lost. False for the intact bytes between two lost ranges, also if
    /// the list has joined these; some of the lost bytes of such a pair are then unknown too.
    pub fn cover(&self, guest: &Range<u64>) -> bool {
        lock(&self.0).lost.cover(guest)
    }

    /// Returns all ranges in ascending order, as losses of `device`. Joins ranges with the same reason that
    /// threads added out of order.
    pub fn list(&self, device: DeviceId) -> Vec<Loss> {
        let classes = lock(&self.0);
        let mut list = classes.lost.list(LossClass::Lost, device);
        list.extend(classes.unverified.list(LossClass::Unverified, device));
        list.sort_by_key(|loss| loss.guest.start);
        list
    }
}

/// Ranges of one class, by their start.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, Damaged>);

/// A damaged range, without its start.
#[derive(Debug)]
struct Damaged {
    end: u64,
    reason: String,
    offset: Option<u64>,
    compressed_offset: Option<u64>,
    /// The part that was added last, if intact bytes are between the parts; `None` if all of the range is
    /// damaged.
    latest: Option<Range<u64>>,
}

impl Ranges {
    fn add(&mut self, guest: Range<u64>, why: &Error) {
        let full = self.0.len() >= MAX_RANGES;
        let reason = match why.io_error() {
            Some(cause) => format!("can't {}: {cause}", why.message()),
            None => why.message().to_owned(),
        };
        let (offset, compressed_offset) = (why.file_offset(), why.compressed_offset());
        let mut new = Damaged { end: guest.end, reason, offset, compressed_offset, latest: None };
        match self.0.range_mut(..=guest.start).next_back() {
            Some((_, before)) if before.takes(&guest, &new.reason) || full => return before.join(guest),
            Some(_) => {}
            None if full => {
                // All ranges are behind the new one.
                if let Some((start, next)) = self.0.pop_first() {
                    new.latest = (next.latest.is_some() || guest.end < start).then(|| guest.clone());
                    new.end = new.end.max(next.end);
                }
            }
            None => {}
        }
        self.0.insert(guest.start, new);
    }

    fn cover(&self, guest: &Range<u64>) -> bool {
        let before = self.0.range(..=guest.start).next_back();
        before.is_some_and(|(_, range)| match &range.latest {
            Some(latest) => latest.start <= guest.start && guest.end <= latest.end,
            None => guest.end <= range.end,
        })
    }

    fn list(&self, class: LossClass, device: DeviceId) -> Vec<Loss> {
        let mut list: Vec<Loss> = Vec::new();
        for (start, range) in &self.0 {
            let mut reason = range.reason.clone();
            if range.latest.is_some() {
                reason += INTACT_PARTS;
            }
            match list.last_mut().filter(|last| last.guest.end >= *start && last.reason == reason) {
                Some(last) => last.guest.end = last.guest.end.max(range.end),
                None => {
                    let (offset, compressed_offset) = (range.offset, range.compressed_offset);
                    let guest = *start..range.end;
                    list.push(Loss { class, offset, compressed_offset, device, guest, reason });
                }
            }
        }
        list
    }
}

impl Damaged {
    /// True if `guest`, which starts in or behind this range, belongs to it.
    fn takes(&self, guest: &Range<u64>, reason: &str) -> bool {
        self.end >= guest.end || self.end >= guest.start && self.reason == reason
    }

    fn join(&mut self, guest: Range<u64>) {
        let end = self.end.max(guest.end);
        if self.latest.is_some() || self.end < guest.start {
            self.latest = Some(guest);
        }
        self.end = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(losses: &Losses) -> Vec<Range<u64>> {
        losses.list(DeviceId(0)).into_iter().map(|loss| loss.guest).collect()
    }

    #[test]
    fn joins_ranges_that_were_added_out_of_order() {
        let losses = Losses::default();
        let lost = Error::corrupt("the file ends early");
        for range in [4096..8192, 0..4096, 16384..20480] {
            losses.add(range, &lost);
        }
        losses.add(8192..12288, &Error::corrupt("another reason"));
        assert_eq!(ranges(&losses), [0..8192, 8192..12288, 16384..20480]);
    }

    /// Every other unit is lost, also far beyond the limit: the list is bounded and contains every lost byte, but
    /// no intact unit counts as lost.
    #[test]
    fn a_full_list_covers_no_intact_range() {
        let losses = Losses::default();
        let (lost, units) = (Error::corrupt("the file ends early"), 70_000_u64);
        let unit = |index: u64| index * 4096..(index + 1) * 4096;
        for index in 1..units {
            losses.add(unit(2 * index), &lost);
            // A unit that failed at last is not tried again.
            assert!(losses.cover(&unit(2 * index)));
        }
        // The range before all others.
        losses.add(unit(0), &lost);
        assert!(losses.cover(&unit(0)));
        for index in 0..units {
            assert!(!losses.cover(&unit(2 * index + 1)), "{index}");
        }
        let list = losses.list(DeviceId(0));
        assert_eq!(list.len(), MAX_RANGES);
        assert_eq!((list[0].guest.start, list[MAX_RANGES - 1].guest.end), (0, unit(2 * units - 2).end));
        assert_eq!(list[1].reason, "the file ends early");
        assert_eq!(list[MAX_RANGES - 1].reason, "the file ends early, with intact parts in between");
        let listed = |start: u64| list.iter().any(|loss| loss.guest.contains(&start));
        assert!((0..units).step_by(997).all(|index| listed(unit(2 * index).start)));
    }

    #[test]
    fn an_unverified_range_is_not_lost() {
        let losses = Losses::default();
        losses.add_unverified(0..8192, &Error::corrupt("a wrong checksum"));
        assert!(!losses.cover(&(0..4096)));
        losses.add(0..4096, &Error::corrupt("the file ends early"));
        assert!(losses.cover(&(0..4096)) && !losses.cover(&(4096..8192)));
        let list = losses.list(DeviceId(0));
        let found: Vec<_> = list.into_iter().map(|loss| (loss.class, loss.guest)).collect();
        assert_eq!(found, [(LossClass::Lost, 0..4096), (LossClass::Unverified, 0..8192)]);
    }
}
