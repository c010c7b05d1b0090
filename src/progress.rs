//! Progress of a run: the workers advance counters, and a separate thread displays them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use imgtool_core::sync::lock;
use imgtool_core::{Lane as LaneId, Location, Result};
use imgtool_engine::{Gauge, Monitor, Pace, Phase, Quality, Reach, TimeLeft, Work, WorkUnit};
use imgtool_storage::Cleaner;

use crate::args::ProgressMode;
use crate::interrupt::Interrupt;
use crate::report::{self, Stream, human_size, percent};
use crate::{compat, sandbox, secrets};

mod bars;
mod json;
mod percent;
mod screen;

/// Name of the phase in which a stream is copied to temporary storage.
const SPOOL: &str = "temporary copy";

/// Progress of a lane, or of all lanes together, in guest bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sample {
    done: u64,
    total: Option<u64>,
    zero: u64,
}

/// Work and counts of a lane, or of all lanes together.
#[derive(Debug, Clone, Copy)]
struct Portion {
    work: Work,
    guest: Sample,
    /// Guest bytes that were read as data.
    data: u64,
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

    /// Returns the numbers of the lane at this index, or of all lanes together.
    fn part(&self, lane: Option<usize>) -> Portion {
        let data = |lane| self.gauge.data(lane);
        match lane.map(|index| LaneId(u32::try_from(index).unwrap_or(u32::MAX))) {
            Some(lane) => {
                let (done, zero) = self.gauge.count(lane);
                let total = self.gauge.lanes().nth(lane.index()).and_then(|info| info.total);
                let guest = Sample { done, total, zero };
                Portion { work: self.gauge.lane_work(lane), guest, data: data(lane) }
            }
            None => {
                let data = LaneId::first(self.gauge.lanes().len()).map(data).sum();
                Portion { work: self.gauge.work(), guest: self.all(), data }
            }
        }
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
    /// Time of the last update without any progress.
    begun: Duration,
    at: Duration,
    done: u64,
    rate: f64,
}

impl Rate {
    fn update(&mut self, elapsed: Duration, done: u64) {
        if done == 0 {
            (self.begun, self.at) = (elapsed, elapsed);
        }
        let seconds = elapsed.saturating_sub(self.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let now = done.saturating_sub(self.done) as f64 / seconds;
        // At first the average since the start, later a weighted average of the last few seconds.
        let since = elapsed.saturating_sub(self.begun).as_secs_f64();
        let weight = (1.0 - (-seconds / RATE_MEMORY).exp()).max(seconds / since);
        self.rate += (now - self.rate) * weight;
        (self.at, self.done) = (elapsed, done);
    }

    fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
}

/// Averages of a phase, for the lines that describe it.
#[derive(Default)]
struct Averages {
    speed: Rate,
    pace: Pace,
}

impl Averages {
    /// Describes the progress of a phase in one line.
    fn describe(&mut self, counters: &Counters) -> String {
        let Portion { work, guest, data } = counters.part(None);
        let elapsed = counters.started.elapsed();
        self.speed.update(elapsed, data);
        let share = match (work.expected, guest.total) {
            (Some(all), _) => {
                format!("{} of {}{}", percent(work.done, all), human_size(all), unit(work.unit))
            }
            // Nobody has added up the data.
            (None, Some(total)) => format!("{} of {}", percent(guest.done, total), human_size(total)),
            (None, None) => human_size(guest.done),
        };
        let left = self.pace.update(elapsed, &work).filter(|_| !work.is_done());
        let left = left.map(|left| format!("{} left, ", clock(left))).unwrap_or_default();
        let (speed, zero) = (human_size(self.speed.bytes_per_second()), percent(guest.zero, guest.done));
        format!("{}: {share}, {speed}/s, {left}{zero} zero", counters.phase)
    }
}

/// Returns the word for what is counted, after a size.
fn unit(unit: WorkUnit) -> &'static str {
    match unit {
        WorkUnit::Data => " data",
        WorkUnit::Input => " input",
        _ => "",
    }
}

/// Formats the time left: "0:07", "12:30", "1:02:03", "~0:07" for a rough estimate, ">0:07" if it may take
/// longer.
fn clock(left: TimeLeft) -> String {
    let seconds = left.time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let sign = match left.quality {
        Quality::Known => "",
        Quality::Rough => "~",
        Quality::Least => ">",
    };
    match hours {
        0 => format!("{sign}{minutes}:{:02}", seconds % 60),
        1..100 => format!("{sign}{hours}:{minutes:02}:{:02}", seconds % 60),
        _ => ">4 days".to_owned(),
    }
}

/// Describes the progress outside of all phases.
fn idle() -> Option<String> {
    (!compat::is_on()).then(|| "no data is being copied".to_owned())
}

/// Time between two lines of [`show_lines`].
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Displays progress without a terminal: prints a line at intervals, for logs.
fn show_lines(counters: &Counters) {
    let mut averages = Averages::default();
    while counters.wait(LINE_INTERVAL) {
        report::say(&format!("imgtool: {}", averages.describe(counters)));
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
            (ProgressMode::Percent, _) => Some(std::thread::spawn(move || percent::show(&shared))),
            (ProgressMode::Auto, false) | (ProgressMode::None, _) => None,
        };
        let is_live = matches!(mode, ProgressMode::Json | ProgressMode::Percent)
            || terminal && mode != ProgressMode::None;
        Self { counters, thread, is_live }
    }

    /// Returns the answer to a request for the progress: a line with the average rate, unless the progress is
    /// shown anyway.
    fn answer(&self) -> impl Fn() -> Option<String> + Send + 'static {
        let (counters, is_live) = (Arc::clone(&self.counters), self.is_live);
        move || match (is_live, compat::is_on()) {
            (true, _) => None,
            (false, true) => Some(percent::report(percent::of_guest(&counters))),
            (false, false) => Some(Averages::default().describe(&counters)),
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
    /// Phase that begins when no passphrase is needed any more.
    last_secret: Option<Phase>,
}

impl<'a> Display<'a> {
    /// Creates a display in this mode.
    pub fn new(mode: ProgressMode, interrupt: &'a Interrupt) -> Self {
        interrupt.set_describe(idle);
        Self { mode, interrupt, meter: Mutex::new(None), last_secret: None }
    }

    /// Overwrites all passphrases when `phase` begins: everything is open by then.
    pub fn forgetting_secrets_at(self, phase: Phase) -> Self {
        Self { last_secret: Some(phase), ..self }
    }

    fn take_meter(&self) -> Option<Meter> {
        self.interrupt.set_describe(idle);
        lock(&self.meter).take()
    }
}

impl Monitor for Display<'_> {
    fn begin(&self, phase: Phase, gauge: &Arc<Gauge>) {
        if self.last_secret == Some(phase) {
            secrets::forget_all();
        }
        let name = match phase {
            Phase::Spool => SPOOL,
            Phase::Verify => "verify",
            Phase::Compare => "compare",
            Phase::Checksum => "checksum",
            _ => "convert",
        };
        drop(self.take_meter());
        // Programs that parse percentages expect one phase.
        let mode = match (phase, self.mode) {
            (Phase::Spool, ProgressMode::Percent) => ProgressMode::None,
            (_, mode) => mode,
        };
        let meter = Meter::start(mode, name, Arc::clone(gauge));
        self.interrupt.set_describe(meter.answer());
        *lock(&self.meter) = Some(meter);
    }

    fn polls_work(&self) -> bool {
        match self.mode {
            ProgressMode::None => false,
            ProgressMode::Auto => Stream::Err.can_draw(),
            ProgressMode::Bar | ProgressMode::Json | ProgressMode::Percent => true,
        }
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
        report::warning(&format!("{target} was overwritten in place and is now incomplete"));
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

    #[test]
    fn time_before_the_first_byte_does_not_count() {
        let mut rate = Rate::default();
        for second in 0..=100 {
            rate.update(Duration::from_secs(second), 0);
        }
        rate.update(Duration::from_secs(101), 1000);
        assert_eq!(rate.bytes_per_second(), 1000);
    }

    #[test]
    fn time_left_reads_like_a_clock() {
        let left = |seconds, quality| clock(TimeLeft { time: Duration::from_secs(seconds), quality });
        assert_eq!(left(7, Quality::Known), "0:07");
        assert_eq!(left(750, Quality::Known), "12:30");
        assert_eq!(left(3723, Quality::Known), "1:02:03");
        assert_eq!(left(7, Quality::Rough), "~0:07");
        assert_eq!(left(7, Quality::Least), ">0:07");
        assert_eq!(left(u64::MAX, Quality::Least), ">4 days");
    }
}
