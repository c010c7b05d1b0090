//! `imgtool vma`: a replacement for the `vma` program of Proxmox VE, with the same flags and output.
//!
//! Scripts parse the output, so the lines on standard output are exactly those of that program. Error
//! messages begin with its wording; the place of the error and a hint follow on lines of their own.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use imgtool_core::error::escape_control;
use imgtool_core::{DeviceKind, Error, ErrorKind, Location, Memory, OpenOptions, Result};
use imgtool_storage::{FileWatch, Identity, OpenInput, Opening};
use imgtool_vma::layout::CLUSTER;
use imgtool_vma::{ArchiveHeader, VmaSource, reference};

use crate::args::{VmaArgs, VmaCommand};
use crate::exit::Exit;
use crate::report;

mod create;
mod extract;
mod hints;
mod list;
mod map_file;
mod new_archive;
mod output;
mod progress;
mod tally;
mod verify;

/// Exit code for a configuration that the archive does not contain.
const NO_SUCH_CONFIG: Exit = Exit::Other(255);

/// Runs a command of the `vma` program.
///
/// # Errors
/// Never: this function prints errors itself, in that program's words.
pub fn run(args: &VmaArgs) -> Result<Exit> {
    report::speak_as("vma");
    let done = match &args.command {
        VmaCommand::List { file } => list::run(file),
        VmaCommand::Config { file, name } => config(file, name),
        VmaCommand::Create(args) => create::run(args),
        VmaCommand::Extract(args) => extract::run(args),
        VmaCommand::Verify { file, verbose } => verify::run(file, *verbose),
    };
    Ok(done.unwrap_or_else(|failure| failure.print(&args.command)))
}

/// An error with the prefix for the step that failed ("restore failed - ").
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

    fn print(self, command: &VmaCommand) -> Exit {
        let error = &self.error;
        report::say(&format!("vma: {}{}", self.step, escape_control(&words(error))));
        let mut place = Vec::new();
        // The message of a failed system call already contains the file name.
        if let (Some(location), None) = (error.location(), error.io_error()) {
            place.push(escape_control(&location.name()));
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
        if let Some(remedy) = error.remedy() {
            report::say(&format!("  hint: {}", escape_control(&hints::words(remedy, command))));
        }
        Exit::Failed
    }
}

/// Returns the message that the `vma` program prints for an error.
fn words(error: &Error) -> String {
    let Some(cause) = error.io_error() else { return reference::message(error) };
    let reason = reason(cause);
    match error.location().map(Location::name) {
        Some(name) if error.act() == Some("open") => format!("can't open file {name} - {reason}"),
        Some(name) => format!("{} {name} failed - {reason}", error.message()),
        None => format!("{} failed - {reason}", error.message()),
    }
}

/// Returns the system's message, without the error number that the standard library appends.
fn reason(cause: &std::io::Error) -> String {
    let text = cause.to_string();
    match cause.raw_os_error() {
        Some(number) => text.replacen(&format!(" (os error {number})"), "", 1),
        None => text,
    }
}

/// Reads only the header of an archive.
fn header(file: &Path) -> Result<ArchiveHeader> {
    ArchiveHeader::read(input(file, &Memory::default())?.input)
}

/// Opens an archive for reading, decompressing it if the file is compressed.
fn input(file: &Path, memory: &Memory) -> Result<OpenInput> {
    // Any other name is a path, even with a colon.
    let location = if file.as_os_str() == "-" { Location::Stdin } else { Location::from(file) };
    imgtool_storage::open::open(&location, Opening::ByContent, memory)
}

/// Opens an archive that will be read to its end. The header of a file is read separately, so that an error
/// in it is reported without the prefix `step`.
fn open(file: &Path, step: &'static str) -> Result<Archive, Failure> {
    let memory = Memory::default();
    let OpenInput { input, identity, watch, .. } = input(file, &memory)?;
    let is_stream = input.is_stream();
    if !is_stream {
        header(file)?;
    }
    let location = input.location().clone();
    let source = VmaSource::open(input, &OpenOptions { memory: memory.clone(), ..OpenOptions::default() })
        .map_err(|error| Failure { step: if is_stream { "" } else { step }, error })?;
    Ok(Archive { location, source: Arc::new(source), identity, watch, memory })
}

/// An open archive.
struct Archive {
    location: Location,
    source: Arc<VmaSource>,
    identity: Option<Identity>,
    watch: Option<FileWatch>,
    /// Ledger from which everything that reads the archive borrows.
    memory: Memory,
}

fn config(file: &Path, name: &OsStr) -> Result<Exit, Failure> {
    let header = header(file)?;
    let found = (0..).zip(&header.configs).find(|(index, _)| header.config_name(*index) == name.as_bytes());
    match found {
        Some((_, config)) => {
            output::print_bytes(&config.data)?;
            Ok(Exit::Done)
        }
        None => {
            let name = name.to_string_lossy();
            report::say(&format!("unable to find configuration data '{}'", escape_control(&name)));
            Ok(NO_SUCH_CONFIG)
        }
    }
}

/// Returns the number of clusters that an archive lacks at the end of guest state, after it was read.
fn absent_clusters(source: &VmaSource) -> u64 {
    source.short_states().iter().map(|(_, guest)| (guest.end - guest.start).div_ceil(CLUSTER)).sum()
}

/// True if devices of this kind hold the saved state of a running guest.
fn is_state(kind: DeviceKind) -> bool {
    kind == DeviceKind::VmState
}

/// Creates a usage error.
fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}
