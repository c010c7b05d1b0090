//! Signals: the first one asks the work to stop; if it does not, or at the second, what is
//! unfinished is removed and the program ends.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use imgtool_toolkit::storage::Cleaner;
use imgtool_toolkit::{CancelToken, Error, Result};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

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
    /// The outputs have their names: what is asked for is done, whatever comes now.
    named: AtomicBool,
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
            named: AtomicBool::new(false),
            signals: AtomicU32::new(0),
        }));
        let failed = |e| Error::io("listen to signals", e);
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
        // Who started this with nohup wants it to outlive the terminal.
        if !is_ignored(SIGHUP) {
            signals.add_signal(SIGHUP).map_err(failed)?;
        }
        let handler = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || signals.forever().for_each(|signal| handler.signalled(signal)))
            .map_err(failed)?;
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

    /// Runs the step that gives outputs their names; signals wait for its end, and are too late when it
    /// was a good one.
    pub fn shielded<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let _naming = lock(&self.0.naming);
        let done = step()?;
        self.0.named.store(true, Ordering::SeqCst);
        Ok(done)
    }

    fn signalled(&self, signal: i32) {
        self.0.cancel.cancel();
        if self.0.signals.fetch_add(1, Ordering::SeqCst) > 0 {
            self.give_up();
            // All is done but telling so, maybe to somebody who does not listen.
            std::thread::sleep(PATIENCE);
            // Should this fail, the next signal may do it.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        let watchdog = self.clone();
        let started = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(PATIENCE);
            watchdog.give_up();
        });
        if started.is_err() {
            self.give_up();
        }
    }

    /// Ends the program, unless its outputs have their names by now.
    fn give_up(&self) {
        let _naming = lock(&self.0.naming);
        if self.0.named.load(Ordering::SeqCst) {
            return;
        }
        if let Some(cleaner) = &*lock(&self.0.cleaner) {
            cleaner.clean();
        }
        report::error(&Error::cancelled("interrupted"));
        std::process::exit(i32::from(Exit::Failed.code()));
    }
}

/// Makes a write beyond the limit for file sizes (`ulimit -f`) an error like any other: by default
/// the kernel ends the program, which leaves its unfinished outputs behind.
pub fn file_size_limit_is_an_error() {
    // Nobody looks at the flag. Should this fail, the limit ends the program as it always did.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// Whether whoever started the program had it ignore this signal. Linux tells (proc(5), SigIgn).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
