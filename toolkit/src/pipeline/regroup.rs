//! Fits the pieces of a stream to the shape that a sink wants.
//!
//! Pieces that are aligned to the sink's granule pass as they are. Others are gathered, granule by
//! granule, until each is complete. A badly shuffled stream could leave many granules incomplete:
//! beyond a bound the oldest is handed out in parts, which a sink takes unless it said that it
//! can't ([`crate::Geometry::granule_required`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use crate::buffer::{Buffer, BufferPool};
use crate::device::{Device, DeviceId};
use crate::error::{Error, Result};
use crate::pipeline::Route;
use crate::sink::{Geometry, ImageSink};
use crate::source::Piece;

/// Memory for incomplete granules. Ours: a quarter of what a conversion may use in all.
const MAX_PENDING_BYTES: u64 = 64 << 20;

/// Largest piece that a stream hands out: bounds the buffers under way.
const STREAM_PIECE: u64 = 1 << 20;

pub(super) struct Regroup {
    targets: HashMap<DeviceId, Target>,
    /// Incomplete granules by device and granule number.
    pending: BTreeMap<(DeviceId, u64), Pending>,
    /// The same, oldest first; may name ones that are complete by now.
    by_age: VecDeque<(DeviceId, u64)>,
    pending_bytes: u64,
    done: VecDeque<Piece>,
}

struct Target {
    to: DeviceId,
    size: Option<u64>,
    geometry: Geometry,
}

struct Pending {
    data: Buffer,
    /// Ranges of `data` that have been filled, ascending, disjoint, joined.
    filled: Vec<Range<usize>>,
}

impl Regroup {
    pub(super) fn new(sink: &dyn ImageSink, devices: &[Device], routes: Vec<Route>) -> Self {
        let mut targets = HashMap::new();
        for route in routes {
            let device = devices.iter().find(|device| device.id == route.from);
            let size = device.filter(|device| !device.open_ended).map(|device| device.size);
            targets.insert(route.from, Target { to: route.to, size, geometry: sink.geometry(route.to) });
        }
        Self {
            targets,
            pending: BTreeMap::new(),
            by_age: VecDeque::new(),
            pending_bytes: 0,
            done: VecDeque::new(),
        }
    }

    pub(super) fn largest_piece(&self) -> u64 {
        let granule = self.targets.values().map(|target| target.geometry.granule).max().unwrap_or(1);
        granule.max(STREAM_PIECE)
    }

    /// The next piece for the sink.
    pub(super) fn pop(&mut self) -> Option<Piece> {
        self.done.pop_front()
    }

    /// Takes a piece of the source; one of a device that nobody wants is dropped.
    pub(super) fn push(&mut self, mut piece: Piece, pool: &BufferPool) -> Result<()> {
        let from = piece.device;
        let Some(target) = self.targets.get(&from) else { return Ok(()) };
        let granule = target.geometry.granule.max(1);
        let ends_well = piece.end().is_multiple_of(granule) || target.size == Some(piece.end());
        if piece.start.is_multiple_of(granule) && ends_well {
            piece.device = target.to;
            if piece.data.is_none() {
                self.push_zeros(&piece, from);
            } else {
                self.done.push_back(piece);
            }
            return Ok(());
        }
        self.split(&piece, from, granule, pool)
    }

    /// Zeros are cut to what the sink takes at once.
    fn push_zeros(&mut self, piece: &Piece, from: DeviceId) {
        let limit = self.targets.get(&from).map_or(u64::MAX, |target| target.geometry.max_zero_len.max(1));
        let mut start = piece.start;
        while start < piece.end() {
            let len = (piece.end() - start).min(limit);
            self.done.push_back(Piece::zero(piece.device, start, len));
            start += len;
        }
    }

    /// Cuts a piece at granule boundaries; whole granules of zeros pass, the rest is gathered.
    fn split(&mut self, piece: &Piece, from: DeviceId, granule: u64, pool: &BufferPool) -> Result<()> {
        let mut start = piece.start;
        while start < piece.end() {
            let number = start / granule;
            let end = (number + 1).saturating_mul(granule).min(piece.end());
            let whole = start.is_multiple_of(granule) && end - start == granule;
            let range = (start - piece.start) as usize..(end - piece.start) as usize;
            match &piece.data {
                None if whole => {
                    // All whole granules of zeros at once.
                    let end = piece.end() - piece.end() % granule;
                    if let Some(to) = self.targets.get(&from).map(|target| target.to) {
                        self.push_zeros(&Piece::zero(to, start, end - start), from);
                    }
                    start = end;
                    continue;
                }
                None => self.gather(from, number, start % granule, None, end - start, pool)?,
                Some(data) => {
                    self.gather(from, number, start % granule, Some(&data[range]), end - start, pool)?;
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Puts a part into its granule (`None`: zeros), and the granule out when it is complete.
    fn gather(
        &mut self,
        from: DeviceId,
        number: u64,
        within: u64,
        bytes: Option<&[u8]>,
        len: u64,
        pool: &BufferPool,
    ) -> Result<()> {
        let Some(target) = self.targets.get(&from) else { return Ok(()) };
        let granule = target.geometry.granule;
        let wanted = match target.size {
            Some(size) => granule.min(size.saturating_sub(number * granule)),
            None => granule,
        };
        let key = (from, number);
        let pending = self.pending.entry(key).or_insert_with(|| {
            self.by_age.push_back(key);
            self.pending_bytes += granule;
            let mut data = pool.take(usize::try_from(granule).unwrap_or(usize::MAX));
            data.fill(0);
            Pending { data, filled: Vec::new() }
        });
        let range = within as usize..(within + len) as usize;
        if let Some(bytes) = bytes {
            pending.data[range.clone()].copy_from_slice(bytes);
        }
        insert_range(&mut pending.filled, range);
        let complete = pending.filled.first().is_some_and(|run| run.start == 0 && run.end as u64 >= wanted);
        if complete {
            self.release(key)?;
        }
        while self.pending_bytes > MAX_PENDING_BYTES {
            let Some(oldest) = self.by_age.pop_front() else { break };
            let required = self.targets.get(&oldest.0).is_some_and(|target| target.geometry.granule_required);
            if required && self.pending.contains_key(&oldest) {
                return Err(Error::limit("the stream is too badly shuffled for this target format")
                    .hint("save the archive to a file and convert from there"));
            }
            self.release(oldest)?;
        }
        Ok(())
    }

    /// Hands out what there is of a granule.
    fn release(&mut self, key: (DeviceId, u64)) -> Result<()> {
        let (Some(pending), Some(target)) = (self.pending.remove(&key), self.targets.get(&key.0)) else {
            return Ok(());
        };
        self.pending_bytes -= target.geometry.granule;
        let base = key.1 * target.geometry.granule;
        if let [only] = pending.filled.as_slice()
            && only.start == 0
        {
            let mut data = pending.data;
            data.truncate(only.end);
            self.done.push_back(Piece::data(target.to, base, data));
            return Ok(());
        }
        for run in pending.filled {
            let mut part = BufferPool::new().take(run.len());
            part.copy_from_slice(&pending.data[run.clone()]);
            self.done.push_back(Piece::data(target.to, base + run.start as u64, part));
        }
        Ok(())
    }

    /// The stream has ended: hands out what is incomplete (the tail of an open-ended device).
    pub(super) fn flush(&mut self, _pool: &BufferPool) -> Result<()> {
        let keys: Vec<_> = self.pending.keys().copied().collect();
        for key in keys {
            self.release(key)?;
        }
        Ok(())
    }
}

/// Adds a range to an ascending list of disjoint ranges and joins neighbours.
fn insert_range(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    let at = ranges.partition_point(|known| known.end < range.start);
    let mut joined = range;
    let mut until = at;
    while let Some(known) = ranges.get(until) {
        if known.start > joined.end {
            break;
        }
        joined = joined.start.min(known.start)..joined.end.max(known.end);
        until += 1;
    }
    ranges.splice(at..until, std::iter::once(joined));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join() {
        let mut ranges = Vec::new();
        for range in [10..20, 30..40, 0..5, 20..30, 5..10] {
            insert_range(&mut ranges, range);
        }
        assert_eq!(ranges, std::iter::once(0..40).collect::<Vec<_>>());
    }
}
