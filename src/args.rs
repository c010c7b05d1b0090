//! Definition of the command line. Every flag is defined once, here or in a module below; the parser, the
//! help, the manual pages and the shell completions all use that definition.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint};
use imgtool_core::{Error, SnapshotChoice};
use imgtool_engine::pipeline::MAX_THREADS;

use crate::exit::Exit;
use crate::secrets::SecretSource;
use crate::{compat, report, sandbox};
use values::{Offer, SecretPlace};

mod convert;
mod image;
mod mistakes;
mod values;
mod vma;

pub use convert::ConvertArgs;
pub use image::{
    Algorithm, CheckArgs, ChecksumArgs, CompareArgs, CreateArgs, InfoArgs, MapArgs, MapFormat, MeasureArgs,
    NewSize, Preallocation, RepairMode, ResizeArgs,
};
pub use vma::{USAGE as VMA_USAGE, VmaArgs, VmaCommand, VmaCreateArgs, VmaExtractArgs};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "imgtool",
    version,
    about = "Converts VM disk images and whole-VM archives between formats, in one pass",
    max_term_width = 80,
    propagate_version = false,
    disable_help_subcommand = true,
    subcommand_required = true,
    subcommand_value_name = "COMMAND",
    subcommand_help_heading = "Commands",
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = EXIT_CODES_AND_EXAMPLES,
)]
pub struct Cli {
    /// Behave as qemu-img does, for programs that call it; implied if imgtool is invoked as qemu-img
    ///
    /// Existing files are replaced, backing files in the image's directory are opened, the output format
    /// is raw unless -O says otherwise, and progress and messages are those of qemu-img. The flag may be
    /// anywhere on the command line.
    #[arg(long)]
    pub compat: bool,

    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Text at the end of the short help.
const EXAMPLES: &str = "\
Examples:
  imgtool info vm.vma.zst
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert disk.vhdx disk.qcow2

'imgtool COMMAND -h' lists the flags of a command, 'imgtool COMMAND --help'
explains them.";

/// Text at the end of the long help and of the manual page.
const EXIT_CODES_AND_EXAMPLES: &str = "\
The input format is detected from the content or set with -f; the output format
is chosen by the file name or set with -O. 'imgtool formats' lists the formats
and their -o options.

Exit codes:
  0  success
  1  failed; no output is left under its final name
  2  usage error
  3  finished with losses (--salvage); each lost range is listed
  75 failed, but another try may help (the network, a server)
  compare: 0 identical, 1 different, 2 could not compare
  check: 0 clean, 1 could not check, 2 corrupt, 3 leaks only
  vma: those of the vma program
  After Ctrl-C or another signal, a command cleans up and dies of the signal.

Examples:
  imgtool info vm.vma.zst
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert disk.vhdx disk.qcow2
  imgtool COMMAND --help";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Convert disk images and archives to another format
    Convert(Box<ConvertArgs>),
    /// Describe an image or archive without reading its data
    Info(InfoArgs),
    /// Show which parts of a disk hold data
    Map(MapArgs),
    /// Check the whole structure of an image or archive
    Check(CheckArgs),
    /// Compare the guest content of two images of any format
    Compare(CompareArgs),
    /// Print a digest of the guest content of each device
    Checksum(ChecksumArgs),
    /// Compute the file size that a new image will need
    Measure(MeasureArgs),
    /// Create an empty image
    Create(CreateArgs),
    /// Change the virtual size of a raw or qcow2 image in place
    Resize(ResizeArgs),
    /// Replace the vma program of Proxmox VE, flag for flag; implied if imgtool is invoked as vma
    Vma(VmaArgs),
    /// List the formats, their capabilities and their -o options
    Formats(FormatsArgs),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write the pages of all commands into a directory
    Man(ManArgs),
}

/// Form in which results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OutputFormat {
    /// Text for people
    #[default]
    Human,
    /// One JSON document on standard output
    Json,
}

/// The `--output` flag.
#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Print text or one JSON document (fields: docs/json.md) [default: human]
    #[arg(
        long,
        value_name = "human|json",
        value_enum,
        default_value_t,
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub output: OutputFormat,
}

impl OutputArgs {
    /// True if the result is printed as JSON.
    pub fn is_json(self) -> bool {
        self.output == OutputFormat::Json
    }
}

/// Flags for opening images.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Reading")]
pub struct InputArgs {
    /// Format of the input [default: detected from its content]
    #[arg(
        short = 'f',
        long = "format",
        aliases = ["source-format", "a-format"],
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub format: Option<String>,

    /// Read this file in an archive: tar, OVA or zip
    ///
    /// NAME is that of the file, with its directories if several have the same name. Its extension
    /// decides about its format, otherwise its content.
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub member: Option<String>,

    /// Allow the image to use this file (backing file, data file, parent); repeatable.
    /// 'chain' allows regular files in or below the image's directory
    ///
    /// Without this flag no file that an image names is opened.
    #[arg(long, value_name = "PATH|chain")]
    pub allow_external: Vec<PathBuf>,

    /// Ignore bytes after the end of an archive
    #[arg(long)]
    pub ignore_trailing: bool,

    /// Passphrase of encrypted sources, in a file, an environment variable or a file descriptor;
    /// repeatable
    ///
    /// One line end is removed from a file or descriptor. Each passphrase is tried for each encrypted
    /// source and each encrypted image below it, so their order means nothing. At most 16.
    #[arg(
        long,
        value_name = "file=PATH|env=NAME|fd=N",
        value_parser = SecretPlace,
        hide_possible_values = true
    )]
    pub secret: Vec<SecretSource>,

    /// Trust servers whose certificate this authority issued (a PEM file), besides those that the system
    /// trusts; repeatable
    #[cfg(feature = "net")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, hide_short_help = true)]
    pub cacert: Vec<PathBuf>,

    /// Send the headers in this file, one NAME: VALUE a line, to the server that the URLs name; repeatable
    ///
    /// They are not sent where a server redirects to. A value on the command line would be visible to
    /// other users.
    #[cfg(feature = "net")]
    #[arg(
        long,
        value_name = "@FILE",
        value_parser = header_file,
        value_hint = ValueHint::FilePath,
        hide_short_help = true
    )]
    pub header: Vec<PathBuf>,

    /// Use at most this much memory, such as 1G [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = memory, hide_short_help = true)]
    pub memory: Option<u64>,

    /// Read an image even if another program, such as a running virtual machine, may write it
    #[arg(short = 'U', long = "force-share")]
    pub force_share: bool,

    /// Take the name of each image as options: driver=FORMAT,file.filename=PATH
    ///
    /// 'json:{...}' is a name with the same keys. Options that change how QEMU reads or writes have no
    /// effect; those that would change the content are refused.
    #[arg(long, alias = "source-image-opts", hide_short_help = true)]
    pub image_opts: bool,

    /// Passphrase for key-secret=ID among the options of an image: secret,id=ID,file=PATH; repeatable
    ///
    /// Every byte of the file counts, a line end too.
    #[arg(long, value_name = "OBJECT", hide_short_help = true)]
    pub object: Vec<String>,
}

/// The `--snapshot` flag.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Reading")]
pub struct SnapshotArgs {
    /// Read this internal snapshot (name or ID) instead of the current state
    ///
    /// snapshot.id=ID,snapshot.name=NAME, or one of them, takes only an ID or a name.
    #[arg(short = 'l', long, alias = "source-snapshot", value_name = "NAME", value_parser = snapshot)]
    pub snapshot: Option<SnapshotChoice>,
}

/// Form in which progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ProgressMode {
    /// A bar if standard error is a terminal, otherwise nothing
    #[default]
    Auto,
    /// A bar if standard error is a terminal, otherwise a line every 10 seconds
    Bar,
    /// JSON lines on standard error, at least one per second
    Json,
    /// Nothing
    None,
    /// The percentage on standard output, as qemu-img prints it
    #[value(skip)]
    Percent,
}

/// Flags for the messages on standard error.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Messages")]
pub struct MessageArgs {
    /// Show progress; same as --progress bar
    #[arg(short = 'p')]
    pub show_progress: bool,

    /// Progress on standard error
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub progress: ProgressMode,

    /// Print nothing unless something fails
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

impl MessageArgs {
    /// Returns the mode that `-p`, `-q` and `--progress` select. `--progress` wins unless it is `auto`.
    pub fn mode(self) -> ProgressMode {
        if compat::is_on() && self.progress == ProgressMode::Auto {
            let shows = self.show_progress && !self.quiet;
            return if shows { ProgressMode::Percent } else { ProgressMode::None };
        }
        match (self.progress, self.show_progress, self.quiet) {
            // As in qemu-img: -q silences -p.
            (ProgressMode::Auto, _, true) => ProgressMode::None,
            (ProgressMode::Auto, true, false) => ProgressMode::Bar,
            (mode, _, _) => mode,
        }
    }
}

/// The `--threads` flag.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Work")]
pub struct ThreadArgs {
    /// Number of worker threads, at most 64 [default: number of CPUs]
    #[arg(short = 'm', long, alias = "parallel", value_name = "N", value_parser = threads)]
    pub threads: Option<u16>,
}

/// Parses a snapshot as qemu-img does: `snapshot.id=ID`, `snapshot.name=NAME`, both, or a name or ID alone.
pub(crate) fn snapshot(text: &str) -> Result<SnapshotChoice, String> {
    if !text.starts_with("snapshot.") {
        return Ok(text.into());
    }
    let (mut id, mut name) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            _ => return Err("expected snapshot.id=ID, snapshot.name=NAME, or both with a comma".to_owned()),
        }
    }
    Ok(SnapshotChoice::Exact { id, name })
}

/// Parses the value of `--header`: a file after `@`.
#[cfg(feature = "net")]
fn header_file(text: &str) -> Result<PathBuf, String> {
    let file = text.strip_prefix('@').filter(|file| !file.is_empty());
    file.map(PathBuf::from).ok_or_else(|| "expected @FILE: other users see the command line".to_owned())
}

/// Parses the limit of `--memory`.
fn memory(text: &str) -> Result<u64, String> {
    let least = imgtool_core::memory::MIN_LIMIT;
    let size = imgtool_core::parse_size(text).filter(|size| *size >= least);
    size.ok_or_else(|| format!("expected a size of at least {}M, such as 1G", least >> 20))
}

fn threads(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|threads| *threads > 0).ok_or_else(|| "expected a number, at least 1".to_owned())
}

impl ThreadArgs {
    /// Returns the number of workers; 0 means one per processor. Prints a note if it is beyond the limit.
    pub fn count(self) -> usize {
        let count = self.threads.map_or(0, usize::from);
        if count > MAX_THREADS {
            report::note(&format!("{count} worker threads are more than help: {MAX_THREADS} at most start"));
        }
        count.min(MAX_THREADS)
    }
}

/// `imgtool formats`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  imgtool formats
  imgtool formats qcow2
  imgtool formats --output json | jq -r '.[].name'
  imgtool convert -O qcow2 -o help")]
pub struct FormatsArgs {
    /// Describe this format, with its -o options
    #[arg(value_name = "NAME", value_parser = Offer::Formats, hide_possible_values = true)]
    pub name: Option<String>,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// `imgtool completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  imgtool completions bash > /etc/bash_completion.d/imgtool
  imgtool completions zsh  > /usr/local/share/zsh/site-functions/_imgtool
  imgtool completions fish > ~/.config/fish/completions/imgtool.fish")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// `imgtool man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  imgtool man | man -l -
  imgtool man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write imgtool.1 and a page for each command into DIR instead of printing imgtool.1
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// Flags that the help of `convert` shows, by their names in the definition. `--help-compat` and the manual
/// page show the others.
const FIRST_OF_CONVERT: [&str; 24] = [
    "paths",
    "help_compat",
    "help",
    "to",
    "options",
    "compress",
    "platform",
    "size",
    "force",
    "no_create",
    "verify",
    "format",
    "allow_external",
    "secret",
    "snapshot",
    "disk",
    "target",
    "config",
    "proxmox",
    "salvage",
    "threads",
    "progress",
    "quiet",
    "output",
];

/// Returns the definition for parsing and for help, in which `convert` shows the flags that people use first.
fn command() -> clap::Command {
    let is_rare = |arg: &Arg| !FIRST_OF_CONVERT.contains(&arg.get_id().as_str());
    Cli::command().mut_subcommand("convert", |convert| {
        convert.mut_args(|arg| if is_rare(&arg) { arg.hide(true) } else { arg })
    })
}

/// Returns the help on the other flags of `convert`.
pub fn compatibility_help() -> String {
    let mut command = Cli::command();
    command.build();
    let Some(convert) = command.find_subcommand("convert") else { return String::new() };
    let is_first = |arg: &Arg| FIRST_OF_CONVERT.contains(&arg.get_id().as_str());
    let mut convert = convert
        .clone()
        .mut_args(|arg| if is_first(&arg) { arg.hide(true) } else { arg.hide_short_help(false) })
        .about("Further flags of convert: those of qemu-img, and rare ones")
        .after_help("")
        .after_long_help("'imgtool convert --help' has the others.");
    convert.render_long_help().to_string()
}

/// Name of the command that replaces Proxmox's `vma`. A program with this name implies the command.
const VMA: &str = "vma";

/// Parses the command line.
///
/// # Errors
/// Returns the exit code after printing help, the version or a usage error.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Exit> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if compat::begin(&mut args) {
        return parse_as_qemu_img(&args);
    }
    let invoked_as_vma =
        args.first().is_some_and(|name| Path::new(name).file_stem() == Some(OsStr::new(VMA)));
    if invoked_as_vma {
        args.splice(0..1, [OsString::from("imgtool"), OsString::from(VMA)]);
    }
    // 'imgtool help convert' is the same as 'imgtool convert --help'.
    if args.get(1).is_some_and(|command| command == "help") {
        args.remove(1);
        args.push(OsString::from("--help"));
    }
    let is_vma = args.get(1).is_some_and(|command| command == VMA);
    // Mistakes on the command line are JSON lines too.
    if !is_vma && wants_json_lines(&args) {
        report::speak_json();
    }
    let matches = command().try_get_matches_from(&args);
    matches.and_then(|matches| Cli::from_arg_matches(&matches)).map_err(|mistake| {
        let is_help = matches!(mistake.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        if is_vma && (invoked_as_vma || !is_help) {
            // The vma program prints its usage for every mistake, and exits with 1.
            let _ = report::print(VMA_USAGE);
            return Exit::Failed;
        }
        if is_help || mistake.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            // A failure to print cannot be reported anywhere.
            let _ = mistake.print();
            // Scripts parse the one line of -V.
            if mistake.kind() == ErrorKind::DisplayVersion && args.iter().any(|arg| arg == "--version") {
                let _ = report::print(&sandbox::describe());
            }
        } else {
            report::error(&mistakes::explain(&mistake, &args));
        }
        // For `check`, the code of a usage error means a corrupt image.
        let is_check = args.get(1).is_some_and(|command| command == "check");
        match (is_help, is_check) {
            (true, _) => Exit::Done,
            (false, true) => Exit::Failed,
            (false, false) => Exit::Usage,
        }
    })
}

/// True if the last `--progress` of a command line is `json`.
fn wants_json_lines(args: &[OsString]) -> bool {
    let flag = |index: usize, arg: &OsStr| match arg.to_str()?.strip_prefix("--progress")? {
        "" => args.get(index + 1).map(|value| value == "json"),
        value => value.strip_prefix('=').map(|value| value == "json"),
    };
    let options = args.iter().take_while(|arg| *arg != "--").enumerate();
    options.filter_map(|(index, arg)| flag(index, arg)).last().unwrap_or(false)
}

/// Parses the command line of qemu-img: a long flag may be cut short, and every mistake exits with 1.
fn parse_as_qemu_img(args: &[OsString]) -> Result<Cli, Exit> {
    let first = args.get(1).and_then(|arg| arg.to_str());
    let text = match first {
        Some("--version" | "-V") => Some(compat::version()),
        Some("--help" | "-h") => Some(compat::help(&format_names())),
        _ => None,
    };
    if let Some(text) = text {
        // A failure to print cannot be reported anywhere.
        let _ = report::print(&text);
        return Err(Exit::Done);
    }
    let parsed =
        qemu_img_command().try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|mistake| {
        if matches!(mistake.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            let _ = mistake.print();
            return Exit::Done;
        }
        report::error(&match first {
            None => Error::usage("not enough arguments").hint("'qemu-img --help' lists the commands"),
            Some(command) if compat::MISSING_COMMANDS.contains(&command) => compat::missing_command(command),
            Some(_) => mistakes::explain(&mistake, args),
        });
        Exit::Failed
    })
}

/// Returns the definition in the place of qemu-img, whose formats do not follow from names.
fn qemu_img_command() -> clap::Command {
    const RULES: &str = "docs/qemu-img.md describes what differs from QEMU's own program.";
    let mut command = Cli::command().bin_name(compat::program()).infer_long_args(true);
    for name in compat::COMMANDS {
        command = command.mut_subcommand(name, |own| own.after_help(RULES).after_long_help(RULES));
    }
    command
        .mut_subcommand("convert", |convert| {
            convert
                .override_usage("qemu-img convert [-f FMT] [-O FMT] [OPTIONS] SOURCE... DEST")
                .mut_arg("to", |to| to.help("Format of the output [default: raw]"))
        })
        .mut_subcommand("create", |create| {
            create.mut_arg("format", |format| format.help("Format of the new image [default: raw]"))
        })
}

/// Returns the names of all formats, as qemu-img calls them.
fn format_names() -> Vec<&'static str> {
    imgtool::registry().drivers().map(|driver| compat::format_name(driver.name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_follow_the_last_progress_flag() {
        let wants = |line: &str| wants_json_lines(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(wants("imgtool convert --progress json a b") && wants("imgtool convert --progress=json"));
        assert!(!wants("imgtool convert --progress json --progress none a b"));
        assert!(!wants("imgtool convert a b") && !wants("imgtool convert -- --progress json"));
    }

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
        let shown = Cli::command();
        let convert = shown.find_subcommand("convert").expect("a command");
        let known = |name: &str| convert.get_arguments().any(|arg| arg.get_id() == name);
        assert!(FIRST_OF_CONVERT.iter().all(|name| *name == "help" || known(name)));
    }
}
