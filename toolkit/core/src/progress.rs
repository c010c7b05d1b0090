//! [`Progress`], which receives the progress of a copy, and [`CancelToken`], which stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Lane;
use crate::error::{Error, Result};

/// Receives the progress of a copy. Many threads call it at once for every piece, so it must be fast.
pub trait Progress: Sync {
    /// Counts `len` more copied guest bytes in `lane`; `zero` of them were zeros that needed no data.
    fn advance(&self, lane: Lane, len: u64, zero: u64);
}

/// Ignores all progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _lane: Lane, _len: u64, _zero: u64) {}
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
