//! The plan for a random-access source: which part is read next.
//!
//! Guest addresses are cut at multiples of the sink's piece length. Pieces without data are joined
//! as far as the sink takes zeros in one piece; they are not read.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::device::{Device, DeviceId};
use crate::error::{Error, Result, ResultExt};
use crate::extent::Extent;
use crate::pipeline::Route;
use crate::sink::ImageSink;
use crate::source::RandomAccess;

/// Longest piece that is read at once, whatever source and sink would like. Ours: a piece is held in
/// memory, and hostile images choose cluster sizes.
const MAX_PIECE: u64 = 8 << 20;

/// A part of a device to be read.
pub(super) struct ReadTask {
    pub(super) from: DeviceId,
    pub(super) to: DeviceId,
    pub(super) name: Arc<str>,
    pub(super) start: u64,
    pub(super) len: u64,
    /// The parts that hold data, relative to `start`; none: all zero.
    pub(super) runs: Vec<Range<usize>>,
}

/// Cuts the devices of a source into tasks, one device after the other.
pub(super) struct Plan<'a> {
    source: &'a dyn RandomAccess,
    devices: VecDeque<DevicePlan>,
    largest_piece: u64,
}

struct DevicePlan {
    route: Route,
    name: Arc<str>,
    size: u64,
    piece_len: u64,
    max_zero_len: u64,
    position: u64,
    /// Extents that are known from `position` on.
    known: VecDeque<Extent>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        source: &'a dyn RandomAccess,
        sink: &dyn ImageSink,
        devices: &[Device],
        routes: Vec<Route>,
    ) -> Self {
        let mut plans = VecDeque::new();
        let mut largest_piece = 0;
        for route in routes {
            let Some(device) = devices.iter().find(|device| device.id == route.from) else { continue };
            let geometry = sink.geometry(route.to);
            let piece_len = piece_len(geometry.piece_len, source.read_granule(route.from));
            largest_piece = largest_piece.max(piece_len.min(device.size));
            plans.push_back(DevicePlan {
                route,
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

    pub(super) fn largest_piece(&self) -> u64 {
        self.largest_piece
    }

    /// The next task, or `None` when everything has been handed out.
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

/// Pieces large enough for both sides; a multiple of the sink's piece length.
fn piece_len(sink: u64, source: u64) -> u64 {
    let wanted = source.next_multiple_of(sink.max(1));
    if wanted <= MAX_PIECE { wanted.max(sink) } else { sink }
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
            from: self.route.from,
            to: self.route.to,
            name: Arc::clone(&self.name),
            start,
            len: end - start,
            runs,
        })
    }

    /// The next multiple of the piece length, or the device's end.
    fn next_cut(&self, position: u64) -> u64 {
        (position - position % self.piece_len).saturating_add(self.piece_len).min(self.size)
    }

    /// Where a piece of zeros that is known to reach `zero_end` ends: at a cut, within the limit.
    fn zero_piece_end(&self, zero_end: u64) -> u64 {
        let limit = self.position.saturating_add(self.max_zero_len);
        let end = zero_end.min(limit);
        if end >= self.size { self.size } else { end - end % self.piece_len }
    }

    /// How far zeros reach from the current position; looks at least to `at_least` and goes on
    /// while it costs one question at a time.
    fn zero_until(&mut self, source: &dyn RandomAccess, at_least: u64) -> Result<u64> {
        let mut reached = self.position;
        let mut index = 0;
        let limit = self.position.saturating_add(self.max_zero_len).min(self.size);
        loop {
            if index == self.known.len() {
                if reached >= limit {
                    return Ok(reached);
                }
                self.ask(source, reached.max(self.known_end()))?;
            }
            let extent = self.known[index];
            if extent.is_data() {
                return Ok(extent.start.max(self.position));
            }
            reached = extent.end();
            if reached >= limit {
                return Ok(reached);
            }
            // Beyond the first piece only what is known already is joined, or one more answer.
            if reached >= at_least && index + 1 == self.known.len() && index > 0 {
                return Ok(reached);
            }
            index += 1;
        }
    }

    fn known_end(&self) -> u64 {
        self.known.back().map_or(self.position, Extent::end)
    }

    /// The data between the current position and `end`, relative to the position.
    fn data_runs(&mut self, source: &dyn RandomAccess, end: u64) -> Result<Vec<Range<usize>>> {
        while self.known_end() < end {
            self.ask(source, self.known_end())?;
        }
        let mut runs: Vec<Range<usize>> = Vec::new();
        let within = self.known.iter().take_while(|extent| extent.start < end);
        for extent in within.filter(|extent| extent.is_data()) {
            let from = extent.start.max(self.position);
            let to = extent.end().min(end);
            if from >= to {
                continue;
            }
            // Below MAX_PIECE, so it fits.
            let run = (from - self.position) as usize..(to - self.position) as usize;
            match runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => runs.push(run),
            }
        }
        Ok(runs)
    }

    /// Asks the source for the extents from `from` on and checks that the answer is one.
    fn ask(&mut self, source: &dyn RandomAccess, from: u64) -> Result<()> {
        let answer =
            source.rough_extents(self.route.from, from..self.size, self.piece_len).on_device(&self.name)?;
        let mut at = from;
        for extent in answer {
            if extent.start != at || extent.len == 0 || extent.len > self.size - at {
                return Err(Error::malformed(format!("the driver's extents have a fault at {at}"))
                    .device(&*self.name));
            }
            at = extent.end();
            self.known.push_back(extent);
        }
        if at == from {
            return Err(Error::malformed(format!("the driver knows no extent at {from}")).device(&*self.name));
        }
        Ok(())
    }
}
