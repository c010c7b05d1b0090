//! [`Gauge`], which counts the progress of a phase, and [`Work`], which says how much of the phase is done.
//!
//! Guest bytes are a poor measure of time: holes cost nothing. So each part of a phase has the measure that
//! follows its cost best, of those that are known before it is read: the data in the extents of an image, the
//! length of the file that a stream comes from, and the guest bytes only for a pipe.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use imgtool_core::input::Consumed;
use imgtool_core::sync::lock;
use imgtool_core::{Access, Copied, Device, DeviceId, ImageSource, Lane};

/// A lane: one line of the progress display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneInfo {
    /// Name of the device; untrusted.
    pub name: String,
    /// Total number of guest bytes; `None` if unknown until the stream ends.
    pub total: Option<u64>,
}

/// Function that returns the number of bytes written to the outputs so far.
pub type WrittenBytes = Box<dyn Fn() -> u64 + Send + Sync>;

/// Unit of [`Work`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkUnit {
    /// Guest bytes that are read as data; holes and known zeros do not count.
    Data,
    /// Bytes of the file that a stream comes from, compressed if the file is.
    Input,
    /// Guest bytes.
    Guest,
    /// Bytes of several kinds: the parts of the phase have different units.
    Mixed,
}

/// Work of a phase, or of one lane. `done` never decreases, and equals `expected` at the end of the phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Unit of the numbers of bytes.
    pub unit: WorkUnit,
    /// Number of bytes done.
    pub done: u64,
    /// Number of bytes at the end; `None` while it is unknown.
    pub expected: Option<u64>,
    /// Number of bytes of `done` that were only passed: they belong to devices of a stream that are not
    /// copied.
    pub passed: u64,
    /// Number of bytes still to be passed, out of those that are left. An estimate, except for guest bytes.
    pub to_pass: u64,
    /// Time that passing took.
    pub passing: Duration,
    /// Time that reading the stream so far takes at its fastest pace, when no worker is in its way; zero for
    /// images read by position.
    pub reading: Duration,
}

impl Work {
    fn new(unit: WorkUnit, done: u64, expected: Option<u64>) -> Self {
        // A file may grow while it is read, and extents may be reported more roughly than when they were
        // counted.
        let done = expected.map_or(done, |expected| done.min(expected));
        let (passing, reading) = (Duration::ZERO, Duration::ZERO);
        Self { unit, done, expected, passed: 0, to_pass: 0, passing, reading }
    }

    /// True if nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.expected == Some(self.done)
    }

    fn ended(self) -> Self {
        let expected = self.expected.unwrap_or(self.done);
        Self { done: expected, expected: Some(expected), to_pass: 0, ..self }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            unit: if self.unit == other.unit { self.unit } else { WorkUnit::Mixed },
            done: self.done.saturating_add(other.done),
            expected: self.expected.zip(other.expected).map(|(a, b)| a.saturating_add(b)),
            passed: self.passed.saturating_add(other.passed),
            to_pass: self.to_pass.saturating_add(other.to_pass),
            passing: self.passing + other.passing,
            reading: self.reading + other.reading,
        }
    }
}

/// Measure of the work of a part.
#[derive(Debug)]
enum Measure {
    Data,
    Guest,
    /// Length of the file in bytes.
    Input(u64),
}

/// A part of a phase: the devices of one image.
#[derive(Debug)]
pub(crate) struct Part {
    lanes: Vec<Lane>,
    measure: Measure,
    /// Number of bytes that a stream has read from its file or pipe.
    consumed: Option<Consumed>,
    /// Total size in guest bytes of the devices of a stream that are only passed; `None` if one is
    /// open-ended.
    beside: Option<u64>,
    ended: AtomicBool,
    passed: Passed,
    reading: Mutex<Reading>,
}

/// Counts of the devices of a stream that are only passed. The time is in nanoseconds.
#[derive(Debug, Default)]
struct Passed {
    guest: AtomicU64,
    input: AtomicU64,
    time: AtomicU64,
}

/// Time that reading a stream takes.
#[derive(Debug, Default)]
struct Reading {
    /// Time that it took so far.
    time: Duration,
    /// Bytes read from the file or pipe so far.
    input: u64,
    /// Time and bytes since the last measurement of the pace.
    since: (Duration, u64),
    /// Seconds for a byte at the fastest pace; `None` before the first measurement.
    fastest: Option<f64>,
}

/// Number of bytes over which the pace of reading is measured. Our choice: a few milliseconds at most, in which
/// a worker that would be in the way of the reader often does not run, but more than a pipe holds.
const PACE_LEN: u64 = 1 << 20;

impl Reading {
    /// Counts a piece that took the time `spent`, after which `input` bytes were read.
    fn add(&mut self, spent: Duration, input: u64) {
        self.time += spent;
        self.since.0 += spent;
        self.since.1 += input.saturating_sub(self.input);
        self.input = input;
        if self.since.1 >= PACE_LEN {
            let pace = self.since.0.as_secs_f64() / self.since.1 as f64;
            self.fastest = Some(self.fastest.map_or(pace, |fastest| fastest.min(pace)));
            self.since = (Duration::ZERO, 0);
        }
    }

    /// Returns the time that reading so far takes at the fastest pace.
    fn at_best(&self) -> Duration {
        let seconds = self.fastest.map(|pace| pace * self.input as f64);
        seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or(self.time)
    }
}

impl Part {
    /// Creates a part for the devices `copied` of `image`. `consumed` is the number of bytes that a stream
    /// has read from its file or pipe, `len` the length of the file, if it is known. `zeros_cost` is true if
    /// zeros take as long as data.
    pub(crate) fn new(
        image: &dyn ImageSource,
        copied: &[(Lane, DeviceId)],
        consumed: Option<Consumed>,
        len: Option<u64>,
        zeros_cost: bool,
    ) -> Self {
        let measure = match (image.access(), consumed.as_ref().and(len)) {
            (Access::Random(_), _) if !zeros_cost => Measure::Data,
            (Access::Stream(_), Some(len)) => Measure::Input(len),
            _ => Measure::Guest,
        };
        let is_beside = |device: &&Device| !copied.iter().any(|(_, id)| *id == device.id);
        let beside = match image.access() {
            Access::Random(_) => Some(0),
            Access::Stream(_) => sum(image.info().devices.iter().filter(is_beside).map(size_of)),
        };
        let lanes = copied.iter().map(|(lane, _)| *lane).collect();
        let (ended, passed, reading) = (AtomicBool::new(false), Passed::default(), Mutex::default());
        Self { lanes, measure, consumed, beside, ended, passed, reading }
    }

    /// Creates a part for a stream that is copied as it is.
    pub(crate) fn of_stream(lane: Lane, consumed: Option<Consumed>, len: Option<u64>) -> Self {
        let measure = len.map_or(Measure::Guest, Measure::Input);
        let (ended, passed, reading) = (AtomicBool::new(false), Passed::default(), Mutex::default());
        Self { lanes: vec![lane], measure, consumed, beside: Some(0), ended, passed, reading }
    }

    /// Returns the number of bytes that the stream has read from its file or pipe.
    fn input(&self) -> u64 {
        self.consumed.as_ref().map_or(0, Consumed::bytes)
    }

    /// Counts a piece of the stream that took the time `spent` to read.
    fn streamed(&self, is_copied: bool, guest: u64, spent: Duration) {
        let input = self.input();
        let before = {
            let mut reading = lock(&self.reading);
            let before = reading.input;
            reading.add(spent, input);
            before
        };
        if !is_copied {
            let spent = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
            self.passed.guest.fetch_add(guest, Ordering::Relaxed);
            self.passed.input.fetch_add(input.saturating_sub(before), Ordering::Relaxed);
            self.passed.time.fetch_add(spent, Ordering::Relaxed);
        }
    }
}

fn size_of(device: &Device) -> Option<u64> {
    (!device.open_ended).then_some(device.size)
}

/// Adds up numbers that are all known.
fn sum(mut numbers: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    numbers.try_fold(0u64, |sum, number| number.map(|number| sum.saturating_add(number)))
}

/// Progress of a phase, for a display to poll.
pub struct Gauge {
    lanes: Vec<GaugeLane>,
    parts: Vec<Part>,
    /// Index of the part that is being read.
    current: AtomicUsize,
    written: WrittenBytes,
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gauge")
            .field("lanes", &self.lanes)
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

/// Value of [`GaugeLane::expected`] while the number is unknown.
const UNKNOWN: u64 = u64::MAX;

#[derive(Debug)]
struct GaugeLane {
    info: LaneInfo,
    done: AtomicU64,
    zero: AtomicU64,
    data: AtomicU64,
    /// Number of data bytes in the extents of the device.
    expected: AtomicU64,
}

impl GaugeLane {
    fn new(info: LaneInfo) -> Self {
        let [done, zero, data] = [0; 3].map(AtomicU64::new);
        Self { info, done, zero, data, expected: AtomicU64::new(UNKNOWN) }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn data(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    fn expected_data(&self) -> Option<u64> {
        Some(self.expected.load(Ordering::Relaxed)).filter(|expected| *expected != UNKNOWN)
    }
}

impl Gauge {
    pub(crate) fn new(lanes: Vec<LaneInfo>, parts: Vec<Part>, written: WrittenBytes) -> Self {
        let lanes = lanes.into_iter().map(GaugeLane::new).collect();
        Self { lanes, parts, current: AtomicUsize::new(0), written }
    }

    /// Returns the lanes, in order. A [`Lane`] is an index into them.
    pub fn lanes(&self) -> impl ExactSizeIterator<Item = &LaneInfo> {
        self.lanes.iter().map(|lane| &lane.info)
    }

    /// Returns the number of guest bytes of a lane so far, and the number of zeros among them.
    pub fn count(&self, lane: Lane) -> (u64, u64) {
        self.lanes.get(lane.index()).map_or((0, 0), |lane| (lane.done(), lane.zero.load(Ordering::Relaxed)))
    }

    /// Returns the number of guest bytes of a lane that were read as data so far.
    pub fn data(&self, lane: Lane) -> u64 {
        self.lanes.get(lane.index()).map_or(0, GaugeLane::data)
    }

    /// Returns the number of bytes written to the outputs so far.
    pub fn written(&self) -> u64 {
        (self.written)()
    }

    /// Returns the work of the phase.
    pub fn work(&self) -> Work {
        let parts = self.parts.iter().map(|part| self.work_of(part));
        parts.reduce(Work::plus).unwrap_or_else(|| Work::new(WorkUnit::Guest, 0, Some(0)))
    }

    /// Returns the work of a lane: data, or guest bytes for a stream.
    pub fn lane_work(&self, lane: Lane) -> Work {
        let Some(counts) = self.lanes.get(lane.index()) else {
            return Work::new(WorkUnit::Guest, 0, Some(0));
        };
        let part = self.parts.iter().find(|part| part.lanes.contains(&lane));
        let work = match part.map(|part| &part.measure) {
            Some(Measure::Data) => Work::new(WorkUnit::Data, counts.data(), counts.expected_data()),
            _ => Work::new(WorkUnit::Guest, counts.done(), counts.info.total),
        };
        // Zeros at the end of a device are passed on after its last data.
        let is_copied = counts.info.total == Some(counts.done());
        let is_ended = part.is_some_and(|part| part.ended.load(Ordering::Relaxed));
        if is_copied || is_ended { work.ended() } else { work }
    }

    fn work_of(&self, part: &Part) -> Work {
        let lanes = || part.lanes.iter().filter_map(|lane| self.lanes.get(lane.index()));
        let passed = &part.passed;
        let beside_done = passed.guest.load(Ordering::Relaxed);
        let guest: u64 = lanes().map(GaugeLane::done).sum();
        let total = sum(lanes().map(|lane| lane.info.total));
        let whole = total.zip(part.beside).map(|(total, beside)| total.saturating_add(beside));
        let beside_left = part.beside.unwrap_or(0).saturating_sub(beside_done);
        let work = match &part.measure {
            Measure::Data => {
                let expected = sum(lanes().map(GaugeLane::expected_data));
                Work::new(WorkUnit::Data, lanes().map(GaugeLane::data).sum(), expected)
            }
            Measure::Guest => {
                let work = Work::new(WorkUnit::Guest, guest + beside_done, whole);
                Work { passed: beside_done, to_pass: beside_left, ..work }
            }
            Measure::Input(len) => {
                let work = Work::new(WorkUnit::Input, part.input(), Some(*len));
                let copy_left = total.unwrap_or(guest).saturating_sub(guest);
                let to_pass = share_of(len - work.done, beside_left, copy_left);
                Work { passed: passed.input.load(Ordering::Relaxed), to_pass, ..work }
            }
        };
        let passing = Duration::from_nanos(passed.time.load(Ordering::Relaxed));
        let work = Work { passing, reading: lock(&part.reading).at_best(), ..work };
        if part.ended.load(Ordering::Relaxed) { work.ended() } else { work }
    }

    /// Counts a part of a device that has reached its target.
    pub(crate) fn advance(&self, lane: Lane, copied: Copied) {
        if let Some(counts) = self.lanes.get(lane.index()) {
            counts.done.fetch_add(copied.guest, Ordering::Relaxed);
            counts.zero.fetch_add(copied.zero, Ordering::Relaxed);
            counts.data.fetch_add(copied.data, Ordering::Relaxed);
        }
    }

    /// Counts a piece of the stream that is being read.
    pub(crate) fn streamed(&self, is_copied: bool, guest: u64, spent: Duration) {
        if let Some(part) = self.parts.get(self.current.load(Ordering::Relaxed)) {
            part.streamed(is_copied, guest, spent);
        }
    }

    /// Sets the number of data bytes that a lane will copy.
    pub(crate) fn expect(&self, lane: Lane, data: u64) {
        if let Some(counts) = self.lanes.get(lane.index()) {
            counts.expected.store(data.min(UNKNOWN - 1), Ordering::Relaxed);
        }
    }

    /// Ends the current part: all of its work is done.
    pub(crate) fn end_part(&self) {
        if let Some(part) = self.parts.get(self.current.fetch_add(1, Ordering::Relaxed)) {
            part.ended.store(true, Ordering::Relaxed);
        }
    }
}

/// Returns the part of `left` that belongs to `one`, if `one` and `other` share it.
fn share_of(left: u64, one: u64, other: u64) -> u64 {
    let all = u128::from(one) + u128::from(other);
    let share = (u128::from(left) * u128::from(one)).checked_div(all).unwrap_or(0);
    u64::try_from(share).unwrap_or(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_pace_of_reading_counts() {
        let mut reading = Reading::default();
        reading.add(Duration::from_millis(100), PACE_LEN / 2);
        assert_eq!(reading.at_best(), Duration::from_millis(100), "nothing is measured yet");
        reading.add(Duration::from_millis(100), PACE_LEN);
        assert_eq!(reading.at_best().as_millis(), 200);
        reading.add(Duration::from_millis(50), PACE_LEN * 2);
        assert_eq!(reading.at_best().as_millis(), 100);
        reading.add(Duration::from_secs(9), PACE_LEN * 4);
        assert_eq!(reading.at_best().as_millis(), 200);
    }

    #[test]
    fn shares_add_up_and_bear_zeros() {
        assert_eq!((share_of(100, 1, 3), share_of(100, 3, 1)), (25, 75));
        assert_eq!((share_of(100, 0, 3), share_of(100, 3, 0), share_of(100, 0, 0)), (0, 100, 0));
        assert_eq!(share_of(u64::MAX, u64::MAX, 0), u64::MAX);
    }
}
