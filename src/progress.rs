//! Progress: counters that workers add to, and a thread that shows them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use imgtool_toolkit::{DeviceId, Progress};

use crate::args::ProgressMode;
use crate::report::Stream;

mod bars;
mod json;
mod lines;

/// One device under way.
pub struct Lane {
    /// Its name as the image gives it.
    pub name: String,
    /// Guest bytes in all; `None` while the end is not known.
    pub total: Option<u64>,
    done: AtomicU64,
    zero: AtomicU64,
}

impl Lane {
    /// A device of which nothing is done yet.
    pub fn new(name: impl Into<String>, total: Option<u64>) -> Self {
        Self { name: name.into(), total, done: AtomicU64::new(0), zero: AtomicU64::new(0) }
    }
}

/// How far something has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sample {
    done: u64,
    total: Option<u64>,
    zero: u64,
}

/// What workers and the showing thread share.
struct Counters {
    phase: &'static str,
    started: Instant,
    lanes: Vec<Lane>,
    written: Box<dyn Fn() -> u64 + Send + Sync>,
    limit: Option<RateLimit>,
    stop: Mutex<bool>,
    stopping: Condvar,
    complete: AtomicBool,
}

impl Counters {
    fn lane(&self, lane: &Lane) -> Sample {
        let done = lane.done.load(Ordering::Relaxed);
        Sample { done, total: lane.total, zero: lane.zero.load(Ordering::Relaxed) }
    }

    fn all(&self) -> Sample {
        self.lanes.iter().map(|lane| self.lane(lane)).fold(
            Sample { total: Some(0), ..Sample::default() },
            |sum, lane| Sample {
                done: sum.done + lane.done,
                total: sum.total.zip(lane.total).map(|(a, b)| a.saturating_add(b)),
                zero: sum.zero + lane.zero,
            },
        )
    }

    /// Waits for the next moment to show something; false when there is no more.
    fn wait(&self, interval: Duration) -> bool {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let (stop, _) = self
            .stopping
            .wait_timeout_while(stop, interval, |stop| !*stop)
            .unwrap_or_else(PoisonError::into_inner);
        !*stop
    }
}

impl Progress for Counters {
    fn advance(&self, device: DeviceId, len: u64, zero: u64) {
        if let Some(lane) = self.lanes.get(device.0 as usize) {
            lane.done.fetch_add(len, Ordering::Relaxed);
            lane.zero.fetch_add(zero, Ordering::Relaxed);
        }
        if let Some(limit) = &self.limit {
            limit.wait(self.started, len - zero.min(len));
        }
    }
}

/// Keeps the work at or below a number of bytes a second (`-r`), by letting workers sleep.
pub struct RateLimit {
    bytes_per_second: u64,
    passed: AtomicU64,
}

impl RateLimit {
    /// At most this many bytes a second, at least 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), passed: AtomicU64::new(0) }
    }

    fn wait(&self, started: Instant, len: u64) {
        let passed = self.passed.fetch_add(len, Ordering::Relaxed) + len;
        let due = Duration::from_secs_f64(passed as f64 / self.bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
}

/// Shows how far the work has come until it is finished or dropped.
pub struct Meter {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Meter {
    /// Begins to show the progress of `lanes`, numbered as the sink's devices are.
    pub fn start(
        mode: ProgressMode,
        phase: &'static str,
        lanes: Vec<Lane>,
        limit: Option<RateLimit>,
        written: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        let counters = Arc::new(Counters {
            phase,
            started: Instant::now(),
            lanes,
            written: Box::new(written),
            limit,
            stop: Mutex::new(false),
            stopping: Condvar::new(),
            complete: AtomicBool::new(false),
        });
        let shared = Arc::clone(&counters);
        let terminal = Stream::Err.can_draw();
        let thread = match (mode, terminal) {
            (ProgressMode::Auto | ProgressMode::Bar, true) => {
                Some(std::thread::spawn(move || bars::show(&shared)))
            }
            (ProgressMode::Bar, false) => Some(std::thread::spawn(move || lines::show(&shared))),
            (ProgressMode::Json, _) => Some(std::thread::spawn(move || json::show(&shared))),
            (ProgressMode::Auto, false) | (ProgressMode::None, _) => None,
        };
        Self { counters, thread }
    }

    /// What the work reports to.
    pub fn progress(&self) -> &dyn Progress {
        &*self.counters
    }

    /// Zero bytes of a device so far.
    pub fn zero(&self, device: usize) -> u64 {
        self.counters.lanes.get(device).map_or(0, |lane| lane.zero.load(Ordering::Relaxed))
    }

    /// Bytes of a device so far.
    pub fn done(&self, device: usize) -> u64 {
        self.counters.lanes.get(device).map_or(0, |lane| lane.done.load(Ordering::Relaxed))
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.counters.started.elapsed()
    }

    /// The work is complete.
    pub fn finish(&mut self) {
        self.counters.complete.store(true, Ordering::Relaxed);
        self.stop();
    }

    fn stop(&mut self) {
        *self.counters.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.counters.stopping.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in the showing thread costs the progress, not the work.
            let _ = thread.join();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop();
    }
}
