//! Progress on a terminal: a bar for each device and one for all devices together.

use std::time::Duration;

use imgtool_core::error::escape_control;
use imgtool_engine::{Pace, Quality, TimeLeft, Work, WorkUnit};

use super::screen::{Line, Screen};
use super::{Counters, Portion, Rate, SPOOL, Sample, clock, unit};
use crate::report::{Stream, fit, human_size, percent, width};

/// Time between two updates. Our choice: short enough to look smooth.
const INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of devices with a bar each; if there are more, only the bar for all of them is drawn. Our
/// limit: bars must not push earlier messages off the screen.
const MAX_BARS: usize = 8;

/// Maximum number of columns for the name before a bar. Our limit.
const MAX_NAME: usize = 20;

struct Row {
    name: String,
    /// Data copied per second.
    speed: Rate,
    pace: RowPace,
}

/// Pace of a row, for the time left.
enum RowPace {
    /// The row of a device. It may begin late, so the last seconds count.
    Device(Rate),
    /// The row of all devices.
    Whole(Pace),
}

/// Numbers that a row shows.
#[derive(Debug, Clone, Copy)]
struct Figures {
    work: Work,
    guest: Sample,
    /// Bytes of data per second.
    speed: u64,
    left: Option<TimeLeft>,
}

pub(super) fn show(counters: &Counters) {
    let mut rows = rows_of(counters);
    let count = rows.len();
    let mut screen = Screen::default();
    let mut size = (80, 24);
    while counters.wait(INTERVAL) {
        size = (Stream::Err.columns().unwrap_or(size.0), Stream::Err.lines().unwrap_or(size.1));
        let layout = LineLayout::new(size.0, &rows);
        let elapsed = counters.started.elapsed();
        let line = |(index, row): (usize, &mut Row)| {
            let is_device = index + 1 < count;
            row.line(counters.part(is_device.then_some(index)), elapsed, &layout)
        };
        let lines: Vec<Line> = rows.iter_mut().enumerate().map(line).collect();
        screen.draw(&lines, size.0, size.1);
    }
    // The summary takes the place of the bars.
    screen.clear(Stream::Err.columns().unwrap_or(size.0));
}

/// Returns the rows: one for each device if there are several but not many, and one for all of them.
fn rows_of(counters: &Counters) -> Vec<Row> {
    let row = |name, pace| Row { name, speed: Rate::default(), pace };
    let mut rows: Vec<Row> = Vec::new();
    if (2..=MAX_BARS).contains(&counters.lanes().len()) {
        let device = |(name, _): (&str, Sample)| row(escape_control(name), RowPace::Device(Rate::default()));
        rows.extend(counters.lanes().map(device));
    }
    rows.push(row(name_of_all(counters), RowPace::Whole(Pace::new())));
    rows
}

/// Returns the name of the bar for all devices. It contains the phase, except for `convert`.
fn name_of_all(counters: &Counters) -> String {
    let mut lanes = counters.lanes();
    let only = lanes.next().filter(|_| lanes.len() == 0).map(|(name, _)| escape_control(name));
    match (counters.phase, only) {
        ("convert", Some(only)) => only,
        (SPOOL, _) => SPOOL.to_owned(),
        (phase, Some(only)) => format!("{phase} {only}"),
        ("convert", None) => "all".to_owned(),
        (phase, None) => phase.to_owned(),
    }
}

impl Row {
    fn line(&mut self, part: Portion, elapsed: Duration, layout: &LineLayout) -> Line {
        let Portion { work, guest, data } = part;
        self.speed.update(elapsed, data);
        let left = match &mut self.pace {
            RowPace::Whole(pace) => pace.update(elapsed, &work),
            RowPace::Device(rate) => {
                rate.update(elapsed, work.done);
                // In a stream, the disks' guest bytes say little about the time.
                let expected = work.expected.filter(|_| work.unit == WorkUnit::Data);
                let left = expected.map(|expected| expected.saturating_sub(work.done));
                let seconds = left.and_then(|left| left.checked_div(rate.bytes_per_second()));
                seconds.map(|s| TimeLeft { time: Duration::from_secs(s), quality: Quality::Known })
            }
        };
        let share = work.expected.filter(|all| *all > 0).map_or(0.0, |all| work.done as f64 / all as f64);
        let figures = Figures { work, guest, speed: self.speed.bytes_per_second(), left };
        let words = layout.words(&figures, matches!(self.pace, RowPace::Whole(_)));
        Line { name: fit(&self.name, layout.name), bar: layout.bar, share, words }
    }
}

/// Layout of a line: the width of the name and the parts that fit. Every part has a fixed width, so that
/// the bars are aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LineLayout {
    name: usize,
    bar: usize,
    total: bool,
    rate: bool,
    left: bool,
    zero: bool,
}

// Widths of the parts in columns, including the gap before each.
const SHARE: usize = 6;
const TOTAL: usize = 19;
const RATE: usize = 12;
const LEFT: usize = 16;
const ZERO: usize = 12;

impl LineLayout {
    fn new(columns: usize, rows: &[Row]) -> Self {
        let longest = rows.iter().map(|row| width(&row.name)).max().unwrap_or(0);
        Self::fitting(columns, longest)
    }

    /// Selects the parts that fit beside a bar of a useful length, in order of importance: time left, rate,
    /// share of zeros, total.
    fn fitting(columns: usize, longest_name: usize) -> Self {
        let name = longest_name.min(MAX_NAME).min(columns / 4).max(1);
        let bar = if columns < 60 { 6 } else { 12 };
        // A gap on both sides of the bar. The last column stays empty: some terminals wrap there, and others
        // join a full line and the next one when they are resized.
        let mut free = columns.saturating_sub(name + 1 + bar + SHARE + 1);
        let mut reserve = |width: usize| {
            let fits = free >= width;
            free -= if fits { width } else { 0 };
            fits
        };
        let (left, rate, zero, total) = (reserve(LEFT), reserve(RATE), reserve(ZERO), reserve(TOTAL));
        Self { name, bar: bar + free, total, rate, left, zero }
    }

    fn words(&self, figures: &Figures, is_whole: bool) -> String {
        let Figures { work, guest, speed, left } = *figures;
        let mut text = match work.expected {
            Some(expected) => format!("{:>width$}", percent(work.done, expected), width = SHARE - 1),
            None => format!("{:>width$}", short_size(guest.done), width = SHARE - 1),
        };
        if self.total {
            let size = |all| format!("of {:>8}{}", human_size(all), unit(work.unit));
            text.push_str(&format!("  {:<17}", work.expected.map(size).unwrap_or_default()));
        }
        let state = match (work.is_done(), is_whole) {
            (true, true) => Some("finishing"),
            (true, false) => Some("done"),
            (false, _) => None,
        };
        if self.rate {
            let rate = Some(speed).filter(|speed| *speed > 0 && state.is_none());
            let shown = rate.map(|speed| format!("{}/s", human_size(speed))).unwrap_or_default();
            text.push_str(&format!("  {shown:>10}"));
        }
        if self.left {
            let left = left.map(|left| format!("{} left", clock(left))).unwrap_or_default();
            text.push_str(&format!("  {:>14}", state.unwrap_or(&left)));
        }
        if self.zero {
            let shown = match guest.done {
                0 => String::new(),
                done => format!("{} zero", percent(guest.zero, done)),
            };
            text.push_str(&format!("  {shown:>10}"));
        }
        text
    }
}

/// Formats a size in at most five columns: "1.02G".
fn short_size(bytes: u64) -> String {
    human_size(bytes).replace([' ', 'i', 'B'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(done: u64, zero: u64, speed: u64, seconds: u64, quality: Quality) -> Figures {
        let time = Duration::from_secs(seconds);
        let work = Work {
            unit: WorkUnit::Input,
            done,
            expected: Some(1 << 40),
            passed: 0,
            to_pass: 0,
            passing: Duration::ZERO,
            reading: Duration::ZERO,
        };
        let guest = Sample { done, total: Some(1 << 40), zero };
        Figures { work, guest, speed, left: Some(TimeLeft { time, quality }) }
    }

    #[test]
    fn lines_fit_the_terminal() {
        let samples = [(1, 0), (1 << 39, 1 << 38), (1 << 40, 1 << 40)];
        for columns in 30..200 {
            for longest in [3, 10, 200] {
                let line = LineLayout::fitting(columns, longest);
                for (done, zero) in samples {
                    for (speed, seconds) in [(0, 7), (7, 359_999), (1_047_527_424, u64::MAX)] {
                        let words = line.words(&figures(done, zero, speed, seconds, Quality::Least), true);
                        let used = line.name + 1 + line.bar + 1 + width(&words);
                        assert!(used == columns - 1 || columns < 32, "{columns}, {longest}: {words}");
                    }
                }
            }
        }
        let narrow = LineLayout::fitting(40, 14);
        assert!(narrow.left && !narrow.rate && !narrow.zero && !narrow.total);
        let usual = LineLayout::fitting(80, 14);
        assert!(usual.left && usual.rate && usual.zero && !usual.total);
        assert!(LineLayout::fitting(100, 14).total);
    }

    #[test]
    fn parts_of_a_line_are_aligned() {
        let line = LineLayout::fitting(120, 14);
        let of = |figures: &Figures| width(&line.words(figures, true));
        let early = figures(1, 0, 0, 7, Quality::Least);
        let late = figures(1 << 39, 1 << 38, 7 << 20, 3723, Quality::Known);
        assert_eq!(of(&early), of(&late));
        assert_eq!(of(&early), of(&figures(1 << 40, 0, 0, 0, Quality::Known)));
        let unknown = Work { expected: None, ..late.work };
        assert_eq!(of(&early), of(&Figures { work: unknown, left: None, ..late }));
    }

    #[test]
    fn unknown_totals_show_a_short_size() {
        assert_eq!([0, 1000, 1_047_527_424, 99 << 30].map(short_size), ["0", "0.98K", "999M", "99G"]);
        assert!((0..64).all(|bits| width(&short_size(u64::MAX >> bits)) < SHARE));
    }
}
