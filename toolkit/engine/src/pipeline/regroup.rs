//! Regroups the pieces of a stream into multiples of the sink's granule.
//!
//! Aligned pieces with data pass unchanged. Others are gathered until their granules are complete. A badly
//! shuffled stream could leave many granules incomplete. Beyond a limit, the oldest granule goes to the sink
//! in parts, or the copy fails if the sink needs whole granules
//! ([`imgtool_core::Geometry::granule_required`]).
//!
//! An image in a file may have the order of a stream ([`imgtool_core::RandomAccess::stream_order`]). Its parts
//! pass through the same steps, without their content, so that a sink gets them in the order in which it would
//! get the pieces of the stream. The workers read the content afterwards. An order that the sink would refuse is
//! not followed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use imgtool_core::{
    Buffer, BufferPool, CancelToken, Device, DeviceId, Error, Geometry, Lease, Piece, Result, SinkDevice,
    SinkPiece, StreamOrder, StreamPart,
};

use super::crew::{self, Arrival};
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
    /// Total size of the granules in `pending`, with and without a buffer: a file and a stream of the same
    /// image must be cut alike.
    pending_bytes: u64,
    /// Maximum of `pending_bytes`.
    max_pending: u64,
    /// Total size of the buffers in `pending`.
    buffered_bytes: u64,
    /// Memory for the buffers.
    memory: Lease,
    /// Pieces for the sink.
    ready: VecDeque<FittedPiece>,
}

/// A piece for the sink.
pub(super) struct FittedPiece {
    /// Index of the route.
    pub(super) route: usize,
    pub(super) content: FittedContent,
}

/// Content of a piece for the sink.
pub(super) enum FittedContent {
    /// A piece with its content, or of zeros.
    Read(SinkPiece),
    /// Guest range of a piece of the source's device whose content is still to be read.
    Unread(DeviceId, Range<u64>),
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
#[derive(Default)]
struct Pending {
    /// Key in [`Regroup::by_age`].
    age: u64,
    /// True if a part has data.
    has_data: bool,
    /// Content, zeros where there is no data yet; `None` before the first data, and if the content is still
    /// to be read.
    data: Option<Buffer>,
    /// Filled ranges of the granule: ascending, disjoint and not adjacent.
    filled: Vec<Range<usize>>,
}

/// Content of a part to gather.
#[derive(Clone, Copy)]
enum Part<'a> {
    Zero,
    Data(&'a [u8]),
    Unread,
}

impl Regroup {
    /// Creates a regrouper for the routes with these indices, whose content comes as `arrival` says. Each
    /// device may have one of them. Borrows the memory for the content that waits.
    pub(super) fn new(
        targets: &Targets<'_>,
        devices: &[Device],
        indices: &[usize],
        arrival: Arrival,
    ) -> Result<Self> {
        let mut routes = HashMap::new();
        for &index in indices {
            let route = targets.job().routes[index];
            let device = devices.iter().find(|device| device.id == route.from);
            let size = device.filter(|device| !device.open_ended).map(|device| device.size);
            let geometry = targets.geometry(route);
            routes.insert(route.from, SizedRoute { index, to: route.to, size, geometry });
        }
        let granule = routes.values().map(|route: &SizedRoute| route.geometry.granule).max().unwrap_or(1);
        let ledger = &targets.job().memory;
        let memory = crew::pending_granules(ledger, arrival, granule)?;
        Ok(Self {
            routes,
            pending: BTreeMap::new(),
            by_age: BTreeMap::new(),
            next_age: 0,
            pending_bytes: 0,
            // A single granule is always kept: the next piece may complete it.
            max_pending: crew::max_pending(ledger).max(granule),
            buffered_bytes: 0,
            memory,
            ready: VecDeque::new(),
        })
    }

    /// Returns the maximum length in bytes of a piece with data.
    pub(super) fn largest_piece(&self) -> u64 {
        let granule = self.routes.values().map(|route| route.geometry.granule).max().unwrap_or(1);
        granule.max(STREAM_PIECE)
    }

    /// True if this order leaves more granules incomplete than are gathered, and a sink needs whole ones.
    pub(super) fn refuses(mut self, order: &mut dyn StreamOrder, cancel: &CancelToken) -> Result<bool> {
        let gathers = |route: &SizedRoute| {
            route.geometry.granule_required && route.geometry.granule > crew::STREAM_ALIGNMENT
        };
        if !self.routes.values().any(gathers) {
            return Ok(false);
        }
        let pool = BufferPool::new();
        while let Some(part) = order.next_part()? {
            cancel.check()?;
            if self.push_unread(part, &pool).is_err() {
                return Ok(true);
            }
            self.ready.clear();
        }
        Ok(false)
    }

    pub(super) fn pop(&mut self) -> Option<FittedPiece> {
        self.ready.pop_front()
    }

    /// Adds a piece of the stream. Drops it if its device has no route.
    pub(super) fn push(&mut self, piece: Piece, pool: &BufferPool) -> Result<()> {
        let (from, guest) = (piece.device, piece.start..piece.end());
        let Some(route) = self.routes.get(&from) else { return Ok(()) };
        if piece.data.is_some() && route.is_aligned(&guest) {
            let (route, piece) = (route.index, piece.routed(route.to));
            self.ready.push_back(FittedPiece { route, content: FittedContent::Read(piece) });
            return Ok(());
        }
        let part = piece.data.as_deref().map_or(Part::Zero, Part::Data);
        self.push_part(from, guest, part, pool)
    }

    /// Adds a part of the stream whose content is still to be read.
    pub(super) fn push_unread(&mut self, part: StreamPart, pool: &BufferPool) -> Result<()> {
        let (from, guest) = (part.device, part.guest);
        let Some(route) = self.routes.get(&from) else { return Ok(()) };
        if part.has_data && route.is_aligned(&guest) {
            let route = route.index;
            self.ready.push_back(FittedPiece { route, content: FittedContent::Unread(from, guest) });
            return Ok(());
        }
        self.push_part(from, guest, if part.has_data { Part::Unread } else { Part::Zero }, pool)
    }

    /// Passes on aligned zeros, and gathers the rest.
    fn push_part(
        &mut self,
        from: DeviceId,
        guest: Range<u64>,
        part: Part<'_>,
        pool: &BufferPool,
    ) -> Result<()> {
        let Some(route) = self.routes.get(&from) else { return Ok(()) };
        if matches!(part, Part::Zero) && route.is_aligned(&guest) {
            self.push_zeros(from, guest);
            return Ok(());
        }
        let granule = route.geometry.granule.max(1);
        self.split(from, guest, part, granule, pool)
    }

    /// Passes on zeros, cut to the sink's maximum length for zeros.
    fn push_zeros(&mut self, from: DeviceId, guest: Range<u64>) {
        let Some(route) = self.routes.get(&from) else { return };
        let limit = route.geometry.max_zero_len.max(1);
        let mut start = guest.start;
        while start < guest.end {
            let len = (guest.end - start).min(limit);
            let content = FittedContent::Read(SinkPiece::zero(route.to, start, len));
            self.ready.push_back(FittedPiece { route: route.index, content });
            start += len;
        }
    }

    /// Cuts a part at granule boundaries. Passes on whole granules of zeros, and gathers the rest.
    fn split(
        &mut self,
        from: DeviceId,
        guest: Range<u64>,
        part: Part<'_>,
        granule: u64,
        pool: &BufferPool,
    ) -> Result<()> {
        let mut start = guest.start;
        while start < guest.end {
            let index = start / granule;
            let end = (index + 1).saturating_mul(granule).min(guest.end);
            let whole = start.is_multiple_of(granule) && end - start == granule;
            if whole && matches!(part, Part::Zero) {
                // Pass on all whole granules of zeros at once.
                let end = guest.end - guest.end % granule;
                self.push_zeros(from, start..end);
                start = end;
                continue;
            }
            let part = match part {
                // Within the piece, which is in memory.
                Part::Data(data) => {
                    Part::Data(&data[(start - guest.start) as usize..(end - guest.start) as usize])
                }
                other => other,
            };
            self.gather((from, index), start % granule..start % granule + (end - start), part, pool)?;
            start = end;
        }
        Ok(())
    }

    /// Adds a part to the granule `key`, at the bytes `within` it. Releases the granule if it is complete, and
    /// the oldest granules beyond the memory limit.
    fn gather(
        &mut self,
        key: (DeviceId, u64),
        within: Range<u64>,
        part: Part<'_>,
        pool: &BufferPool,
    ) -> Result<()> {
        let Some(route) = self.routes.get(&key.0) else { return Ok(()) };
        let granule = route.geometry.granule;
        let complete_len = match route.size {
            Some(size) => granule.min(size.saturating_sub(key.1 * granule)),
            None => granule,
        };
        let pending = self.pending.entry(key).or_insert_with(|| {
            let age = self.next_age;
            self.next_age += 1;
            self.by_age.insert(age, key);
            self.pending_bytes += granule;
            Pending { age, ..Pending::default() }
        });
        // Within a granule, which fits into memory.
        let range = within.start as usize..within.end as usize;
        pending.has_data |= !matches!(part, Part::Zero);
        if let Part::Data(bytes) = part {
            let data = pending.data.get_or_insert_with(|| {
                self.buffered_bytes += granule;
                let mut data = pool.take(usize::try_from(granule).unwrap_or(usize::MAX));
                data.fill(0);
                data
            });
            data[range.clone()].copy_from_slice(bytes);
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
        self.memory.raise(self.buffered_bytes, crew::PENDING)
    }

    /// Moves the filled parts of a granule to the ready pieces.
    fn release(&mut self, key: (DeviceId, u64)) -> Result<()> {
        let (Some(mut pending), Some(route)) = (self.pending.remove(&key), self.routes.get(&key.0)) else {
            return Ok(());
        };
        self.by_age.remove(&pending.age);
        self.pending_bytes -= route.geometry.granule;
        if pending.data.is_some() {
            self.buffered_bytes -= route.geometry.granule;
        }
        let base = key.1 * route.geometry.granule;
        let filled = std::mem::take(&mut pending.filled);
        let is_whole = matches!(filled.as_slice(), [only] if only.start == 0);
        for run in filled {
            let guest = base + run.start as u64..base + run.end as u64;
            let content = match pending.data.take_if(|_| is_whole) {
                Some(mut whole) => {
                    whole.truncate(run.end);
                    FittedContent::Read(SinkPiece::data(route.to, base, whole))
                }
                None => pending.content_of(key.0, route.to, guest, run),
            };
            self.ready.push_back(FittedPiece { route: route.index, content });
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

impl SizedRoute {
    /// True if the range consists of whole granules, or ends with the device.
    fn is_aligned(&self, guest: &Range<u64>) -> bool {
        let granule = self.geometry.granule.max(1);
        let ends_well = guest.end.is_multiple_of(granule) || self.size == Some(guest.end);
        guest.start.is_multiple_of(granule) && ends_well
    }
}

impl Pending {
    /// Returns the bytes `run` of the granule, the guest range `guest`, as a piece.
    fn content_of(
        &self,
        from: DeviceId,
        to: SinkDevice,
        guest: Range<u64>,
        run: Range<usize>,
    ) -> FittedContent {
        match &self.data {
            _ if !self.has_data => {
                FittedContent::Read(SinkPiece::zero(to, guest.start, guest.end - guest.start))
            }
            None => FittedContent::Unread(from, guest),
            Some(data) => {
                let mut part = BufferPool::new().take(run.len());
                part.copy_from_slice(&data[run]);
                FittedContent::Read(SinkPiece::data(to, guest.start, part))
            }
        }
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
    use imgtool_core::{Consumer, Lane, Memory, NoProgress};

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

    fn job() -> Job<'static> {
        Job {
            targets: vec![Target::Consumer(&Granules)],
            routes: vec![Route { from: DeviceId(0), target: 0, to: SinkDevice(0), lane: Lane(0) }],
            taps: Vec::new(),
            threads: 1,
            progress: &NoProgress,
            cancel: CancelToken::new(),
            memory: Memory::default(),
        }
    }

    #[test]
    fn complete_granules_leave_nothing_behind() {
        let job = job();
        let targets = Targets::new(&job).expect("a target");
        let devices = [Device::disk(0, "disk", 1 << 40)];
        let mut regroup = Regroup::new(&targets, &devices, &[0], Arrival::AnyOrder).expect("memory");
        let pool = BufferPool::new();
        for half in 0..1000 {
            let piece = Piece::data(DeviceId(0), half * (64 << 10), pool.take(64 << 10));
            regroup.push(piece, &pool).expect("in order");
            assert_eq!(regroup.pop().is_some(), half % 2 == 1);
            assert_eq!(regroup.by_age.len() as u64, 1 - half % 2);
        }
        assert_eq!((regroup.pending_bytes, regroup.buffered_bytes), (0, 0));
    }

    #[test]
    fn granules_without_content_count_but_take_no_memory() {
        let job = job();
        let targets = Targets::new(&job).expect("a target");
        let devices = [Device::disk(0, "disk", 1 << 40)];
        let free = job.memory.free();
        let mut regroup = Regroup::new(&targets, &devices, &[0], Arrival::Unread).expect("memory");
        let pool = BufferPool::new();
        let half = |granule: u64| granule * (128 << 10)..granule * (128 << 10) + (64 << 10);
        // A limit of 64 MiB allows 512 granules of 128 KiB.
        for granule in 0..512 {
            let part = StreamPart { device: DeviceId(0), guest: half(granule), has_data: granule % 2 == 0 };
            regroup.push_unread(part, &pool).expect("as many as are allowed");
        }
        assert_eq!((regroup.pending_bytes, regroup.buffered_bytes), (64 << 20, 0));
        assert_eq!(job.memory.free(), free);
        let part = StreamPart { device: DeviceId(0), guest: half(512), has_data: true };
        regroup.push_unread(part, &pool).expect_err("one too many for a sink of whole granules");
    }
}
