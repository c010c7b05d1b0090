//! Counting of all differences between two disks.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use imgtool_core::sync::{into_inner, lock};

/// Unit in bytes of the comparison: equal units are skipped, and ranges with a smaller gap between them count
/// as one. Our choice: a sector, the smallest unit that a guest writes.
const SECTOR: u64 = 512;

/// Maximum number of ranges that are kept. Our limit: each worker has some for its piece, at most 1 MiB.
/// Further ones are joined with the one before them.
const MAX_RANGES: usize = 1 << 14;

/// Differences between two disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Number of bytes that differ.
    pub bytes: u64,
    /// Ranges that differ, ascending: from the first byte that differs to the last one, by their start. Two
    /// ranges are a sector apart, or more.
    pub ranges: BTreeMap<u64, u64>,
}

impl Differences {
    /// Returns the ranges, ascending.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<u64>> {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    /// Compares two contents that begin at the guest offset `start`. `None` is zeros of any length.
    pub(super) fn compare(&mut self, start: u64, ours: Option<&[u8]>, theirs: Option<&[u8]>) {
        let len = ours.or(theirs).map_or(0, <[u8]>::len);
        let zeros = [0; SECTOR as usize];
        // The range that grows: joining each byte would take a search for each.
        let mut run: Option<Range<u64>> = None;
        let mut at = 0;
        while at < len {
            let end = len.min(at + SECTOR as usize);
            let a = ours.map_or(&zeros[..end - at], |bytes| &bytes[at..end]);
            let b = theirs.map_or(&zeros[..end - at], |bytes| &bytes[at..end]);
            if a != b {
                let differ = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b).map(|(index, _)| index);
                for index in differ {
                    let place = start + (at + index) as u64;
                    self.bytes += 1;
                    match &mut run {
                        Some(run) if place < run.end.saturating_add(SECTOR) => run.end = place + 1,
                        _ => run.replace(place..place + 1).into_iter().for_each(|run| self.join(run)),
                    }
                }
            }
            at = end;
        }
        run.into_iter().for_each(|run| self.join(run));
    }

    /// Adds a range, and joins it with near ones.
    fn join(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if let Some((near, far)) = self.ranges.range(..=start).next_back().map(|(near, far)| (*near, *far))
            && (far.saturating_add(SECTOR) > start || self.ranges.len() >= MAX_RANGES)
        {
            (start, end) = (near, end.max(far));
        }
        let limit = end.saturating_add(SECTOR);
        while let Some((near, far)) =
            self.ranges.range(start + 1..limit).next().map(|(near, far)| (*near, *far))
        {
            end = end.max(far);
            self.ranges.remove(&near);
        }
        self.ranges.insert(start, end);
    }
}

/// Collector for several pairs of disks and threads.
pub(super) struct Tally(Vec<Mutex<Differences>>);

impl Tally {
    pub(super) fn new(pairs: usize) -> Self {
        Self((0..pairs).map(|_| Mutex::default()).collect())
    }

    /// Adds the differences in a part of a pair.
    pub(super) fn add(&self, pair: usize, found: &Differences) {
        if found.bytes == 0 {
            return;
        }
        let mut all = lock(&self.0[pair]);
        all.bytes += found.bytes;
        found.ranges().for_each(|range| all.join(range));
    }

    pub(super) fn finish(self) -> Vec<Differences> {
        self.0.into_iter().map(into_inner).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_bytes_and_joins_near_ranges() {
        let mut found = Differences::default();
        let (mut a, b) = (vec![0u8; 8192], vec![0u8; 8192]);
        for at in [100, 101, 600, 4000, 8191] {
            a[at] = 1;
        }
        found.compare(1 << 20, Some(&a), Some(&b));
        let base = 1 << 20;
        assert_eq!(found.bytes, 5);
        let expected = [base + 100..base + 601, base + 4000..base + 4001, base + 8191..base + 8192];
        assert_eq!(found.ranges().collect::<Vec<_>>(), expected);
        let mut same = Differences::default();
        same.compare(1 << 20, None, Some(&a));
        assert_eq!(same, found);
        // Parts join whatever their order.
        let tally = Tally::new(1);
        for part in [1, 0] {
            let mut piece = Differences::default();
            piece.compare(part * 512, Some(&[1; 512]), None);
            tally.add(0, &piece);
        }
        let all = tally.finish();
        assert_eq!((all[0].bytes, all[0].ranges().len()), (1024, 1));
        assert_eq!(all[0].ranges().next(), Some(0..1024));
    }
}
