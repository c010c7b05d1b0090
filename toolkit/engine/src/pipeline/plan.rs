//! Read plan of a random-access source: cuts its devices into read tasks.
//!
//! Tasks end at guest offsets that are multiples of the sink's piece length. Pieces without data are joined
//! up to the sink's maximum for zeros, and are not read.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use imgtool_core::extent::check_answer;
use imgtool_core::{Device, DeviceId, Extent, RandomAccess, Result, ResultExt, SinkDevice};

use super::target::Targets;

/// Maximum length in bytes of a piece that is enlarged to match the source's read granule. Our limit: a piece
/// is kept in memory, and a hostile image chooses its cluster size.
const MAX_PIECE: u64 = 8 << 20;

/// A range of a device to read.
pub(super) struct ReadTask {
    /// Index of the route.
    pub(super) route: usize,
    pub(super) from: DeviceId,
    pub(super) to: SinkDevice,
    pub(super) name: Arc<str>,
    /// First guest byte.
    pub(super) start: u64,
    /// Length in guest bytes.
    pub(super) len: u64,
    /// Ranges of data, relative to `start`; empty if all bytes are zero.
    pub(super) runs: Vec<Range<usize>>,
}

/// Cuts the devices of a source into read tasks, one device after the other.
pub(super) struct Plan<'a> {
    source: &'a dyn RandomAccess,
    devices: VecDeque<DevicePlan>,
    largest_piece: u64,
}

/// Joins the ranges of data in `extents` within the guest range `within`, relative to its start.
fn runs_within(extents: &VecDeque<Extent>, within: Range<u64>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let relevant = extents.iter().take_while(|extent| extent.start < within.end);
    for extent in relevant.filter(|extent| extent.is_data()) {
        let from = extent.start.max(within.start);
        let to = extent.end().min(within.end);
        if from >= to {
            continue;
        }
        // The run is within a piece in memory, so it fits a usize.
        let run = (from - within.start) as usize..(to - within.start) as usize;
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
    runs
}

/// The part of one device that is still to be cut into tasks. All lengths and positions are guest bytes.
struct DevicePlan {
    route: usize,
    from: DeviceId,
    to: SinkDevice,
    name: Arc<str>,
    size: u64,
    piece_len: u64,
    max_zero_len: u64,
    /// Start of the next task.
    position: u64,
    /// Extents queried so far, from `position` on.
    known: VecDeque<Extent>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        source: &'a dyn RandomAccess,
        targets: &Targets<'_>,
        devices: &[Device],
        routes: &[usize],
    ) -> Self {
        let mut plans = VecDeque::new();
        let mut largest_piece = 0;
        for &index in routes {
            let route = targets.job().routes[index];
            let Some(device) = devices.iter().find(|device| device.id == route.from) else { continue };
            let geometry = targets.geometry(route);
            let piece_len = piece_len(geometry.piece_len, source.read_granule(route.from));
            largest_piece = largest_piece.max(piece_len.min(device.size));
            plans.push_back(DevicePlan {
                route: index,
                from: route.from,
                to: route.to,
                name: Arc::from(device.name.as_str()),
                size: device.size,
                piece_len,
                max_zero_len: geometry.max_zero_len.max(piece_len),
                position: 0,
                known: VecDeque::new(),
            });
        }
        Self { source, devices: plans, largest_piece }
    }

    /// Returns the maximum length in bytes of a piece with data.
    pub(super) fn largest_piece(&self) -> u64 {
        self.largest_piece
    }

    /// Returns a task to read the guest range `guest` of the device `from`; `None` if the route with this
    /// index is not planned.
    pub(super) fn task(&self, route: usize, from: DeviceId, guest: Range<u64>) -> Result<Option<ReadTask>> {
        let Some(device) = self.devices.iter().find(|device| device.route == route) else { return Ok(None) };
        let mut known = VecDeque::new();
        let mut reached = guest.start;
        while reached < guest.end {
            let range = reached..guest.end;
            let answer = self.source.extents(from, range.clone());
            known.extend(answer.and_then(|answer| check_answer(answer, range)).on_device(&device.name)?);
            reached = known.back().map_or(guest.end, Extent::end);
        }
        Ok(Some(ReadTask {
            route,
            from,
            to: device.to,
            name: Arc::clone(&device.name),
            start: guest.start,
            len: guest.end - guest.start,
            runs: runs_within(&known, guest),
        }))
    }

    /// Returns the next task, or `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<ReadTask>> {
        while let Some(device) = self.devices.front_mut() {
            if device.position < device.size {
                return device.next(self.source).map(Some);
            }
            self.devices.pop_front();
        }
        Ok(None)
    }
}

/// Returns the read granule of the source rounded up to a multiple of the sink's piece length, or the sink's
/// piece length if that exceeds [`MAX_PIECE`].
pub(crate) fn piece_len(sink_piece_len: u64, read_granule: u64) -> u64 {
    let common = read_granule.next_multiple_of(sink_piece_len.max(1));
    if common <= MAX_PIECE { common.max(sink_piece_len) } else { sink_piece_len }
}

impl DevicePlan {
    fn next(&mut self, source: &dyn RandomAccess) -> Result<ReadTask> {
        let start = self.position;
        let piece_end = self.next_cut(start);
        let zero_end = self.zero_until(source, piece_end)?;
        let (end, runs) = if zero_end >= piece_end {
            (self.zero_piece_end(zero_end), Vec::new())
        } else {
            (piece_end, self.data_runs(source, piece_end)?)
        };
        self.position = end;
        while self.known.front().is_some_and(|extent| extent.end() <= end) {
            self.known.pop_front();
        }
        Ok(ReadTask {
            route: self.route,
            from: self.from,
            to: self.to,
            name: Arc::clone(&self.name),
            start,
            len: end - start,
            runs,
        })
    }

    /// Returns the next multiple of the piece length, or the device's end.
    fn next_cut(&self, position: u64) -> u64 {
        (position - position % self.piece_len).saturating_add(self.piece_len).min(self.size)
    }

    /// Returns the end of a piece of zeros: a multiple of the piece length within `zero_end` and the sink's
    /// limit, or the device's end.
    fn zero_piece_end(&self, zero_end: u64) -> u64 {
        let limit = self.position.saturating_add(self.max_zero_len);
        let end = zero_end.min(limit);
        if end >= self.size { self.size } else { end - end % self.piece_len }
    }

    /// Returns the guest offset at which the known zeros from the current position on end. Queries the
    /// extents up to `at_least`, and at most once more.
    fn zero_until(&mut self, source: &dyn RandomAccess, at_least: u64) -> Result<u64> {
        let mut reached = self.position;
        let mut index = 0;
        let limit = self.position.saturating_add(self.max_zero_len).min(self.size);
        loop {
            if index == self.known.len() {
                if reached >= limit {
                    return Ok(reached);
                }
                self.query(source, reached.max(self.known_end()))?;
            }
            let extent = self.known[index];
            if extent.is_data() {
                return Ok(extent.start.max(self.position));
            }
            reached = extent.end();
            if reached >= limit {
                return Ok(reached);
            }
            // Beyond the first piece, use only known extents, or one more answer.
            if reached >= at_least && index + 1 == self.known.len() && index > 0 {
                return Ok(reached);
            }
            index += 1;
        }
    }

    /// Returns the end of the extents queried so far.
    fn known_end(&self) -> u64 {
        self.known.back().map_or(self.position, Extent::end)
    }

    /// Returns the ranges of data between the current position and `end`, relative to the position.
    fn data_runs(&mut self, source: &dyn RandomAccess, end: u64) -> Result<Vec<Range<usize>>> {
        while self.known_end() < end {
            self.query(source, self.known_end())?;
        }
        Ok(runs_within(&self.known, self.position..end))
    }

    /// Queries the extents from guest offset `from` on, and checks the driver's answer.
    fn query(&mut self, source: &dyn RandomAccess, from: u64) -> Result<()> {
        let range = from..self.size;
        let answer = source.rough_extents(self.from, range.clone(), self.piece_len);
        self.known.extend(answer.and_then(|answer| check_answer(answer, range)).on_device(&self.name)?);
        Ok(())
    }
}
