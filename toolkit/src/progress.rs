//! Progress and cancelling: how a conversion talks to whoever started it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::DeviceId;
use crate::error::{Error, Result};

/// Is told how far a conversion has come. Called by many threads at once; must be quick.
pub trait Progress: Sync {
    /// `len` more guest bytes of `device` are done, `zero` of them without data.
    fn advance(&self, device: DeviceId, len: u64, zero: u64);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _device: DeviceId, _len: u64, _zero: u64) {}
}

/// Stops a conversion from outside: clone it, keep one, give the other to the pipeline.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that has not been cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work to stop at its next piece.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error once it was asked to stop.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`].
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::cancelled("interrupted")) } else { Ok(()) }
    }
}
