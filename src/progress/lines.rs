//! Progress where there is no terminal: a line now and then, for logs.

use std::time::Duration;

use super::{Counters, bars::Rate};
use crate::report::{human_size, percent, say};

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

pub(super) fn show(counters: &Counters) {
    let mut rate = Rate::default();
    while counters.wait(INTERVAL) {
        let all = counters.all();
        rate.update(counters.started.elapsed(), all.done);
        let share = match all.total {
            Some(total) => format!("{} of {}", percent(all.done, total), human_size(total)),
            None => human_size(all.done),
        };
        let rate = human_size(rate.bytes_per_second());
        let zero = percent(all.zero, all.done);
        say(&format!("imgtool: {}: {share}, {rate}/s, {zero} zero", counters.phase));
    }
}
