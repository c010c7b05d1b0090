//! Signal handling. The first signal cancels the work. If the work does not stop in time, or a second signal
//! comes, the handler removes unfinished outputs and exits the program.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use imgtool_core::sync::lock;
use imgtool_core::{CancelToken, Error, Result};
use imgtool_storage::Cleaner;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use crate::exit::Exit;
use crate::report;

/// Time that the work has to stop after the first signal. Our limit: a piece takes milliseconds; only a
/// read that waits for a pipe or a network takes longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Stops the work of this program on SIGINT, SIGTERM or SIGHUP.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

struct Shared {
    cancel: CancelToken,
    cleaner: Mutex<Option<Cleaner>>,
    /// Held while the outputs are renamed, since an exit in between would leave only some of them with their
    /// final names. Also held during the exit.
    naming: Mutex<()>,
    /// True if all outputs have their final names. Signals no longer make the run fail then.
    named: AtomicBool,
    /// Number of signals so far.
    signals: AtomicU32,
    /// Exit code of an interrupted run.
    failed: Exit,
}

impl Interrupt {
    /// Installs the handlers and starts the thread that serves them. An interrupted run exits with
    /// [`Exit::Failed`].
    pub fn listen() -> Result<Self> {
        Self::listen_for(Exit::Failed)
    }

    /// Like [`Self::listen`], with another exit code for an interrupted run.
    pub fn listen_for(failed: Exit) -> Result<Self> {
        let interrupt = Self(Arc::new(Shared {
            cancel: CancelToken::new(),
            cleaner: Mutex::new(None),
            naming: Mutex::new(()),
            named: AtomicBool::new(false),
            signals: AtomicU32::new(0),
            failed,
        }));
        let failed = |e| Error::io("set up signal handling", e);
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
        // Under nohup the program must outlive the terminal.
        if !is_ignored(SIGHUP) {
            signals.add_signal(SIGHUP).map_err(failed)?;
        }
        let handler = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || signals.forever().for_each(|signal| handler.handle(signal)))
            .map_err(failed)?;
        Ok(interrupt)
    }

    /// Returns the token that the work polls.
    pub fn token(&self) -> CancelToken {
        self.0.cancel.clone()
    }

    /// Sets the cleaner that removes unfinished outputs if the work does not stop by itself.
    pub fn set_cleaner(&self, cleaner: Cleaner) {
        *lock(&self.0.cleaner) = Some(cleaner);
    }

    /// Runs the step that renames the outputs. An exit by a signal waits for its end. After the step has
    /// succeeded, signals no longer affect the result.
    pub fn shielded<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let _naming = lock(&self.0.naming);
        let value = step()?;
        self.0.named.store(true, Ordering::SeqCst);
        Ok(value)
    }

    fn handle(&self, signal: i32) {
        self.0.cancel.cancel();
        if self.0.signals.fetch_add(1, Ordering::SeqCst) > 0 {
            self.abort();
            // The outputs are complete; only the report is missing, perhaps because the reader of a pipe does
            // not read.
            std::thread::sleep(PATIENCE);
            // If this fails, the next signal tries again.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        let watchdog = self.clone();
        let started = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(PATIENCE);
            watchdog.abort();
        });
        if started.is_err() {
            self.abort();
        }
    }

    /// Removes unfinished outputs and exits, unless all outputs already have their final names.
    fn abort(&self) {
        let _naming = lock(&self.0.naming);
        if self.0.named.load(Ordering::SeqCst) {
            return;
        }
        if let Some(cleaner) = &*lock(&self.0.cleaner) {
            cleaner.clean();
        }
        report::error(&Error::cancelled("interrupted"));
        std::process::exit(i32::from(self.0.failed.code()));
    }
}

/// Turns a write beyond the file size limit (`ulimit -f`) into an error. By default the kernel kills
/// the program with SIGXFSZ, which leaves its unfinished outputs behind.
pub fn handle_file_size_limit() {
    // The flag is never read. If the call fails, the kernel's default stays in force.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// True if the program was started with this signal ignored, as under nohup (proc(5), SigIgn).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
