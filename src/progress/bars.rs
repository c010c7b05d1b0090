//! Progress on a terminal: a bar for each device and one for all.

use std::time::Duration;

use imgtool_toolkit::error::escape_control;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Counters, Sample};
use crate::report::{human_size, human_time, percent};

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
    rate: Rate,
    finished: bool,
}

pub(super) fn show(counters: &Counters) {
    let screen = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let each = counters.lanes.len() > 1 && counters.lanes.len() <= MAX_BARS;
    let name_width = name_width(counters, each);
    let row = |name: &str| {
        let bar = screen.add(ProgressBar::new(STEPS));
        bar.set_style(style());
        bar.set_prefix(fit(name, name_width));
        Row { bar, rate: Rate::default(), finished: false }
    };
    let mut rows: Vec<Row> = Vec::new();
    if each {
        rows.extend(counters.lanes.iter().map(|lane| row(&lane.name)));
    }
    let mut whole = row(match counters.lanes.as_slice() {
        [only] => &only.name,
        _ => "all",
    });
    while counters.wait(INTERVAL) {
        let columns = columns();
        let elapsed = counters.started.elapsed();
        for (row, lane) in rows.iter_mut().zip(&counters.lanes) {
            row.draw(counters.lane(lane), elapsed, columns);
        }
        whole.draw(counters.all(), elapsed, columns);
    }
    // The summary that follows says it better.
    let _ = screen.clear();
}

impl Row {
    fn draw(&mut self, sample: Sample, elapsed: Duration, columns: usize) {
        if self.finished {
            return;
        }
        self.rate.update(elapsed, sample.done);
        let share = sample.total.filter(|total| *total > 0).map_or(0.0, |t| sample.done as f64 / t as f64);
        self.bar.set_position((share * STEPS as f64) as u64);
        self.finished = sample.total == Some(sample.done);
        self.bar.set_message(self.message(sample, columns));
    }

    /// As much as the terminal has room for.
    fn message(&self, sample: Sample, columns: usize) -> String {
        let rate = self.rate.bytes_per_second();
        let mut parts = Vec::new();
        match sample.total {
            Some(total) => {
                parts.push(format!("{:>5}", percent(sample.done, total)));
                if columns >= 76 {
                    parts.push(format!("of {:>8}", human_size(total)));
                }
            }
            None => parts.push(human_size(sample.done)),
        }
        if self.finished {
            parts.push("done".to_owned());
        } else if sample.done > 0 {
            if columns >= 60 {
                parts.push(format!("{:>8}/s", human_size(rate)));
            }
            if let Some(left) = time_left(sample, rate) {
                parts.push(format!("{left} left"));
            }
        }
        if columns >= 96 && sample.done > 0 {
            parts.push(format!("{} zero", percent(sample.zero, sample.done)));
        }
        parts.join("  ")
    }
}

fn time_left(sample: Sample, rate: u64) -> Option<String> {
    let left = sample.total?.checked_sub(sample.done)?;
    let seconds = left.checked_div(rate)?;
    Some(human_time(Duration::from_secs(seconds)).replace(".0 s", " s"))
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {wide_bar} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▉▊▋▌▍▎▏ ")
}

/// The terminal's width; 80 when it does not say.
fn columns() -> usize {
    terminal_size::terminal_size_of(std::io::stderr()).map_or(80, |(width, _)| usize::from(width.0))
}

fn name_width(counters: &Counters, each: bool) -> usize {
    let longest =
        counters.lanes.iter().map(|lane| escape_control(&lane.name).chars().count()).max().unwrap_or(0);
    let wanted = if each || counters.lanes.len() == 1 { longest.max(3) } else { 3 };
    wanted.min(MAX_NAME).min(columns() / 4)
}

/// A name in exactly `width` characters.
fn fit(name: &str, width: usize) -> String {
    let name = escape_control(name);
    if name.chars().count() <= width {
        format!("{name:<width$}")
    } else {
        let kept: String = name.chars().take(width.saturating_sub(1)).collect();
        format!("{kept}…")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit() {
        assert_eq!(fit("a", 3), "a  ");
        assert_eq!(fit("drive-scsi0", 8), "drive-s…");
    }

    #[test]
    fn rate_is_the_average_at_first() {
        let mut rate = Rate::default();
        rate.update(Duration::from_secs(1), 1000);
        assert_eq!(rate.bytes_per_second(), 1000);
    }
}
