//! Progress of a run: the workers advance counters, and a separate thread displays them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use imgtool_core::sync::lock;
use imgtool_core::{Lane as LaneId, Location, Result};
use imgtool_engine::{Gauge, Monitor, Phase, Reach};
use imgtool_storage::Cleaner;

use crate::args::ProgressMode;
use crate::interrupt::Interrupt;
use crate::report::{self, Stream, human_size, percent};
use crate::sandbox;

mod bars;
mod json;

/// Progress of a lane, or of all lanes together, in guest bytes.
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
    gauge: Arc<Gauge>,
    stop: Mutex<bool>,
    stopping: Condvar,
    complete: AtomicBool,
}

impl Counters {
    /// Returns the name and the progress of every lane.
    fn lanes(&self) -> impl ExactSizeIterator<Item = (&str, Sample)> {
        self.gauge.lanes().enumerate().map(|(index, info)| {
            let lane = LaneId(u32::try_from(index).unwrap_or(u32::MAX));
            let (done, zero) = self.gauge.count(lane);
            (&*info.name, Sample { done, total: info.total, zero })
        })
    }

    fn all(&self) -> Sample {
        self.lanes().map(|(_, sample)| sample).fold(
            Sample { total: Some(0), ..Sample::default() },
            |sum, lane| Sample {
                done: sum.done + lane.done,
                total: sum.total.zip(lane.total).map(|(a, b)| a.saturating_add(b)),
                zero: sum.zero + lane.zero,
            },
        )
    }

    /// Waits for the next update. Returns false if the meter has stopped.
    fn wait(&self, interval: Duration) -> bool {
        let stop = lock(&self.stop);
        let (stop, _) = self
            .stopping
            .wait_timeout_while(stop, interval, |stop| !*stop)
            .unwrap_or_else(PoisonError::into_inner);
        !*stop
    }
}

/// Seconds after which the weight of an older rate has fallen to 1/e. Our choice: the displayed rate then
/// changes slowly enough to be read.
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
        // At first the average since the start, later a weighted average of the last few seconds.
        let weight = (1.0 - (-seconds / RATE_MEMORY).exp()).max(seconds / elapsed.as_secs_f64());
        self.rate += (now - self.rate) * weight;
        (self.at, self.done) = (elapsed, done);
    }

    fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
}

/// Describes the progress of a phase in one line.
fn describe(counters: &Counters, bytes_per_second: u64) -> String {
    let all = counters.all();
    let share = match all.total {
        Some(total) => format!("{} of {}", percent(all.done, total), human_size(total)),
        None => human_size(all.done),
    };
    let (rate, zero) = (human_size(bytes_per_second), percent(all.zero, all.done));
    format!("{}: {share}, {rate}/s, {zero} zero", counters.phase)
}

/// Describes the progress outside of all phases.
fn idle() -> Option<String> {
    Some("no data is being copied".to_owned())
}

/// Time between two lines of [`show_lines`].
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Displays progress without a terminal: prints a line at intervals, for logs.
fn show_lines(counters: &Counters) {
    let mut rate = Rate::default();
    while counters.wait(LINE_INTERVAL) {
        rate.update(counters.started.elapsed(), counters.all().done);
        report::say(&format!("imgtool: {}", describe(counters, rate.bytes_per_second())));
    }
}

/// Display of one phase. It stops when it is finished or dropped.
struct Meter {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
    /// True if the display shows the progress all the time.
    is_live: bool,
}

impl Meter {
    fn start(mode: ProgressMode, phase: &'static str, gauge: Arc<Gauge>) -> Self {
        let counters = Arc::new(Counters {
            phase,
            started: Instant::now(),
            gauge,
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
        let is_live = mode == ProgressMode::Json || terminal && mode != ProgressMode::None;
        Self { counters, thread, is_live }
    }

    /// Returns the answer to a request for the progress: a line with the average rate, unless the progress is
    /// shown anyway.
    fn answer(&self) -> impl Fn() -> Option<String> + Send + 'static {
        let (counters, is_live) = (Arc::clone(&self.counters), self.is_live);
        move || {
            let mut rate = Rate::default();
            rate.update(counters.started.elapsed(), counters.all().done);
            (!is_live).then(|| describe(&counters, rate.bytes_per_second()))
        }
    }

    /// Marks the phase as complete and stops the display.
    fn finish(self) {
        self.counters.complete.store(true, Ordering::Relaxed);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        *lock(&self.counters.stop) = true;
        self.counters.stopping.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in the display thread must not fail the work.
            let _ = thread.join();
        }
    }
}

/// Monitor of the program's runs: displays progress, and tells the signal handler about the outputs.
pub struct Display<'a> {
    mode: ProgressMode,
    interrupt: &'a Interrupt,
    meter: Mutex<Option<Meter>>,
}

impl<'a> Display<'a> {
    /// Creates a display in this mode.
    pub fn new(mode: ProgressMode, interrupt: &'a Interrupt) -> Self {
        interrupt.set_describe(idle);
        Self { mode, interrupt, meter: Mutex::new(None) }
    }

    fn take_meter(&self) -> Option<Meter> {
        self.interrupt.set_describe(idle);
        lock(&self.meter).take()
    }
}

impl Monitor for Display<'_> {
    fn begin(&self, phase: Phase, gauge: &Arc<Gauge>) {
        let name = match phase {
            Phase::Verify => "verify",
            Phase::Compare => "compare",
            Phase::Checksum => "checksum",
            _ => "convert",
        };
        drop(self.take_meter());
        let meter = Meter::start(self.mode, name, Arc::clone(gauge));
        self.interrupt.set_describe(meter.answer());
        *lock(&self.meter) = Some(meter);
    }

    fn end(&self) {
        if let Some(meter) = self.take_meter() {
            meter.finish();
        }
    }

    fn outputs(&self, cleaner: Cleaner) {
        self.interrupt.set_cleaner(cleaner);
    }

    fn opened(&self, reach: &Reach) {
        sandbox::narrow(reach);
    }

    fn name_outputs(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.interrupt.shielded(step)
    }

    fn warn(&self, note: &str) {
        report::note(note);
    }

    fn left_incomplete(&self, target: &Location) {
        // The bars must not be drawn over the note.
        drop(self.take_meter());
        report::note(&format!("{target} was overwritten in place and is now incomplete"));
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
