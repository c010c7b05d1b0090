//! Output of `imgtool vma`. If the reader of a pipe is gone, the program dies of SIGPIPE, as the reference
//! program does: Proxmox VE stops a restore by ending the shell around it, then frees the disks.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use imgtool_core::error::escape_control;
use imgtool_core::sync::lock;
use imgtool_core::{Error, Result};
use signal_hook::consts::SIGPIPE;
use signal_hook::low_level::emulate_default_handler;

use crate::exit::Exit;
use crate::report;

/// Step before the program dies.
type LastStep = Box<dyn FnOnce() + Send>;

/// Steps before the program dies of SIGPIPE: they remove what is unfinished.
static LAST_STEPS: Mutex<Vec<LastStep>> = Mutex::new(Vec::new());

/// Adds a step before the program dies of SIGPIPE.
pub(super) fn before_death(step: impl FnOnce() + Send + 'static) {
    lock(&LAST_STEPS).push(Box::new(step));
}

/// Removes what is unfinished and dies of SIGPIPE.
pub(super) fn die_of_pipe() -> ! {
    for step in lock(&LAST_STEPS).drain(..) {
        step();
    }
    // If this fails, the exit code has to do.
    let _ = emulate_default_handler(SIGPIPE);
    std::process::exit(i32::from(Exit::Failed.code()));
}

/// Prints text to standard output.
pub(super) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes to standard output.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    let done = out.write_all(bytes).and_then(|()| out.flush());
    drop(out);
    survived(done).map_err(|e| Error::io("write to standard output", e))
}

/// Prints a line to standard error. A failure is ignored, as it cannot be reported anywhere.
pub(super) fn say(text: &str) {
    let done = writeln!(io::stderr().lock(), "{text}");
    let _ = survived(done);
}

/// Prints a note.
pub(super) fn note(text: &str) {
    report::say(&format!("vma: note: {}", escape_control(text)));
}

fn survived(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => die_of_pipe(),
        done => done,
    }
}

/// Returns an untrusted name for a line on standard output. Control characters are escaped. Bytes that are
/// not UTF-8 stay as they are, since programs look for them; a terminal may obey them, so it gets a
/// replacement.
pub(super) fn name(raw: &[u8]) -> Vec<u8> {
    let is_terminal = io::stdout().is_terminal();
    let mut shown = Vec::new();
    for chunk in raw.utf8_chunks() {
        shown.extend_from_slice(escape_control(chunk.valid()).as_bytes());
        match chunk.invalid() {
            bytes if bytes.is_empty() || !is_terminal => shown.extend_from_slice(bytes),
            _ => shown.extend_from_slice("\u{fffd}".as_bytes()),
        }
    }
    shown
}
