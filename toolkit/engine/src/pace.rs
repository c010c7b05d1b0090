//! [`Pace`], which estimates the time that a phase still takes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::work::{Work, WorkUnit};

/// Maximum time constant in seconds of the average pace. Our limit: after it has filled the page cache, a
/// disk becomes slower, and the estimate must follow within minutes.
const MEMORY: f64 = 120.0;

/// Share of the work of a pipe over which its pace is measured. Our choice: nobody knows how much of the rest is data,
/// and the last part says more about it than the first. Disks often have their data in front.
const RECENT: f64 = 1.0 / 8.0;

/// Estimate of the time left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLeft {
    /// Time.
    pub time: Duration,
    /// Quality of the estimate.
    pub quality: Quality,
}

/// Quality of an estimate of the time left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    /// The amount of work left is known.
    Known,
    /// The rest of a pipe has an unknown amount of data. The estimate takes it for as much as so far.
    Rough,
    /// It may take longer: nothing has been copied yet, so only the time for reading the stream is known.
    Least,
}

/// Pace of a phase, from which follows the time that it still takes. The devices of a stream that are only
/// passed have a pace of their own.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    /// Time spent on copying, and work copied, at the last update.
    time: f64,
    copied: f64,
    /// Average number of bytes copied per second. The last part of the phase weighs most.
    rate: f64,
    /// Time and work copied at the last updates of a pipe, over the share [`RECENT`] of its work.
    recent: VecDeque<(f64, f64)>,
}

impl Pace {
    /// Creates the pace of a phase that begins.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of the work done in the time `elapsed` since the phase began. Returns the time left; `None`
    /// if it is unknown.
    pub fn update(&mut self, elapsed: Duration, work: &Work) -> Option<TimeLeft> {
        let time = elapsed.saturating_sub(work.passing).as_secs_f64();
        let copied = work.done.saturating_sub(work.passed) as f64;
        let step = time - self.time;
        if step > 0.0 {
            // An average over the whole phase in which each second weighs as much as its distance from the
            // start: the content that was read first says little about the rest.
            let weight = (2.0 * step / time).min(1.0).max(1.0 - (-step / MEMORY).exp());
            self.rate += ((copied - self.copied) / step - self.rate) * weight;
            (self.time, self.copied) = (time, copied);
        }
        if is_rough(work) {
            self.look_at_recent(work.expected.unwrap_or_default() as f64);
        }
        self.time_left(work)
    }

    /// Measures the pace of the last part of a pipe, of `expected` bytes.
    fn look_at_recent(&mut self, expected: f64) {
        let window = expected * RECENT;
        if self.recent.is_empty() {
            self.recent.push_back((0.0, 0.0));
        }
        // Few updates are kept, however often they come.
        let is_far = self.recent.back().is_some_and(|(_, copied)| self.copied - copied >= window / 16.0);
        if is_far {
            self.recent.push_back((self.time, self.copied));
        }
        while self.recent.get(1).is_some_and(|(_, copied)| *copied <= self.copied - window) {
            self.recent.pop_front();
        }
        if let Some((time, copied)) = self.recent.front().filter(|(time, _)| *time < self.time) {
            self.rate = (self.copied - copied) / (self.time - time);
        }
    }

    fn time_left(&self, work: &Work) -> Option<TimeLeft> {
        let left = work.expected?.saturating_sub(work.done);
        let to_pass = work.to_pass.min(left);
        // Until bytes were passed, the time for reading other bytes of the stream is the best estimate.
        let each = match work.passed {
            0 => work.reading.as_secs_f64() / work.done.max(1) as f64,
            passed => work.passing.as_secs_f64() / passed as f64,
        };
        let to_copy = (left - to_pass) as f64;
        let or_rough = |quality| if is_rough(work) { Quality::Rough } else { quality };
        let (copying, quality) = if self.rate > 0.0 || to_copy == 0.0 {
            (to_copy / self.rate.max(f64::MIN_POSITIVE), or_rough(Quality::Known))
        } else if each > 0.0 {
            (to_copy * each, or_rough(Quality::Least))
        } else {
            return None;
        };
        let seconds = to_pass as f64 * each + copying;
        Some(TimeLeft { time: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX), quality })
    }
}

/// True for a pipe: how much of its rest is data is unknown.
fn is_rough(work: &Work) -> bool {
    work.unit == WorkUnit::Guest && !work.reading.is_zero()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn work(done: u64, expected: u64) -> Work {
        let (passing, reading) = (Duration::ZERO, Duration::ZERO);
        Work { unit: WorkUnit::Data, done, expected: Some(expected), passed: 0, to_pass: 0, passing, reading }
    }

    /// Returns the time left in tenths of a second.
    fn tenths(left: Option<TimeLeft>) -> Option<(u128, Quality)> {
        left.map(|left| (left.time.as_millis().div_ceil(100), left.quality))
    }

    #[test]
    fn steady_pace_leaves_the_exact_time() {
        let mut pace = Pace::new();
        assert_eq!(pace.update(Duration::ZERO, &work(0, 1000)), None);
        for second in 1..10 {
            let left = pace.update(SECOND * second, &work(u64::from(second) * 100, 1000));
            assert_eq!(tenths(left), Some((u128::from(10 - second) * 10, Quality::Known)));
        }
    }

    #[test]
    fn unknown_work_has_no_time_left() {
        let unknown = Work { expected: None, ..work(50, 0) };
        assert_eq!(Pace::new().update(SECOND, &unknown), None);
    }

    #[test]
    fn a_slower_pace_is_believed_when_it_lasts() {
        let mut pace = Pace::new();
        for second in 1..=10 {
            pace.update(SECOND * second, &work(u64::from(second) * 100, 10_000));
        }
        let at_first = pace.rate;
        for second in 11..=40 {
            pace.update(SECOND * second, &work(1000 + u64::from(second - 10) * 10, 10_000));
        }
        assert!((99.0..101.0).contains(&at_first), "{at_first}");
        assert!((10.0..25.0).contains(&pace.rate), "{}", pace.rate);
    }

    #[test]
    fn passed_bytes_have_a_pace_of_their_own() {
        // 1000 bytes to copy at 10 per second and then 4000 to pass, whose reading takes a millisecond each.
        let reading = |done: u64| Duration::from_millis(done);
        let mut pace = Pace::new();
        let early = Work { to_pass: 4000, reading: reading(100), ..work(100, 5000) };
        assert_eq!(tenths(pace.update(SECOND * 10, &early)), Some((940, Quality::Known)));
        // The other way round: nothing has been copied yet.
        let mut pace = Pace::new();
        let passing = SECOND * 2;
        let early = Work { passed: 2000, to_pass: 2000, passing, reading: passing, ..work(2000, 5000) };
        assert_eq!(tenths(pace.update(passing, &early)), Some((30, Quality::Least)));
        let passing = SECOND * 4;
        let late = Work { passed: 4000, to_pass: 0, passing, reading: passing, ..work(4100, 5000) };
        assert_eq!(tenths(pace.update(SECOND * 14, &late)), Some((900, Quality::Known)));
    }

    /// Runs a pipe of parts (bytes, bytes per second) with an update each tenth of a second. Returns the shares of the
    /// work done, and of the error of the time left in the time that was left.
    fn errors_of_pipe(parts: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let all: f64 = parts.iter().map(|(bytes, _)| bytes).sum();
        let duration: f64 = parts.iter().map(|(bytes, rate)| bytes / rate).sum();
        let done_at = |time: f64| {
            let mut left = time;
            let mut done = 0.0;
            for (bytes, rate) in parts {
                let spent = left.min(bytes / rate);
                (left, done) = (left - spent, done + spent * rate);
            }
            done
        };
        let mut pace = Pace::new();
        let mut errors = Vec::new();
        for step in 1..(duration * 10.0) as u32 {
            let time = f64::from(step) / 10.0;
            let pipe = work(done_at(time) as u64, all as u64);
            let pipe = Work { unit: WorkUnit::Guest, reading: Duration::from_millis(1), ..pipe };
            let left = pace.update(Duration::from_secs_f64(time), &pipe).expect("a pace").time.as_secs_f64();
            errors.push((done_at(time) / all, (left - (duration - time)) / (duration - time)));
        }
        errors
    }

    #[test]
    fn the_last_part_of_a_pipe_tells_its_pace() {
        // Data alone; data in front of zeros; zeros in front of data; data between zeros.
        let (data, zeros) = (1e6, 5e7);
        for (parts, from) in [
            (&[(2e7, data)][..], 0.0),
            (&[(1e7, data), (9e7, zeros)], 0.3),
            (&[(5e7, zeros), (2e7, data)], 0.85),
            (&[(5e7, zeros), (1e7, data), (9e7, zeros)], 0.6),
        ] {
            for (done, error) in errors_of_pipe(parts) {
                assert!(done < from || error.abs() < 0.3, "{parts:?}: {error} at {done}");
            }
        }
    }

    #[test]
    fn a_pipe_of_unknown_content_has_a_rough_estimate() {
        let pipe = Work { unit: WorkUnit::Guest, reading: SECOND, ..work(100, 1000) };
        assert_eq!(tenths(Pace::new().update(SECOND, &pipe)), Some((90, Quality::Rough)));
        let passed = Work { passed: 100, passing: SECOND, ..pipe };
        assert_eq!(tenths(Pace::new().update(SECOND, &passed)), Some((90, Quality::Rough)));
    }
}
