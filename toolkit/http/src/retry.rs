//! [`Retry`], the budget of tries for one range of bytes.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use imgtool_core::Error;

/// First waiting time. It doubles with each try.
const FIRST: Duration = Duration::from_millis(100);

/// Longest waiting time, unless the server names one.
const LONGEST: Duration = Duration::from_secs(10);

/// Longest waiting time that a server may name. Our limit: a server that is busy for longer is unavailable.
const LONGEST_NAMED: Duration = Duration::from_secs(60);

/// Time after which a range must have progressed by [`MIN_RATE`] on average.
const GRACE: Duration = Duration::from_secs(60);

/// Minimum rate in bytes per second. Our limit: a modem is faster; a hostile server sends a byte a minute.
const MIN_RATE: u64 = 1024;

/// Number of tries in a row without a new byte, when a source is opened. Our choice: about a second, for a
/// server that restarts; a name with a mistake should not take longer.
pub(crate) const TRIES_TO_OPEN: u32 = 4;

/// Number of tries in a row without a new byte, while content is read. Our choice: about half a minute, for a
/// network that is gone for a moment.
pub(crate) const TRIES_TO_READ: u32 = 9;

/// Budget of tries for one range. Progress refills it.
#[derive(Debug)]
pub(crate) struct Retry {
    most: u32,
    left: u32,
    /// Time spent in requests.
    busy: Duration,
}

impl Retry {
    /// Creates a budget of `tries` tries.
    pub(crate) fn new(tries: u32) -> Self {
        Self { most: tries, left: tries, busy: Duration::ZERO }
    }

    /// Waits before the next try after a request that failed with `error`. `named` is the time that the
    /// server names.
    ///
    /// # Errors
    /// `error`, if no try is left.
    pub(crate) fn wait(
        &mut self,
        error: Error,
        named: Option<Duration>,
        progressed: bool,
    ) -> Result<(), Error> {
        if progressed {
            self.left = self.most;
        }
        self.left = self.left.saturating_sub(1);
        let tries = self.most - self.left;
        let is_too_long = named.is_some_and(|named| named > LONGEST_NAMED);
        if self.left == 0 || is_too_long {
            return Err(error.hint("another try may help"));
        }
        std::thread::sleep(named.unwrap_or_else(|| pause(tries)));
        Ok(())
    }

    /// Counts the time of a request, in which all `received` bytes of the range but the last have come.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unavailable`] for a server that is too slow.
    pub(crate) fn count(&mut self, spent: Duration, received: usize) -> Result<(), Error> {
        self.busy += spent;
        check_rate(self.busy, received)
    }
}

/// Refuses a server that sends almost nothing.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Unavailable`] for `received` bytes in `spent`.
pub(crate) fn check_rate(spent: Duration, received: usize) -> Result<(), Error> {
    if spent < GRACE || received as u64 / MIN_RATE >= spent.as_secs() {
        return Ok(());
    }
    Err(Error::unavailable(format!("the server sent only {received} bytes in {} s", spent.as_secs())))
}

/// Returns the waiting time before the next try: between half and all of a time that doubles, so that many
/// readers do not return at once.
fn pause(tries: u32) -> Duration {
    let longest = FIRST.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(LONGEST);
    let half = longest / 2;
    // The keys of a new hasher are random. Timing does not change what is read.
    let random = RandomState::new().hash_one(tries);
    half + half.mul_f64((random % 1024) as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_longer_with_each_try_and_gives_up() {
        for (tries, longest) in [(1, 100), (2, 200), (5, 1600), (9, 10_000), (400, 10_000)] {
            let pause = pause(tries).as_millis();
            assert!((longest / 2..=longest).contains(&pause), "{tries}: {pause} ms");
        }
        let mut retry = Retry::new(3);
        let error = || Error::unavailable("busy");
        let now = Some(Duration::ZERO);
        retry.wait(error(), now, false).expect("the first");
        retry.wait(error(), now, false).expect("the second");
        retry.wait(error(), now, true).expect("progress refills the budget");
        retry.wait(error(), now, false).expect("the second again");
        let error = retry.wait(error(), now, false).expect_err("the third");
        assert_eq!(error.hint_text().as_deref(), Some("another try may help"));
        let long = Some(Duration::from_secs(3600));
        assert!(Retry::new(9).wait(Error::unavailable("busy"), long, false).is_err());
    }

    #[test]
    fn refuses_a_server_that_sends_a_byte_a_second() {
        check_rate(Duration::from_secs(59), 0).expect("within the grace");
        check_rate(Duration::from_secs(100), 100 * 1024).expect("slow");
        let error = check_rate(Duration::from_secs(70), 70).expect_err("too slow");
        assert_eq!(error.message(), "the server sent only 70 bytes in 70 s");
    }
}
