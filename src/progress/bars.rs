//! Progress on a terminal: a bar for each device and one for all devices together.

use std::time::Duration;

use imgtool_core::error::escape_control;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Counters, Rate, Sample};
use crate::report::{self, Stream, fit, human_size, percent, width};

/// Time between two updates. Our choice: short enough to look smooth.
const INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of devices with a bar each; if there are more, only the bar for all of them is drawn. Our
/// limit: bars must not push earlier messages off the screen.
const MAX_BARS: usize = 8;

/// Maximum number of columns for the name before a bar. Our limit.
const MAX_NAME: usize = 20;

/// Number of steps in a bar: thousandths instead of bytes, since the length of a device may be unknown.
const STEPS: u64 = 1000;

struct Row {
    bar: ProgressBar,
    name: String,
    rate: Rate,
    is_whole: bool,
}

pub(super) fn show(counters: &Counters) {
    let screen = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let each = (2..=MAX_BARS).contains(&counters.lanes().len());
    let row = |name: String, is_whole| {
        let bar = screen.add(ProgressBar::new(STEPS));
        bar.set_style(style());
        Row { bar, name, rate: Rate::default(), is_whole }
    };
    let mut rows: Vec<Row> = Vec::new();
    if each {
        rows.extend(counters.lanes().map(|(name, _)| row(escape_control(name), false)));
    }
    let mut whole = row(name_of_all(counters), true);
    while counters.wait(INTERVAL) {
        let line = LineLayout::new(Stream::Err.columns().unwrap_or(80), rows.iter().chain([&whole]));
        let elapsed = counters.started.elapsed();
        for (row, (_, sample)) in rows.iter_mut().zip(counters.lanes()) {
            row.draw(sample, elapsed, &line);
        }
        whole.draw(counters.all(), elapsed, &line);
    }
    // The summary takes the place of the bars.
    let _ = screen.clear();
}

/// Returns the name of the bar for all devices. It contains the phase, except for `convert`.
fn name_of_all(counters: &Counters) -> String {
    let mut lanes = counters.lanes();
    let only = lanes.next().filter(|_| lanes.len() == 0).map(|(name, _)| escape_control(name));
    match (counters.phase, only) {
        ("convert", Some(only)) => only,
        (phase, Some(only)) => format!("{phase} {only}"),
        ("convert", None) => "all".to_owned(),
        (phase, None) => phase.to_owned(),
    }
}

impl Row {
    fn draw(&mut self, sample: Sample, elapsed: Duration, line: &LineLayout) {
        self.rate.update(elapsed, sample.done);
        let share = sample.total.filter(|total| *total > 0).map_or(0.0, |t| sample.done as f64 / t as f64);
        self.bar.set_prefix(fit(&self.name, line.name));
        self.bar.set_message(line.words(sample, self.rate.bytes_per_second(), self.is_whole));
        self.bar.set_position((share * STEPS as f64) as u64);
    }
}

/// Layout of a line: the width of the name and the parts that fit. Every part has a fixed width, so that
/// the bars are aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LineLayout {
    name: usize,
    total: bool,
    rate: bool,
    left: bool,
    zero: bool,
}

// Widths of the parts in columns, including the gap before each.
const SHARE: usize = 6;
const TOTAL: usize = 13;
const RATE: usize = 12;
const LEFT: usize = 14;
const ZERO: usize = 12;

impl LineLayout {
    fn new<'a>(columns: usize, rows: impl Iterator<Item = &'a Row>) -> Self {
        let longest = rows.map(|row| width(&row.name)).max().unwrap_or(0);
        Self::fitting(columns, longest)
    }

    /// Selects the parts that fit beside a bar of a useful length, in order of importance: time left, rate,
    /// share of zeros, total.
    fn fitting(columns: usize, longest_name: usize) -> Self {
        let name = longest_name.min(MAX_NAME).min(columns / 4).max(1);
        let bar = if columns < 60 { 6 } else { 12 };
        // A gap on both sides of the bar; the last column stays empty, as some terminals wrap there.
        let mut free = columns.saturating_sub(name + 1 + bar + SHARE + 1);
        let mut reserve = |width: usize| {
            let fits = free >= width;
            free -= if fits { width } else { 0 };
            fits
        };
        let (left, rate, zero, total) = (reserve(LEFT), reserve(RATE), reserve(ZERO), reserve(TOTAL));
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

/// Estimates the time to the end ("0:07", "12:30", "1:02:03"); `None` if the total or the rate is unknown.
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
    fn lines_fit_the_terminal() {
        let samples = [
            Sample { done: 1, total: Some(1 << 40), zero: 0 },
            Sample { done: 1 << 39, total: Some(1 << 40), zero: 1 << 38 },
            Sample { done: 1 << 40, total: Some(1 << 40), zero: 1 << 40 },
        ];
        for columns in 30..200 {
            for longest in [3, 10, 200] {
                let line = LineLayout::fitting(columns, longest);
                for sample in samples {
                    for rate in [0, 7, 1_047_527_424] {
                        let words = line.words(sample, rate, true);
                        let used = line.name + 1 + 6 + 1 + width(&words);
                        assert!(used < columns || columns < 32, "{columns}, {longest}: {words}");
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
    fn time_left_reads_like_a_clock() {
        let left = |left, rate| time_left(Sample { done: 0, total: Some(left), zero: 0 }, rate);
        assert_eq!(left(7, 1).as_deref(), Some("0:07"));
        assert_eq!(left(750, 1).as_deref(), Some("12:30"));
        assert_eq!(left(3723, 1).as_deref(), Some("1:02:03"));
        assert_eq!(left(u64::MAX, 1).as_deref(), Some(">4 days"));
        assert_eq!(left(7, 0), None);
    }
}
