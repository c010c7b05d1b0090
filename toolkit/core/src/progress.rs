//! [`Progress`], which receives the progress of a copy, and [`CancelToken`], which stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::device::Lane;
use crate::error::{Error, Result};

/// Receives the progress of a copy. Many threads call it at once for every piece, so it must be fast.
pub trait Progress: Sync {
    /// Counts a part of a device that has reached its target.
    fn advance(&self, lane: Lane, copied: Copied);

    /// Counts a piece of a stream, which took the time `spent` to read. One thread at a time calls it, in the
    /// order of the stream. `lane` is `None` for a device that is not copied.
    fn streamed(&self, _lane: Option<Lane>, _read: Copied, _spent: Duration) {}

    /// Called before `data` bytes of data are read, or passed on from a stream. Waits if a limit on the speed
    /// requires it.
    fn throttle(&self, _data: u64) {}
}

/// Numbers of bytes of a part of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Guest bytes.
    pub guest: u64,
    /// Guest bytes that were read as data, zeros among them. The others are holes or known zeros.
    pub data: u64,
    /// Guest bytes that were zeros and needed no data in the target.
    pub zero: u64,
}

/// Ignores all progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _lane: Lane, _copied: Copied) {}
}

/// Cancels an operation from another thread. All clones share one state.
#[derive(Debug, Clone, Default)]
pub struct CancelToken {
    cancelled: Arc<AtomicBool>,
    /// Token whose cancellation also cancels this one.
    parent: Option<Arc<CancelToken>>,
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a token for a part of the operation that can be cancelled separately. Cancelling `self` also
    /// cancels it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { cancelled: Arc::default(), parent: Some(Arc::new(self.clone())) }
    }

    /// Cancels the operation, which stops at its next piece. Every later read of its inputs fails.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True if this token or a parent of it has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self.parent.as_ref().is_some_and(|parent| parent.is_cancelled())
    }

    /// Returns a [`crate::ErrorKind::Cancelled`] error if the token is cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::cancelled("interrupted")) } else { Ok(()) }
    }
}
