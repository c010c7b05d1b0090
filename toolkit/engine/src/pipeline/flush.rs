//! Early writeback: a background thread starts writing finished data to disk while the copy continues.
//!
//! By default, Linux keeps dirty pages until they take up a tenth of memory, and the final flush waits for
//! all of them. The thread starts writeback whenever enough bytes are written to a file on disk. It neither
//! waits for the disk nor commits a journal: real flushes took longer than they saved (measured). Once a
//! quarter of memory has been written to an output, it drops older pages of the output from the page cache.
//! The kernel reports write errors at the final flush.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use imgtool_core::Output;
use imgtool_core::sync::lock;
use imgtool_storage::os;

/// Number of bytes written to an output before writeback starts. Our choice: 15 to 100 ms of work for a disk
/// (2 to 0.3 GB/s), so the final flush is short.
const WRITEBACK_LEN: u64 = 32 << 20;

/// Time between two checks of the outputs. Our choice.
const INTERVAL: Duration = Duration::from_millis(30);

/// Progress of an output when writeback was last started.
struct Writeback {
    /// Number of bytes written to the output.
    written: u64,
    /// Highest file offset at which a write ended, in bytes.
    reached: u64,
}

impl Writeback {
    fn new(output: &Output) -> Self {
        Self { written: output.written(), reached: output.reached() }
    }

    /// Starts writeback of the range by which the output has grown, if enough bytes were written. Leaves
    /// overwritten ranges before it to the kernel. With `forget`, drops older pages from the page cache.
    fn advance(&mut self, output: &Output, forget: bool) {
        let Some(file) = output.file() else { return };
        let now = Self::new(output);
        let len = now.reached - self.reached;
        if now.written - self.written < WRITEBACK_LEN || len == 0 {
            return;
        }
        os::forget_range(file, self.reached, len);
        if forget {
            os::forget_range(file, 0, self.reached);
        }
        *self = now;
    }
}

/// The background thread that starts writeback of the outputs.
pub(super) struct Flusher {
    outputs: Vec<Output>,
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Flusher {
    /// Creates a flusher for the outputs that are files on disk.
    pub(super) fn new(outputs: &[&Output]) -> Self {
        let mut files: Vec<Output> = Vec::new();
        for output in outputs {
            let on_disk = output.file().is_some_and(|file| !os::lives_in_memory(file));
            if on_disk && !files.iter().any(|known| known.is_same(output)) {
                files.push((*output).clone());
            }
        }
        Self { outputs: files, stopped: Mutex::new(false), changed: Condvar::new() }
    }

    /// True if any output is a file on disk.
    pub(super) fn has_work(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// Runs the thread's loop until [`StopWhenDropped`] is dropped.
    pub(super) fn work(&self) {
        let forget_beyond = os::memory_len().map_or(u64::MAX, |memory| memory / 4);
        let mut writebacks: Vec<Writeback> = self.outputs.iter().map(Writeback::new).collect();
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            drop(stopped);
            for (output, writeback) in self.outputs.iter().zip(&mut writebacks) {
                writeback.advance(output, output.written() > forget_beyond);
            }
            stopped = lock(&self.stopped);
            if !*stopped {
                stopped =
                    self.changed.wait_timeout(stopped, INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Returns a guard that ends the loop when dropped, even during a panic.
    pub(super) fn stop_when_dropped(&self) -> StopWhenDropped<'_> {
        StopWhenDropped(self)
    }
}

/// Ends the loop of a [`Flusher`] when dropped.
pub(super) struct StopWhenDropped<'a>(&'a Flusher);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        *lock(&self.0.stopped) = true;
        self.0.changed.notify_all();
    }
}
