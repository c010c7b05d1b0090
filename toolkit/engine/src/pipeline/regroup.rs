//! Regroups the pieces of a stream into multiples of the sink's granule.
//!
//! Aligned pieces with data pass unchanged. Others are gathered until their granules are complete. A badly
//! shuffled stream could leave many granules incomplete. Beyond a limit, the oldest granule goes to the sink
//! in parts, or the copy fails if the sink needs whole granules
//! ([`imgtool_core::Geometry::granule_required`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use imgtool_core::{
    Buffer, BufferPool, Device, DeviceId, Error, Geometry, Lease, Piece, Result, SinkDevice, SinkPiece,
};

use super::Routed;
use super::crew;
use super::target::Targets;

/// Maximum length in bytes of a piece with data in a stream: 16 VMA clusters. It bounds the buffers in
/// flight.
const STREAM_PIECE: u64 = 1 << 20;

pub(super) struct Regroup {
    /// Routes by device of the source.
    routes: HashMap<DeviceId, SizedRoute>,
    /// Incomplete granules by device of the source and granule index.
    pending: BTreeMap<(DeviceId, u64), Pending>,
    /// Keys of `pending` by the number of the granule, which ascends with its age.
    by_age: BTreeMap<u64, (DeviceId, u64)>,
    /// Number of the next granule.
    next_age: u64,
    pending_bytes: u64,
    /// Maximum of `pending_bytes`.
    max_pending: u64,
    /// Memory for `pending`.
    memory: Lease,
    /// Pieces for the sink.
    ready: VecDeque<Routed>,
}

/// A route, with the geometry of its target and the size of its device.
struct SizedRoute {
    /// Index of the route.
    index: usize,
    to: SinkDevice,
    /// Virtual size of the device in bytes; `None` if it is open-ended.
    size: Option<u64>,
    geometry: Geometry,
}

/// A granule that is not complete yet.
struct Pending {
    data: Buffer,
    /// Key in [`Regroup::by_age`].
    age: u64,
    /// Filled ranges of `data`: ascending, disjoint and not adjacent.
    filled: Vec<Range<usize>>,
}

impl Regroup {
    /// Creates a regrouper for a stream, whose pieces come `in_order` or not. Borrows its memory.
    pub(super) fn new(targets: &Targets<'_>, devices: &[Device], in_order: bool) -> Result<Self> {
        let mut routes = HashMap::new();
        for (index, route) in targets.job().routes.iter().enumerate() {
            let device = devices.iter().find(|device| device.id == route.from);
            let size = device.filter(|device| !device.open_ended).map(|device| device.size);
            let geometry = targets.geometry(*route);
            routes.insert(route.from, SizedRoute { index, to: route.to, size, geometry });
        }
        let granule = routes.values().map(|route: &SizedRoute| route.geometry.granule).max().unwrap_or(1);
        let ledger = &targets.job().memory;
        let memory = crew::pending_granules(ledger, in_order, granule)?;
        Ok(Self {
            routes,
            pending: BTreeMap::new(),
            by_age: BTreeMap::new(),
            next_age: 0,
            pending_bytes: 0,
            // A single granule is always kept: the next piece may complete it.
            max_pending: crew::max_pending(ledger).max(granule),
            memory,
            ready: VecDeque::new(),
        })
    }

    /// Returns the maximum length in bytes of a piece with data.
    pub(super) fn largest_piece(&self) -> u64 {
        let granule = self.routes.values().map(|route| route.geometry.granule).max().unwrap_or(1);
        granule.max(STREAM_PIECE)
    }

    pub(super) fn pop(&mut self) -> Option<Routed> {
        self.ready.pop_front()
    }

    /// Adds a piece of the stream. Drops it if its device has no route.
    pub(super) fn push(&mut self, piece: Piece, pool: &BufferPool) -> Result<()> {
        let from = piece.device;
        let Some(route) = self.routes.get(&from) else { return Ok(()) };
        let granule = route.geometry.granule.max(1);
        let ends_well = piece.end().is_multiple_of(granule) || route.size == Some(piece.end());
        if piece.start.is_multiple_of(granule) && ends_well {
            if piece.data.is_none() {
                self.push_zeros(from, piece.start..piece.end());
            } else {
                let (index, piece) = (route.index, piece.routed(route.to));
                self.ready.push_back(Routed { route: index, piece });
            }
            return Ok(());
        }
        self.split(&piece, from, granule, pool)
    }

    /// Passes on zeros, cut to the sink's maximum length for zeros.
    fn push_zeros(&mut self, from: DeviceId, guest: Range<u64>) {
        let Some(route) = self.routes.get(&from) else { return };
        let limit = route.geometry.max_zero_len.max(1);
        let mut start = guest.start;
        while start < guest.end {
            let len = (guest.end - start).min(limit);
            self.ready.push_back(Routed { route: route.index, piece: SinkPiece::zero(route.to, start, len) });
            start += len;
        }
    }

    /// Cuts a piece at granule boundaries. Passes on whole granules of zeros, and gathers the rest.
    fn split(&mut self, piece: &Piece, from: DeviceId, granule: u64, pool: &BufferPool) -> Result<()> {
        let mut start = piece.start;
        while start < piece.end() {
            let index = start / granule;
            let end = (index + 1).saturating_mul(granule).min(piece.end());
            let whole = start.is_multiple_of(granule) && end - start == granule;
            let range = (start - piece.start) as usize..(end - piece.start) as usize;
            match &piece.data {
                None if whole => {
                    // Pass on all whole granules of zeros at once.
                    let end = piece.end() - piece.end() % granule;
                    self.push_zeros(from, start..end);
                    start = end;
                    continue;
                }
                None => self.gather(from, index, start % granule, None, end - start, pool)?,
                Some(data) => {
                    self.gather(from, index, start % granule, Some(&data[range]), end - start, pool)?;
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Copies `len` bytes, or zeros for `None`, into granule `index`, `offset` bytes from its start. Releases
    /// the granule if it is complete, and the oldest granules beyond the memory limit.
    fn gather(
        &mut self,
        from: DeviceId,
        index: u64,
        offset: u64,
        bytes: Option<&[u8]>,
        len: u64,
        pool: &BufferPool,
    ) -> Result<()> {
        let Some(route) = self.routes.get(&from) else { return Ok(()) };
        let granule = route.geometry.granule;
        let complete_len = match route.size {
            Some(size) => granule.min(size.saturating_sub(index * granule)),
            None => granule,
        };
        let key = (from, index);
        let pending = self.pending.entry(key).or_insert_with(|| {
            let age = self.next_age;
            self.next_age += 1;
            self.by_age.insert(age, key);
            self.pending_bytes += granule;
            let mut data = pool.take(usize::try_from(granule).unwrap_or(usize::MAX));
            data.fill(0);
            Pending { data, age, filled: Vec::new() }
        });
        let range = offset as usize..(offset + len) as usize;
        if let Some(bytes) = bytes {
            pending.data[range.clone()].copy_from_slice(bytes);
        }
        insert_range(&mut pending.filled, range);
        let complete =
            pending.filled.first().is_some_and(|run| run.start == 0 && run.end as u64 >= complete_len);
        if complete {
            self.release(key)?;
        }
        while self.pending_bytes > self.max_pending {
            let Some((_, &oldest)) = self.by_age.first_key_value() else { break };
            let required = self.routes.get(&oldest.0).is_some_and(|route| route.geometry.granule_required);
            if required {
                return Err(Error::limit("the stream is too badly shuffled for this target format")
                    .hint("save the archive to a file and convert from there"));
            }
            self.release(oldest)?;
        }
        self.memory.raise(self.pending_bytes, crew::PENDING)
    }

    /// Moves the filled parts of a granule to the ready pieces.
    fn release(&mut self, key: (DeviceId, u64)) -> Result<()> {
        let (Some(pending), Some(route)) = (self.pending.remove(&key), self.routes.get(&key.0)) else {
            return Ok(());
        };
        self.by_age.remove(&pending.age);
        self.pending_bytes -= route.geometry.granule;
        let base = key.1 * route.geometry.granule;
        if let [only] = pending.filled.as_slice()
            && only.start == 0
        {
            let mut data = pending.data;
            data.truncate(only.end);
            self.ready.push_back(Routed { route: route.index, piece: SinkPiece::data(route.to, base, data) });
            return Ok(());
        }
        for run in pending.filled {
            let mut part = BufferPool::new().take(run.len());
            part.copy_from_slice(&pending.data[run.clone()]);
            let piece = SinkPiece::data(route.to, base + run.start as u64, part);
            self.ready.push_back(Routed { route: route.index, piece });
        }
        Ok(())
    }

    /// Releases all incomplete granules at the end of the stream: the tail of an open-ended device.
    pub(super) fn flush(&mut self) -> Result<()> {
        let keys: Vec<_> = self.pending.keys().copied().collect();
        for key in keys {
            self.release(key)?;
        }
        Ok(())
    }
}

/// Adds a range to an ascending list of disjoint ranges and joins neighbours.
fn insert_range(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    let first = ranges.partition_point(|known| known.end < range.start);
    let mut joined = range;
    let mut end = first;
    while let Some(known) = ranges.get(end) {
        if known.start > joined.end {
            break;
        }
        joined = joined.start.min(known.start)..joined.end.max(known.end);
        end += 1;
    }
    ranges.splice(first..end, std::iter::once(joined));
}

#[cfg(test)]
mod tests {
    use imgtool_core::{CancelToken, Consumer, Lane, Memory, NoProgress};

    use super::super::{Job, Route, Target};
    use super::*;

    #[test]
    fn joins_neighbouring_ranges() {
        let mut ranges = Vec::new();
        for range in [10..20, 30..40, 0..5, 20..30, 5..10] {
            insert_range(&mut ranges, range);
        }
        assert_eq!(ranges, std::iter::once(0..40).collect::<Vec<_>>());
    }

    /// Consumer of whole granules of 128 KiB.
    struct Granules;

    impl Consumer for Granules {
        fn geometry(&self, _device: SinkDevice) -> Geometry {
            Geometry {
                granule: 128 << 10,
                granule_required: true,
                piece_len: 128 << 10,
                max_zero_len: u64::MAX,
                ordered: true,
            }
        }

        fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<imgtool_core::Prepared> {
            Ok(imgtool_core::Prepared::consumed(piece))
        }
    }

    #[test]
    fn complete_granules_leave_nothing_behind() {
        let job = Job {
            targets: vec![Target::Consumer(&Granules)],
            routes: vec![Route { from: DeviceId(0), target: 0, to: SinkDevice(0), lane: Lane(0) }],
            taps: Vec::new(),
            threads: 1,
            progress: &NoProgress,
            cancel: CancelToken::new(),
            memory: Memory::default(),
        };
        let targets = Targets::new(&job).expect("a target");
        let devices = [Device::disk(0, "disk", 1 << 40)];
        let mut regroup = Regroup::new(&targets, &devices, false).expect("memory");
        let pool = BufferPool::new();
        for half in 0..1000 {
            let piece = Piece::data(DeviceId(0), half * (64 << 10), pool.take(64 << 10));
            regroup.push(piece, &pool).expect("in order");
            assert_eq!(regroup.pop().is_some(), half % 2 == 1);
            assert_eq!(regroup.by_age.len() as u64, 1 - half % 2);
        }
        assert_eq!(regroup.pending_bytes, 0);
    }
}
