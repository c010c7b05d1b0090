//! [`Progress`], which receives the progress of a copy, and [`CancelToken`], which stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Lane;
use crate::error::{Error, Result};

/// Receives the progress of a copy. Many threads call it at once, for every piece, so it must be fast.
pub trait Progress: Sync {
    /// Reports `len` more guest bytes as copied; `zero` of them were zeros without data.
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
    /// The token that cancels this one, too.
    parent: Option<Arc<CancelToken>>,
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a token for a part of the work, which may end early. Cancelling this token cancels it, too.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { cancelled: Arc::default(), parent: Some(Arc::new(self.clone())) }
    }

    /// Cancels: the operation stops at its next piece, and every later read of its inputs fails.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True once [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self.parent.as_ref().is_some_and(|parent| parent.is_cancelled())
    }

    /// Returns an error of [`crate::ErrorKind::Cancelled`] once [`CancelToken::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::cancelled("interrupted")) } else { Ok(()) }
    }
}
