//! Progress as JSON lines.
//!
//! Each round prints a line for every device that has advanced, if there are several devices, and then one
//! for all of them together, whose `device` is null. Only the very last line reaches 100 %: while the outputs
//! are flushed and renamed, lines of the phase `finish` show that the program is alive.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use super::{Counters, Sample};
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
    elapsed: f64,
}

pub(super) fn show(counters: &Counters) {
    let mut shown: Vec<Sample> = counters.lanes().map(|_| Sample::default()).collect();
    while counters.wait(INTERVAL) {
        devices(counters, &mut shown);
        let all = counters.all();
        if all.total == Some(all.done) {
            line(counters, FINISH, None, Sample { total: None, ..all });
        } else {
            line(counters, counters.phase, None, all);
        }
    }
    if counters.complete.load(Ordering::Relaxed) {
        devices(counters, &mut shown);
        let all = counters.all();
        // At the end, the length of a stream is known.
        line(counters, counters.phase, None, Sample { total: Some(all.done), ..all });
    }
}

/// Prints the devices that have advanced. For a single device, the line for all is enough.
fn devices(counters: &Counters, shown: &mut [Sample]) {
    if shown.len() < 2 {
        return;
    }
    for ((name, sample), shown) in counters.lanes().zip(shown) {
        if sample.done != shown.done {
            *shown = sample;
            line(counters, counters.phase, Some(name), sample);
        }
    }
}

fn line(counters: &Counters, phase: &str, device: Option<&str>, sample: Sample) {
    let line = Line {
        phase,
        device,
        done: sample.done,
        total: sample.total,
        zero: sample.zero,
        written: counters.gauge.written(),
        elapsed: (counters.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    };
    if let Ok(text) = serde_json::to_string(&line) {
        report::say(&report::json_for_terminals(&text));
    }
}
