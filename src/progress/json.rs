//! Progress as JSON lines.
//!
//! Each round prints a line for every device that has advanced, if there are several devices, and then one
//! for all of them together, whose `device` is null. Only the very last line reaches 100 %: while the outputs
//! are flushed and renamed, lines of the phase `finish` show that the program is alive.

use std::sync::atomic::Ordering;
use std::time::Duration;

use imgtool_engine::{Pace, TimeLeft, Work};
use serde::Serialize;

use super::{Counters, Portion, Sample};
use crate::report;

/// Time between two rounds; docs/json.md promises at least one per second.
const INTERVAL: Duration = Duration::from_millis(500);

/// Name of the phase between the last copied byte and the completion of the outputs.
const FINISH: &str = "finish";

#[derive(Serialize)]
struct Line<'a> {
    phase: &'a str,
    device: Option<&'a str>,
    done: u64,
    total: Option<u64>,
    zero: u64,
    written: u64,
    #[serde(rename = "work-done")]
    work_done: u64,
    #[serde(rename = "work-total")]
    work_total: Option<u64>,
    left: Option<f64>,
    elapsed: f64,
}

pub(super) fn show(counters: &Counters) {
    let mut shown: Vec<Sample> = counters.lanes().map(|_| Sample::default()).collect();
    let mut pace = Pace::new();
    while counters.wait(INTERVAL) {
        devices(counters, &mut shown);
        let Portion { guest: all, work, .. } = counters.part(None);
        let left = pace.update(counters.started.elapsed(), &work);
        if all.total == Some(all.done) {
            line(counters, FINISH, None, Sample { total: None, ..all }, &work, None);
        } else {
            line(counters, counters.phase, None, all, &work, left);
        }
    }
    if counters.complete.load(Ordering::Relaxed) {
        devices(counters, &mut shown);
        let Portion { guest: all, work, .. } = counters.part(None);
        // At the end, the length of a stream is known.
        line(counters, counters.phase, None, Sample { total: Some(all.done), ..all }, &work, None);
    }
}

/// Prints the devices that have advanced. For a single device, the line for all is enough.
fn devices(counters: &Counters, shown: &mut [Sample]) {
    if shown.len() < 2 {
        return;
    }
    for ((index, (name, sample)), shown) in counters.lanes().enumerate().zip(shown) {
        if sample.done != shown.done {
            *shown = sample;
            line(counters, counters.phase, Some(name), sample, &counters.part(Some(index)).work, None);
        }
    }
}

fn line(
    counters: &Counters,
    phase: &str,
    device: Option<&str>,
    sample: Sample,
    work: &Work,
    left: Option<TimeLeft>,
) {
    let rounded = |time: Duration| (time.as_secs_f64() * 1000.0).round() / 1000.0;
    let line = Line {
        phase,
        device,
        done: sample.done,
        total: sample.total,
        zero: sample.zero,
        written: counters.gauge.written(),
        work_done: work.done,
        work_total: work.expected,
        left: left.map(|left| rounded(left.time)),
        elapsed: rounded(counters.started.elapsed()),
    };
    report::json_line(&line);
}
