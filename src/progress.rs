//! Progress: counters that workers advance, and a thread that displays them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use imgtool_toolkit::{DeviceId, Progress};

use crate::args::ProgressMode;
use crate::report::{self, Stream, human_size, percent};

mod bars;
mod json;

/// Progress of one device.
pub struct Lane {
    /// The device's name in the image, not escaped.
    pub name: String,
    /// Guest bytes in total; `None` for a stream whose length is unknown.
    pub total: Option<u64>,
    done: AtomicU64,
    zero: AtomicU64,
}

impl Lane {
    /// A lane at its start.
    pub fn new(name: impl Into<String>, total: Option<u64>) -> Self {
        Self { name: name.into(), total, done: AtomicU64::new(0), zero: AtomicU64::new(0) }
    }
}

/// Snapshot of a lane, or of the sum of all lanes, in guest bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sample {
    done: u64,
    total: Option<u64>,
    zero: u64,
}

/// State shared by the workers and the display thread.
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

    /// Waits for the next update; false once the meter has stopped.
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

/// Limits the throughput (`-r`) by putting workers to sleep.
pub struct RateLimit {
    bytes_per_second: u64,
    passed: AtomicU64,
}

impl RateLimit {
    /// Limits the work to this many bytes per second, at least 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), passed: AtomicU64::new(0) }
    }

    fn wait(&self, started: Instant, len: u64) {
        let passed = self.passed.fetch_add(len, Ordering::Relaxed) + len;
        let due = Duration::from_secs_f64(passed as f64 / self.bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
}

/// Seconds after which the weight of an older rate has fallen to 1/e. Our choice: the number changes
/// slowly enough to read it.
const RATE_MEMORY: f64 = 3.0;

/// Smoothed rate in bytes per second.
#[derive(Debug, Default)]
struct Rate {
    at: Duration,
    done: u64,
    rate: f64,
}

impl Rate {
    fn update(&mut self, elapsed: Duration, done: u64) {
        let seconds = elapsed.saturating_sub(self.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let now = done.saturating_sub(self.done) as f64 / seconds;
        // The average since the start at first, that of the last seconds later.
        let weight = (1.0 - (-seconds / RATE_MEMORY).exp()).max(seconds / elapsed.as_secs_f64());
        self.rate += (now - self.rate) * weight;
        (self.at, self.done) = (elapsed, done);
    }

    fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
}

/// Time between two lines of [`show_lines`].
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Displays progress without a terminal: a line from time to time, for logs.
fn show_lines(counters: &Counters) {
    let mut rate = Rate::default();
    while counters.wait(LINE_INTERVAL) {
        let all = counters.all();
        rate.update(counters.started.elapsed(), all.done);
        let share = match all.total {
            Some(total) => format!("{} of {}", percent(all.done, total), human_size(total)),
            None => human_size(all.done),
        };
        let rate = human_size(rate.bytes_per_second());
        let zero = percent(all.zero, all.done);
        report::say(&format!("imgtool: {}: {share}, {rate}/s, {zero} zero", counters.phase));
    }
}

/// Displays the progress of the work until it is finished or dropped.
pub struct Meter {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Meter {
    /// Starts to display `lanes`, whose index is the id of the sink's device.
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
            (ProgressMode::Bar, false) => Some(std::thread::spawn(move || show_lines(&shared))),
            (ProgressMode::Json, _) => Some(std::thread::spawn(move || json::show(&shared))),
            (ProgressMode::Auto, false) | (ProgressMode::None, _) => None,
        };
        Self { counters, thread }
    }

    /// The receiver of the workers' reports.
    pub fn progress(&self) -> &dyn Progress {
        &*self.counters
    }

    /// Zero bytes of a device, out of [`Self::done`].
    pub fn zero(&self, device: usize) -> u64 {
        self.counters.lanes.get(device).map_or(0, |lane| lane.zero.load(Ordering::Relaxed))
    }

    /// Guest bytes of a device processed so far.
    pub fn done(&self, device: usize) -> u64 {
        self.counters.lanes.get(device).map_or(0, |lane| lane.done.load(Ordering::Relaxed))
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.counters.started.elapsed()
    }

    /// Marks the work as complete and stops the display.
    pub fn finish(&mut self) {
        self.counters.complete.store(true, Ordering::Relaxed);
        self.stop();
    }

    fn stop(&mut self) {
        *self.counters.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.counters.stopping.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in the display thread must not fail the work.
            let _ = thread.join();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_rate_is_the_average() {
        let mut rate = Rate::default();
        rate.update(Duration::from_secs(1), 1000);
        assert_eq!(rate.bytes_per_second(), 1000);
    }
}
