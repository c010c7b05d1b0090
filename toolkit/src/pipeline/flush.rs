//! Early writeback: what has been written goes to disk while the rest is still being copied.
//!
//! Left alone, a kernel keeps dirty pages until they are a tenth of memory, and the final flush then
//! waits for all of them. A thread of its own sends them on their way whenever enough has gathered;
//! there is none for files in memory. It waits for nothing and commits nothing to a journal: a real
//! flush in between took longer than it saved. What an output beyond a quarter of memory has on disk
//! leaves the page cache. The kernel keeps errors for the final flush.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;
use crate::storage::{Output, os};

/// Bytes written to an output that are worth being sent. Ours: at disk speeds of 0.3 to 2 GB/s so much
/// takes 15 to 100 ms, so that the final flush is short.
const WORTH_SENDING: u64 = 32 << 20;

/// How often to look.
const INTERVAL: Duration = Duration::from_millis(30);

/// How far an output has been sent to disk.
struct Sent {
    written: u64,
    reached: u64,
}

impl Sent {
    fn new(output: &Output) -> Self {
        Self { written: output.written(), reached: output.reached() }
    }

    /// Sends what was written since the last time, if that is enough. What lies further ahead than
    /// anything before is new; what was written over behind that is left to the kernel.
    fn send(&mut self, output: &Output, forget: bool) {
        let Some(file) = output.file() else { return };
        let now = Self::new(output);
        let len = now.reached - self.reached;
        if now.written - self.written < WORTH_SENDING || len == 0 {
            return;
        }
        os::forget_range(file, self.reached, len);
        if forget {
            os::forget_range(file, 0, self.reached);
        }
        *self = now;
    }
}

/// Sends outputs to disk in the background until it is stopped.
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
        let mut sent: Vec<Sent> = self.outputs.iter().map(Sent::new).collect();
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            drop(stopped);
            for (output, sent) in self.outputs.iter().zip(&mut sent) {
                sent.send(output, output.written() > much);
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
