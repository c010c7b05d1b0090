//! Progress in the form of qemu-img, on standard output, for programs that parse it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Counters;
use crate::report as output;

/// Time between two looks at the counters. Our choice.
const INTERVAL: Duration = Duration::from_millis(100);

/// Minimum number of percent between two reports, as in qemu-img.
const STEP: f64 = 1.0;

pub(super) fn show(counters: &Counters) {
    let mut shown = 0.0;
    line(shown);
    while counters.wait(INTERVAL) {
        let all = counters.part(None).work;
        let total = all.expected.filter(|total| *total > 0);
        let percent = total.map_or(0.0, |total| all.done as f64 * 100.0 / total as f64);
        // The last report follows when the outputs have their names.
        if percent - shown >= STEP && percent < 100.0 {
            line(percent);
            shown = percent;
        }
    }
    if counters.complete.load(Ordering::Relaxed) {
        line(100.0);
    }
    print("\n");
}

fn line(percent: f64) {
    print(&format!("{}\r", report(percent)));
}

/// Returns a report without its end.
pub(super) fn report(percent: f64) -> String {
    format!("    ({percent:.2}/100%)")
}

/// Returns the percentage by the guest bytes: nobody has added up the data.
pub(super) fn of_guest(counters: &Counters) -> f64 {
    let guest = counters.all();
    let total = guest.total.filter(|total| *total > 0);
    total.map_or(0.0, |total| guest.done as f64 * 100.0 / total as f64)
}

/// Prints a report. A failure can't be reported anywhere.
fn print(text: &str) {
    let _ = output::print(text);
}
