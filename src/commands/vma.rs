//! `imgtool vma`: stands in for the `vma` program of Proxmox VE, flag for flag and line for line.
//!
//! Scripts read what it prints: the lines on standard output are exactly those of that program.
//! Messages begin with its words; what is known of the place comes on the lines below.

use std::path::Path;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{DeviceKind, Error, ErrorKind, Input, OpenOptions, Result};
use imgtool_vma::{ArchiveHeader, VmaSource, reference};

use crate::args::{VmaArgs, VmaCommand};
use crate::exit::Exit;
use crate::report;

mod create;
mod extract;
mod list;
mod map_file;
mod tally;
mod verify;

/// A configuration that is not there.
const NO_SUCH_CONFIG: Exit = Exit::Other(255);

/// Does what the `vma` program does.
///
/// # Errors
/// Never: errors are printed here, in that program's words.
pub fn run(args: &VmaArgs) -> Result<Exit> {
    let done = match &args.command {
        VmaCommand::List { file } => list::run(file),
        VmaCommand::Config { file, name } => config(file, name),
        VmaCommand::Create(args) => create::run(args),
        VmaCommand::Extract(args) => extract::run(args),
        VmaCommand::Verify { file, verbose } => verify::run(file, *verbose),
    };
    Ok(done.unwrap_or_else(|failure| failure.print()))
}

/// An error and the step it happened in ("restore failed - ").
struct Failure {
    step: &'static str,
    error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { step: "", error }
    }
}

impl Failure {
    fn during(step: &'static str) -> impl Fn(Error) -> Self {
        move |error| Self { step, error }
    }

    fn print(self) -> Exit {
        let error = &self.error;
        report::say(&format!("vma: {}{}", self.step, escape_control(&words(error))));
        let mut place = Vec::new();
        // What the system refuses names its file already.
        if let (Some(path), None) = (error.file(), error.io_error()) {
            place.push(escape_control(&path.display().to_string()));
        }
        if let Some(device) = error.device_name() {
            place.push(format!("device {}", escape_control(device)));
        }
        if let Some(guest) = error.guest_range() {
            place.push(format!("guest bytes {}..{}", guest.start, guest.end));
        }
        if let Some(offset) = error.file_offset() {
            place.push(format!("file offset {offset}"));
        }
        if !place.is_empty() {
            report::say(&format!("  at: {}", place.join(", ")));
        }
        if let Some(hint) = error.hint_text() {
            // Options that the program does not have are those of another command.
            let hint = hint.replace(" --", " imgtool convert --");
            report::say(&format!("  hint: {}", escape_control(&hint)));
        }
        Exit::Failed
    }
}

/// The message in the program's words.
fn words(error: &Error) -> String {
    let Some(cause) = error.io_error() else { return reference::message(error) };
    let reason = reason(cause);
    match error.file() {
        Some(path) if error.message() == "open" => format!("can't open file {} - {reason}", path.display()),
        Some(path) => format!("{} {} failed - {reason}", error.message(), path.display()),
        None => format!("{} failed - {reason}", error.message()),
    }
}

/// What the system says, without the number that the standard library adds.
fn reason(cause: &std::io::Error) -> String {
    let text = cause.to_string();
    match cause.raw_os_error() {
        Some(number) => text.replacen(&format!(" (os error {number})"), "", 1),
        None => text,
    }
}

/// Only the header of an archive.
fn header(file: &Path) -> Result<ArchiveHeader> {
    ArchiveHeader::read(Input::open(file)?)
}

/// An archive to be read to its end. The header is looked at first: what is wrong with it is not
/// said to be of the step that follows.
fn open(file: &Path, step: &'static str) -> Result<VmaSource, Failure> {
    let input = Input::open(file)?;
    if !input.is_stream() {
        header(file)?;
    }
    let bare_of_step = input.is_stream();
    let opened = VmaSource::open(input, &OpenOptions::default());
    opened.map_err(|error| Failure { step: if bare_of_step { "" } else { step }, error })
}

fn config(file: &Path, name: &str) -> Result<Exit, Failure> {
    let header = header(file)?;
    match header.configs.iter().find(|config| config.name == name) {
        Some(config) => {
            report::print_bytes(&config.data)?;
            Ok(Exit::Done)
        }
        None => {
            report::say(&format!("unable to find configuration data '{}'", escape_control(name)));
            Ok(NO_SUCH_CONFIG)
        }
    }
}

/// Whether a device is the state of a running guest.
fn is_state(kind: DeviceKind) -> bool {
    kind == DeviceKind::VmState
}

/// A mistake in what was asked for.
fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}
