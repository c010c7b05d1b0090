//! Behaviour of qemu-img, for programs that call it: chosen by a link of that name, or by `--compat`.
//!
//! The program then gives up some of its promises on purpose: it replaces existing files, follows backing files
//! in the image's own directory, and prints nothing but what qemu-img prints. docs/qemu-img.md lists the
//! differences that remain.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use imgtool_core::{Error, Result};

use crate::report;

/// Name of the program that this one stands in for.
const QEMU_IMG: &str = "qemu-img";

/// Version of qemu-img whose command line and output were compared with this program's.
const VERSION: &str = "10.0.2";

/// Flag that has the effect of the name.
const FLAG: &str = "--compat";

/// Commands of qemu-img without a counterpart here: most modify an image in place.
pub const MISSING_COMMANDS: [&str; 7] = ["amend", "bench", "bitmap", "commit", "dd", "rebase", "snapshot"];

/// Commands of qemu-img that this program has.
pub const COMMANDS: [&str; 8] = ["check", "compare", "convert", "create", "info", "map", "measure", "resize"];

/// Unit in bytes of the sizes of images. QEMU's: it counts sectors.
const SECTOR: u64 = 512;

/// Set if the program behaves as qemu-img does.
static IS_ON: OnceLock<()> = OnceLock::new();

/// True if the program behaves as qemu-img does.
pub fn is_on() -> bool {
    IS_ON.get().is_some()
}

/// Begins to behave as qemu-img does if the name of the program or a flag demands it. Removes the flag, and
/// translates what this program's parser reads differently. Returns true if it did.
pub fn begin(args: &mut Vec<OsString>) -> bool {
    let is_named = args.first().is_some_and(|name| Path::new(name).file_name() == Some(OsStr::new(QEMU_IMG)));
    let flags = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    let flag = args[..flags].iter().position(|arg| arg == FLAG);
    if let Some(index) = flag {
        args.remove(index);
    }
    if !is_named && flag.is_none() {
        return false;
    }
    // A second call changes nothing.
    let _ = IS_ON.set(());
    report::speak_as(QEMU_IMG);
    let flags = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    // In qemu-img, this flag has no value.
    args[..flags].iter_mut().filter(|arg| *arg == "--progress").for_each(|arg| *arg = "-p".into());
    true
}

/// Variable of the environment with directories in which images may name files, separated by colons. The user
/// who installs imgtool in qemu-img's place sets it for a caller that passes no flag of ours.
const DIRECTORIES: &str = "IMGTOOL_ALLOW_EXTERNAL_BELOW";

/// Returns the directories in or below which images may open files. By the name of imgtool, a flag allows
/// them.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a relative path: it would depend on where the caller is.
pub fn external_directories() -> Result<Vec<PathBuf>> {
    let text = std::env::var_os(DIRECTORIES).filter(|_| is_on()).unwrap_or_default();
    let listed = std::env::split_paths(&text).filter(|path| !path.as_os_str().is_empty());
    let checked = |path: PathBuf| match path.is_absolute() {
        true => Ok(path),
        false => Err(Error::usage(format!("{DIRECTORIES}: expected absolute paths")).path(path)),
    };
    listed.map(checked).collect()
}

/// Returns the name of the program, for messages about its command line.
pub fn program() -> &'static str {
    if is_on() { QEMU_IMG } else { "imgtool" }
}

/// Puts the name by which the program was called before the commands in a hint.
pub fn as_called(hint: String) -> String {
    if !is_on() {
        return hint;
    }
    COMMANDS.iter().fold(hint, |hint, command| {
        hint.replace(&format!("imgtool {command}"), &format!("{QEMU_IMG} {command}"))
    })
}

/// Returns the text of `qemu-img --version`. Programs parse its first line.
pub fn version() -> String {
    format!(
        "{QEMU_IMG} version {VERSION} (imgtool {})\nimgtool takes the command line of {QEMU_IMG}; it is not part of QEMU\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// Returns the text of `qemu-img --help`. Programs look for commands, and for the formats in its last line.
pub fn help(formats: &[&str]) -> String {
    format!(
        "{version}usage: {QEMU_IMG} COMMAND [OPTIONS]\n\n\
         Commands: {commands};\n\
         '{QEMU_IMG} COMMAND --help' explains the flags of each.\n\
         Left to QEMU's own {QEMU_IMG}: {missing}.\n\n\
         Supported formats: {formats}\n",
        version = version(),
        commands = COMMANDS.join(", "),
        missing = MISSING_COMMANDS.join(", "),
        formats = formats.join(" ")
    )
}

/// Returns the error for a command of qemu-img that this program does not have.
pub fn missing_command(command: &str) -> Error {
    Error::usage(format!("imgtool has no {command}: it does not stand in for this command of {QEMU_IMG}"))
        .hint(format!("call QEMU's own {QEMU_IMG} by its path (package qemu-utils) for '{command}'"))
}

/// Returns the format of an output if the user states none: for qemu-img, the name of a file says nothing.
pub fn default_format() -> Option<&'static str> {
    is_on().then_some("raw")
}

/// True if an output in this format must be an image that a machine can write: qemu-img makes those of VMware, and
/// imgtool streams for import.
pub fn makes_images_for_machines(format: Option<&str>) -> bool {
    is_on() && format == Some("vmdk")
}

/// Returns the name of a format: qemu-img calls a VHD image vpc.
pub fn format_name(name: &str) -> &str {
    match name {
        "vhd" if is_on() => "vpc",
        name => name,
    }
}

/// Parses a size from the command line: for qemu-img, `5MiB` is none.
pub fn parse_size(text: &str) -> Option<u64> {
    let is_own = text.to_ascii_lowercase().ends_with("ib");
    imgtool_core::parse_size(text).filter(|_| !is_on() || !is_own)
}

/// Refuses a value of `-o` that qemu-img refuses: nothing, a comma at an end, or a size that is spelled `64KiB`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for such a value, in the place of qemu-img.
pub fn check_options(text: &str) -> Result<()> {
    let is_list = !text.is_empty() && !text.starts_with(',') && !text.ends_with(',');
    let is_own = |(key, value): (&str, &str)| {
        key.ends_with("size") && parse_size(value).is_none() && imgtool_core::parse_size(value).is_some()
    };
    let has_own = text.split(',').filter_map(|part| part.split_once('=')).any(is_own);
    if !is_on() || is_list && !has_own {
        return Ok(());
    }
    Err(Error::usage(format!("invalid list of options '{text}'")).hint("KEY=VALUE,KEY=VALUE"))
}

/// Refuses a new size that qemu-img refuses: one that ends within a sector, and one below `old` unless the user permits it.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for such a size, in the place of qemu-img.
pub fn check_new_size(old: u64, new: u64, may_shrink: bool) -> Result<()> {
    if !is_on() {
        return Ok(());
    }
    if !new.is_multiple_of(SECTOR) {
        return Err(Error::usage(format!("the new size is {new}, expected a multiple of {SECTOR}")));
    }
    if new < old && !may_shrink {
        return Err(
            Error::usage(format!("the new size is {new}, less than {old} bytes")).hint("--shrink permits it")
        );
    }
    Ok(())
}

/// Returns the size of a new image or of a raw one: qemu-img rounds it up to whole sectors.
pub fn new_size(size: u64) -> u64 {
    if is_on() { size.checked_next_multiple_of(SECTOR).unwrap_or(size) } else { size }
}
