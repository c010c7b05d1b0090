//! Limit on the number of data bytes per second.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use imgtool_core::CancelToken;
use imgtool_core::sync::lock;

/// Time by which the copy may be late and still make up for it. Our limit: longer than a worker is late after
/// a wait, but short enough that a pause of the source is not followed by a burst.
const CATCH_UP: Duration = Duration::from_millis(250);

/// Time between two looks at the cancel token. Our choice.
const PATIENCE: Duration = Duration::from_millis(100);

/// Limits the speed by making workers wait before they read.
#[derive(Debug)]
pub(crate) struct RateLimit {
    started: Instant,
    bytes_per_second: u64,
    cancel: CancelToken,
    schedule: Mutex<Schedule>,
}

impl RateLimit {
    pub(crate) fn new(bytes_per_second: u64, cancel: CancelToken) -> Self {
        let schedule = Mutex::new(Schedule::default());
        Self { started: Instant::now(), bytes_per_second: bytes_per_second.max(1), cancel, schedule }
    }

    /// Waits until `len` more bytes are within the limit, or the run is cancelled.
    pub(crate) fn wait(&self, len: u64) {
        if len == 0 {
            return;
        }
        let cost = Duration::try_from_secs_f64(len as f64 / self.bytes_per_second as f64);
        let due = lock(&self.schedule).reserve(self.started.elapsed(), cost.unwrap_or(Duration::MAX));
        while !self.cancel.is_cancelled() {
            match due.saturating_sub(self.started.elapsed()) {
                Duration::ZERO => return,
                left => std::thread::sleep(left.min(PATIENCE)),
            }
        }
    }
}

/// Times at which bytes may be read, since the start.
#[derive(Debug, Default)]
struct Schedule {
    /// Time until which the bytes reserved so far take.
    taken: Duration,
}

impl Schedule {
    /// Reserves bytes that take the time `cost` at the limit. Returns the time from which they may be read.
    fn reserve(&mut self, now: Duration, cost: Duration) -> Duration {
        self.taken = self.taken.max(now.saturating_sub(CATCH_UP)).saturating_add(cost);
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bytes_wait_for_their_own_time() {
        let mut schedule = Schedule::default();
        // Three workers ask at once.
        let due = [(); 3].map(|()| schedule.reserve(Duration::ZERO, SECOND));
        assert_eq!(due, [SECOND, SECOND * 2, SECOND * 3]);
    }

    #[test]
    fn a_pause_is_not_followed_by_a_burst() {
        let mut schedule = Schedule::default();
        schedule.reserve(Duration::ZERO, SECOND);
        let resumed = SECOND * 60;
        let due = [(); 2].map(|()| schedule.reserve(resumed, SECOND));
        assert_eq!(due, [resumed - CATCH_UP + SECOND, resumed - CATCH_UP + SECOND * 2]);
    }

    #[test]
    fn a_worker_that_is_late_catches_up() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.reserve(Duration::ZERO, SECOND), SECOND);
        let late = SECOND + Duration::from_millis(10);
        assert_eq!(schedule.reserve(late, SECOND), SECOND * 2);
    }

    #[test]
    fn a_cancelled_run_does_not_wait() {
        let cancel = CancelToken::new();
        cancel.cancel();
        // A wait would take 30 million years.
        RateLimit::new(1, cancel).wait(1 << 50);
    }
}
