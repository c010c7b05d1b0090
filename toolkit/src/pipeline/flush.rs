//! Early writeback: what has been written goes to disk while the rest is still being copied.
//!
//! Left alone, a kernel keeps dirty pages until they are a tenth of memory, and the final flush then
//! waits for all of them. A thread of its own flushes whenever enough has gathered; there is none for
//! files in memory. What an output beyond a quarter of memory has flushed leaves the page cache.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;
use crate::storage::{Output, os};

/// Unflushed bytes of an output that are worth a flush. Ours: at disk speeds of 0.3 to 2 GB/s a
/// flush of this size takes 50 to 300 ms, so that the last one is short.
const WORTH_FLUSHING: u64 = 96 << 20;

/// How often to look.
const INTERVAL: Duration = Duration::from_millis(30);

/// Flushes outputs in the background until it is stopped.
pub(super) struct Flusher {
    outputs: Vec<Output>,
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Flusher {
    /// For those of `outputs` that are files on a disk.
    pub(super) fn new<'a>(outputs: impl Iterator<Item = &'a Output>) -> Self {
        let mut files: Vec<Output> = Vec::new();
        for output in outputs {
            let on_disk = output.file().is_some_and(|file| !os::lives_in_memory(file));
            if on_disk && !files.iter().any(|known| known.is_same(output)) {
                files.push(output.clone());
            }
        }
        Self { outputs: files, stopped: Mutex::new(false), changed: Condvar::new() }
    }

    /// Whether there is anything to flush at all.
    pub(super) fn has_work(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// The thread's work; ends soon after [`StopWhenDropped`] is dropped.
    pub(super) fn work(&self) {
        let much = os::memory_len().map_or(u64::MAX, |memory| memory / 4);
        let mut flushed: Vec<u64> = self.outputs.iter().map(Output::written).collect();
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            drop(stopped);
            for (output, flushed) in self.outputs.iter().zip(&mut flushed) {
                let written = output.written();
                if written - *flushed >= WORTH_FLUSHING {
                    output.flush_early();
                    if let Some(file) = output.file().filter(|_| written > much) {
                        os::forget_range(file, 0, u64::MAX >> 1);
                    }
                    *flushed = written;
                }
            }
            stopped = lock(&self.stopped);
            if !*stopped {
                stopped =
                    self.changed.wait_timeout(stopped, INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Ends the work when the value goes out of scope, also by a panic.
    pub(super) fn stop_when_dropped(&self) -> StopWhenDropped<'_> {
        StopWhenDropped(self)
    }
}

pub(super) struct StopWhenDropped<'a>(&'a Flusher);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        *lock(&self.0.stopped) = true;
        self.0.changed.notify_all();
    }
}
