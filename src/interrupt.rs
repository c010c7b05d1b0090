//! Signals: the first one asks the work to stop; if it does not, or at the second, what is
//! unfinished is removed and the program ends.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use imgtool_toolkit::storage::Cleaner;
use imgtool_toolkit::{CancelToken, Error, Result};

use crate::exit::Exit;
use crate::report;

/// How long the work has to stop by itself. Ours: a piece takes milliseconds; what takes longer is
/// a read that is waiting for somebody.
const PATIENCE: Duration = Duration::from_secs(2);

/// Stops the work of this program when SIGINT, SIGTERM or SIGHUP comes.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

struct Shared {
    cancel: CancelToken,
    cleaner: Mutex<Option<Cleaner>>,
    /// Held while outputs get their names (an exit then would leave some without), and by whoever
    /// ends the program.
    naming: Mutex<()>,
    signals: AtomicU32,
}

impl Interrupt {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the system does not let it.
    pub fn listen() -> Result<Self> {
        let interrupt = Self(Arc::new(Shared {
            cancel: CancelToken::new(),
            cleaner: Mutex::new(None),
            naming: Mutex::new(()),
            signals: AtomicU32::new(0),
        }));
        let handler = interrupt.clone();
        ctrlc::set_handler(move || handler.signalled())
            .map_err(|e| Error::io("listen to signals", std::io::Error::other(e)))?;
        Ok(interrupt)
    }

    /// The token that the work looks at.
    pub fn token(&self) -> CancelToken {
        self.0.cancel.clone()
    }

    /// What has to be removed when the work does not stop by itself.
    pub fn cleans(&self, cleaner: Cleaner) {
        *lock(&self.0.cleaner) = Some(cleaner);
    }

    /// Runs the step that gives outputs their names; signals wait for its end.
    pub fn shielded<T>(&self, step: impl FnOnce() -> T) -> T {
        let _naming = lock(&self.0.naming);
        step()
    }

    fn signalled(&self) {
        self.0.cancel.cancel();
        if self.0.signals.fetch_add(1, Ordering::SeqCst) > 0 {
            self.give_up();
        }
        let watchdog = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            watchdog.give_up();
        });
    }

    fn give_up(&self) {
        let _naming = lock(&self.0.naming);
        if let Some(cleaner) = &*lock(&self.0.cleaner) {
            cleaner.clean();
        }
        report::error(&Error::cancelled("interrupted"));
        std::process::exit(i32::from(Exit::Failed.code()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
