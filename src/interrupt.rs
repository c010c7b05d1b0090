//! Signal handling. The first signal cancels the work. If the work does not stop in time, or a second signal
//! comes, the handler removes unfinished outputs. Then the program dies of the signal: a shell that runs a loop
//! stops at Ctrl-C only if the program did not exit by itself.
//!
//! Signals that the parent process ignores stay ignored (nohup, jobs in the background of a script). These end the
//! program without a clean-up, as SIGKILL does: SIGIO, SIGPWR, SIGSTKFLT and real-time signals, which nobody sends
//! to such a program, and those that report a fault in it. SIGPIPE is ignored by Rust's runtime, so a reader that
//! leaves is an error of the write.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use imgtool_core::sync::lock;
use imgtool_core::{CancelToken, Error, Result};
use imgtool_storage::Cleaner;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::exit::Exit;
use crate::{compat, report};

/// Signals that end the program after a clean-up.
const ENDING: [i32; 9] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR2, SIGXCPU];

/// Time that the work has to stop after the first signal. Our limit: a piece takes milliseconds; only a
/// read that waits for a pipe or a network takes longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// First signal that ended the work before all outputs had their names; 0 for none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Describes the progress in one line; `None` if it is shown anyway.
type Describe = dyn Fn() -> Option<String> + Send;

/// Stops the work of this program on a signal.
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
    /// Answer to SIGUSR1; `None` in a command without progress.
    describe: Mutex<Option<Box<Describe>>>,
}

impl Interrupt {
    /// Installs the handlers and starts the thread that serves them.
    pub fn listen() -> Result<Self> {
        let interrupt = Self(Arc::new(Shared {
            cancel: CancelToken::new(),
            cleaner: Mutex::new(None),
            naming: Mutex::new(()),
            named: AtomicBool::new(false),
            signals: AtomicU32::new(0),
            describe: Mutex::new(None),
        }));
        let failed = |e| Error::io("set up signal handling", e);
        let ignored = ignored_signals();
        let handled = ENDING.into_iter().chain([SIGUSR1]).filter(|signal| !is_in(ignored, *signal));
        let mut signals = Signals::new(handled).map_err(failed)?;
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

    /// Sets the answer to SIGUSR1.
    pub fn set_describe(&self, describe: impl Fn() -> Option<String> + Send + 'static) {
        *lock(&self.0.describe) = Some(Box::new(describe));
    }

    /// Runs the step that renames the outputs. An exit by a signal waits for its end. After the step has
    /// succeeded, signals no longer affect the result.
    pub fn shielded<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let _naming = lock(&self.0.naming);
        let value = step()?;
        self.0.named.store(true, Ordering::SeqCst);
        CAUGHT.store(0, Ordering::SeqCst);
        Ok(value)
    }

    fn handle(&self, signal: i32) {
        if signal == SIGUSR1 {
            return self.describe();
        }
        if !self.0.named.load(Ordering::SeqCst) {
            let _ = CAUGHT.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.0.cancel.cancel();
        if self.0.signals.fetch_add(1, Ordering::SeqCst) > 0 {
            self.abort(signal);
            // The outputs are complete; only the report is missing, perhaps because the reader of a pipe does
            // not read.
            std::thread::sleep(PATIENCE);
            // If this fails, the next signal tries again.
            let _ = emulate_default_handler(signal);
        }
        let watchdog = self.clone();
        let started = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(PATIENCE);
            watchdog.abort(signal);
        });
        if started.is_err() {
            self.abort(signal);
        }
    }

    /// Prints the progress, unless it is shown anyway.
    fn describe(&self) {
        if let Some(line) = lock(&self.0.describe).as_ref().and_then(|describe| describe()) {
            // qemu-img prints the report alone.
            if compat::is_on() { report::say(&line) } else { report::tell(&line) }
        }
    }

    /// Removes unfinished outputs and dies of the signal, unless all outputs already have their final names.
    fn abort(&self, signal: i32) {
        let _naming = lock(&self.0.naming);
        if self.0.named.load(Ordering::SeqCst) {
            return;
        }
        if let Some(cleaner) = &*lock(&self.0.cleaner) {
            cleaner.clean();
        }
        report::error(&Error::cancelled("interrupted"));
        let _ = emulate_default_handler(signal);
        std::process::exit(i32::from(Exit::Failed.code()));
    }
}

/// Dies of the signal that has stopped the work, if there was one. A run that was finished nevertheless keeps its
/// exit code.
pub fn die_of_signal(exit: Exit) {
    let signal = CAUGHT.load(Ordering::SeqCst);
    if signal != 0 && exit != Exit::Done {
        // If this fails, the exit code remains.
        let _ = emulate_default_handler(signal);
    }
}

/// Prepares for signals whose default would end the program, but which are no reason to end it.
///
/// SIGUSR1 asks for the progress, also in a command that has none. SIGXFSZ comes from a write beyond the file size
/// limit (`ulimit -f`), which then fails with an error.
pub fn handle_harmless_signals() {
    let ignored = ignored_signals();
    for signal in [SIGUSR1, SIGXFSZ].into_iter().filter(|signal| !is_in(ignored, *signal)) {
        // The flag is never read. If the call fails, the kernel's default stays in force.
        let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
    }
}

/// Returns the signals that the parent process ignored when it started the program, as a mask (proc(5), SigIgn).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// True if the mask contains the signal.
fn is_in(mask: u64, signal: i32) -> bool {
    mask >> (signal - 1) & 1 == 1
}
