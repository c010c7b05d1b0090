//! Progress for programs: one JSON object a line.
//!
//! Each round prints a line for every device that has moved, where there are several, then one for
//! all of them, whose `device` is null. The line of the whole that says 100 % is printed once, as the
//! last: while outputs are being flushed and named before it, lines of the phase `finish` say that
//! the program is alive.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use super::{Counters, Sample};
use crate::report;

/// Between two rounds; the contract is at least one a second.
const INTERVAL: Duration = Duration::from_millis(500);

/// All bytes have been copied, and the outputs are not finished yet.
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
    let mut shown: Vec<Sample> = counters.lanes.iter().map(|_| Sample::default()).collect();
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
        // The end is the end, also of streams whose length nobody knew.
        line(counters, counters.phase, None, Sample { total: Some(all.done), ..all });
    }
}

/// Of a single device the line of the whole says everything.
fn devices(counters: &Counters, shown: &mut [Sample]) {
    if shown.len() < 2 {
        return;
    }
    for (lane, shown) in counters.lanes.iter().zip(shown) {
        let sample = counters.lane(lane);
        if sample.done != shown.done {
            *shown = sample;
            line(counters, counters.phase, Some(&lane.name), sample);
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
        written: (counters.written)(),
        elapsed: (counters.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    };
    if let Ok(text) = serde_json::to_string(&line) {
        report::say(&report::json_for_terminals(&text));
    }
}
