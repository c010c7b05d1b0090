//! Progress on a terminal: a bar for each device and one for all.

use std::time::Duration;

use imgtool_toolkit::error::escape_control;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Counters, Sample};
use crate::report::{self, Stream, fit, human_size, percent, width};

/// Between two rounds: quick enough to look alive.
const INTERVAL: Duration = Duration::from_millis(100);

/// More devices than this share one bar: bars must not push what was said before off the screen.
const MAX_BARS: usize = 8;

/// Longest name in front of a bar.
const MAX_NAME: usize = 20;

/// A bar counts thousandths, so that devices of unknown length can have one too.
const STEPS: u64 = 1000;

/// How long until an older rate counts for a third: long enough to read the number.
const RATE_MEMORY: f64 = 3.0;

/// Bytes a second, smoothed.
#[derive(Debug, Default)]
pub(super) struct Rate {
    at: Duration,
    done: u64,
    rate: f64,
}

impl Rate {
    pub(super) fn update(&mut self, elapsed: Duration, done: u64) {
        let seconds = elapsed.saturating_sub(self.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let now = done.saturating_sub(self.done) as f64 / seconds;
        // The average so far at first, the last seconds later.
        let weight = (1.0 - (-seconds / RATE_MEMORY).exp()).max(seconds / elapsed.as_secs_f64());
        self.rate += (now - self.rate) * weight;
        (self.at, self.done) = (elapsed, done);
    }

    pub(super) fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
}

struct Row {
    bar: ProgressBar,
    name: String,
    rate: Rate,
    is_whole: bool,
}

pub(super) fn show(counters: &Counters) {
    let screen = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let each = counters.lanes.len() > 1 && counters.lanes.len() <= MAX_BARS;
    let row = |name: String, is_whole| {
        let bar = screen.add(ProgressBar::new(STEPS));
        bar.set_style(style());
        Row { bar, name, rate: Rate::default(), is_whole }
    };
    let mut rows: Vec<Row> = Vec::new();
    if each {
        rows.extend(counters.lanes.iter().map(|lane| row(escape_control(&lane.name), false)));
    }
    let mut whole = row(name_of_all(counters), true);
    while counters.wait(INTERVAL) {
        let line = Line::new(Stream::Err.columns().unwrap_or(80), rows.iter().chain([&whole]));
        let elapsed = counters.started.elapsed();
        for (row, lane) in rows.iter_mut().zip(&counters.lanes) {
            row.draw(counters.lane(lane), elapsed, &line);
        }
        whole.draw(counters.all(), elapsed, &line);
    }
    // The summary that follows says it better.
    let _ = screen.clear();
}

/// What the bar of everything is called. A conversion is what was asked for; other phases are told.
fn name_of_all(counters: &Counters) -> String {
    match (counters.phase, counters.lanes.as_slice()) {
        ("convert", [only]) => escape_control(&only.name),
        (phase, [only]) => format!("{phase} {}", escape_control(&only.name)),
        ("convert", _) => "all".to_owned(),
        (phase, _) => phase.to_owned(),
    }
}

impl Row {
    fn draw(&mut self, sample: Sample, elapsed: Duration, line: &Line) {
        self.rate.update(elapsed, sample.done);
        let share = sample.total.filter(|total| *total > 0).map_or(0.0, |t| sample.done as f64 / t as f64);
        self.bar.set_prefix(fit(&self.name, line.name));
        self.bar.set_message(line.words(sample, self.rate.bytes_per_second(), self.is_whole));
        self.bar.set_position((share * STEPS as f64) as u64);
    }
}

/// What has room in a line, the bar included. Every part has a width of its own, so that the bars
/// stay where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    name: usize,
    total: bool,
    rate: bool,
    left: bool,
    zero: bool,
}

/// Widths of the parts, the gap in front of them included.
const SHARE: usize = 6;
const TOTAL: usize = 13;
const RATE: usize = 12;
const LEFT: usize = 14;
const ZERO: usize = 12;

impl Line {
    fn new<'a>(columns: usize, rows: impl Iterator<Item = &'a Row>) -> Self {
        let longest = rows.map(|row| width(&row.name)).max().unwrap_or(0);
        Self::fitting(columns, longest)
    }

    /// The parts that have room beside a bar that still is one; the last of these go first: time
    /// left, rate, share of zeros, total.
    fn fitting(columns: usize, longest_name: usize) -> Self {
        let name = longest_name.min(MAX_NAME).min(columns / 4).max(1);
        let bar = if columns < 60 { 6 } else { 12 };
        // A gap on both sides of the bar; the last column stays empty: some terminals wrap there.
        let mut room = columns.saturating_sub(name + 1 + bar + SHARE + 1);
        let mut take = |wanted: usize| {
            let has = room >= wanted;
            room -= if has { wanted } else { 0 };
            has
        };
        let (left, rate, zero, total) = (take(LEFT), take(RATE), take(ZERO), take(TOTAL));
        Self { name, total, rate, left, zero }
    }

    fn words(&self, sample: Sample, rate: u64, is_whole: bool) -> String {
        let finished = sample.total == Some(sample.done);
        let mut text = match sample.total {
            Some(total) => format!("{:>width$}", percent(sample.done, total), width = SHARE - 1),
            None => human_size(sample.done),
        };
        if let (true, Some(total)) = (self.total, sample.total) {
            text.push_str(&format!("  of {:>8}", human_size(total)));
        }
        let state = match (finished, is_whole) {
            (true, true) => "finishing",
            (true, false) => "done",
            _ => "",
        };
        if self.rate {
            let shown = if finished || rate == 0 { String::new() } else { format!("{}/s", human_size(rate)) };
            text.push_str(&format!("  {shown:>10}"));
        }
        if self.left {
            let left = time_left(sample, rate).map(|left| format!("{left} left"));
            let shown = if finished { state.to_owned() } else { left.unwrap_or_default() };
            text.push_str(&format!("  {shown:>12}"));
        }
        if self.zero {
            let shown = match sample.done {
                0 => String::new(),
                done => format!("{} zero", percent(sample.zero, done)),
            };
            text.push_str(&format!("  {shown:>10}"));
        }
        text
    }
}

/// As on a clock: "0:07", "12:30", "1:02:03".
fn time_left(sample: Sample, rate: u64) -> Option<String> {
    let left = sample.total?.checked_sub(sample.done)?;
    let seconds = left.checked_div(rate)?;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    Some(match hours {
        0 => format!("{minutes}:{:02}", seconds % 60),
        1..100 => format!("{hours}:{minutes:02}:{:02}", seconds % 60),
        _ => ">4 days".to_owned(),
    })
}

fn style() -> ProgressStyle {
    let template = if Stream::Err.has_colours() {
        "{prefix} {wide_bar:.cyan} {msg}"
    } else {
        "{prefix} {wide_bar} {msg}"
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars(if report::unicode() { "█▉▊▋▌▍▎▏ " } else { "#>-" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_no_wider_than_the_terminal() {
        let samples = [
            Sample { done: 1, total: Some(1 << 40), zero: 0 },
            Sample { done: 1 << 39, total: Some(1 << 40), zero: 1 << 38 },
            Sample { done: 1 << 40, total: Some(1 << 40), zero: 1 << 40 },
        ];
        for columns in 30..200 {
            for longest in [3, 10, 200] {
                let line = Line::fitting(columns, longest);
                for sample in samples {
                    for rate in [0, 7, 1_047_527_424] {
                        let words = line.words(sample, rate, true);
                        let taken = line.name + 1 + 6 + 1 + width(&words);
                        assert!(taken < columns || columns < 32, "{columns}, {longest}: {words}");
                    }
                }
            }
        }
        let narrow = Line::fitting(40, 14);
        assert!(narrow.left && !narrow.rate && !narrow.zero && !narrow.total);
        let usual = Line::fitting(80, 14);
        assert!(usual.left && usual.rate && usual.zero && !usual.total);
        assert!(Line::fitting(100, 14).total);
    }

    #[test]
    fn time_is_a_clock() {
        let left = |left, rate| time_left(Sample { done: 0, total: Some(left), zero: 0 }, rate);
        assert_eq!(left(7, 1).as_deref(), Some("0:07"));
        assert_eq!(left(750, 1).as_deref(), Some("12:30"));
        assert_eq!(left(3723, 1).as_deref(), Some("1:02:03"));
        assert_eq!(left(u64::MAX, 1).as_deref(), Some(">4 days"));
        assert_eq!(left(7, 0), None);
    }

    #[test]
    fn rate_is_the_average_at_first() {
        let mut rate = Rate::default();
        rate.update(Duration::from_secs(1), 1000);
        assert_eq!(rate.bytes_per_second(), 1000);
    }
}
