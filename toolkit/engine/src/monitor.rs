//! [`Monitor`], which receives the events of a run, and [`Gauge`], which counts its progress.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use imgtool_core::{Lane, Location, NoProgress, Progress, Result};
use imgtool_storage::Cleaner;
use imgtool_storage::os::DirectoryHandle;

/// Phase of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Copying content from sources to outputs.
    Convert,
    /// Reading finished outputs back.
    Verify,
    /// Comparing two images.
    Compare,
    /// Digesting content.
    Checksum,
}

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

/// Progress of a phase, for a display to poll.
pub struct Gauge {
    lanes: Vec<GaugeLane>,
    written: WrittenBytes,
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gauge").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct GaugeLane {
    info: LaneInfo,
    done: AtomicU64,
    zero: AtomicU64,
}

impl Gauge {
    fn new(lanes: Vec<LaneInfo>, written: WrittenBytes) -> Self {
        let lane = |info| GaugeLane { info, done: AtomicU64::new(0), zero: AtomicU64::new(0) };
        Self { lanes: lanes.into_iter().map(lane).collect(), written }
    }

    /// Returns the lanes, in order. A [`Lane`] is an index into them.
    pub fn lanes(&self) -> impl ExactSizeIterator<Item = &LaneInfo> {
        self.lanes.iter().map(|lane| &lane.info)
    }

    /// Returns the number of guest bytes of a lane so far, and the number of zeros among them.
    pub fn count(&self, lane: Lane) -> (u64, u64) {
        self.lanes
            .get(lane.index())
            .map_or((0, 0), |lane| (lane.done.load(Ordering::Relaxed), lane.zero.load(Ordering::Relaxed)))
    }

    /// Returns the number of bytes written to the outputs so far.
    pub fn written(&self) -> u64 {
        (self.written)()
    }
}

/// Files that a run may still open by name when all sources and outputs are open.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// Directories in which the run renames, replaces and removes files, but opens none. They are open, because
    /// another process may move them.
    pub files: Vec<Arc<DirectoryHandle>>,
    /// Those of `files` in which an empty file reserves the name of an output, so that the run creates files.
    pub reserved: Vec<Arc<DirectoryHandle>>,
    /// Directories in which the run has created directories, which it removes if it fails.
    pub parents: Vec<Arc<DirectoryHandle>>,
    /// Files and directories that verification may read: backing images of the outputs.
    pub reads: BTreeSet<PathBuf>,
}

/// Receives the events of a run. Every method has a default.
pub trait Monitor: Sync {
    /// Called when a phase begins. With verification, a run has two phases. A display can poll the progress
    /// from `gauge` at any time.
    fn begin(&self, _phase: Phase, _gauge: &Arc<Gauge>) {}

    /// Called for each piece, by many threads at once, so it must be fast. `len` more guest bytes were
    /// copied; `zero` of them were zeros without data.
    fn advance(&self, _lane: Lane, _len: u64, _zero: u64) {}

    /// Called when the current phase is complete, but not if it fails.
    fn end(&self) {}

    /// Called before the first output is created. `cleaner` removes unfinished outputs, for a signal handler
    /// that has no time to unwind.
    fn outputs(&self, _cleaner: Cleaner) {}

    /// Called before the first output is created, with a note that may make the user stop the run.
    fn warn(&self, _note: &str) {}

    /// Called when all sources and outputs are open, before their content is copied or compared, in the thread
    /// of the caller. From here on, the run opens no file outside of `reach`, and starts most of its threads.
    fn opened(&self, _reach: &Reach) {}

    /// Runs `step`, which gives the outputs their names and which a signal handler must not interrupt. The
    /// default calls it; the run fails if a monitor does not.
    fn name_outputs(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        step()
    }

    /// Called if the run failed after it had begun to overwrite `target` in place.
    fn left_incomplete(&self, _target: &Location) {}
}

impl fmt::Debug for dyn Monitor + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Monitor")
    }
}

/// A monitor that ignores everything.
impl Monitor for NoProgress {}

/// Counts the progress of a phase, passes it to the monitor, and limits the speed.
pub(crate) struct Counter<'a> {
    monitor: &'a dyn Monitor,
    gauge: Arc<Gauge>,
    limit: Option<RateLimit>,
}

impl<'a> Counter<'a> {
    /// Begins a phase.
    pub(crate) fn begin(
        monitor: &'a dyn Monitor,
        phase: Phase,
        lanes: Vec<LaneInfo>,
        written: WrittenBytes,
        bytes_per_second: Option<u64>,
    ) -> Self {
        let gauge = Arc::new(Gauge::new(lanes, written));
        monitor.begin(phase, &gauge);
        Self { monitor, gauge, limit: bytes_per_second.map(RateLimit::new) }
    }

    /// Returns the counts of a lane; see [`Gauge::count`].
    pub(crate) fn totals(&self, lane: Lane) -> (u64, u64) {
        self.gauge.count(lane)
    }
}

impl Progress for Counter<'_> {
    fn advance(&self, lane: Lane, len: u64, zero: u64) {
        if let Some(counts) = self.gauge.lanes.get(lane.index()) {
            counts.done.fetch_add(len, Ordering::Relaxed);
            counts.zero.fetch_add(zero, Ordering::Relaxed);
        }
        self.monitor.advance(lane, len, zero);
        if let Some(limit) = &self.limit {
            limit.wait(len - zero.min(len));
        }
    }
}

/// Limits the number of data bytes per second by making workers sleep.
struct RateLimit {
    started: Instant,
    bytes_per_second: u64,
    passed: AtomicU64,
}

impl RateLimit {
    fn new(bytes_per_second: u64) -> Self {
        Self { started: Instant::now(), bytes_per_second: bytes_per_second.max(1), passed: AtomicU64::new(0) }
    }

    fn wait(&self, len: u64) {
        let passed = self.passed.fetch_add(len, Ordering::Relaxed) + len;
        let due = Duration::from_secs_f64(passed as f64 / self.bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(self.started.elapsed()));
    }
}
