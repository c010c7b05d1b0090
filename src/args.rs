//! The command line: what may be typed. Every flag is defined once, here or in the files of this
//! folder, and feeds the help, the manual pages and the shell completions.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::exit::Exit;
use crate::report;
use values::Offer;

mod convert;
mod image;
mod mistakes;
mod values;
mod vma;

pub use convert::ConvertArgs;
pub use image::{
    Algorithm, CheckArgs, ChecksumArgs, CompareArgs, CreateArgs, InfoArgs, MapArgs, MeasureArgs,
};
pub use vma::{USAGE as VMA_USAGE, VmaArgs, VmaCreateArgs, VmaExtractArgs, VmaVerb};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "imgtool",
    version,
    about = "Converts virtual-machine disk images and whole-VM archives, any to any, in one pass",
    max_term_width = 80,
    propagate_version = false,
    disable_help_subcommand = true,
    subcommand_required = true,
    subcommand_value_name = "VERB",
    subcommand_help_heading = "Verbs",
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = EXIT_CODES_AND_EXAMPLES,
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// At the end of the short help.
const EXAMPLES: &str = "\
Examples:
  imgtool info vm.vma.zst
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert disk.vhdx disk.qcow2

'imgtool VERB -h' lists the flags of a verb, 'imgtool VERB --help' explains them.";

/// At the end of the long help and of the manual page.
const EXIT_CODES_AND_EXAMPLES: &str = "\
Formats are found by content, or given by -f (input) and -O (output);
'imgtool formats' lists them and their -o options.

Exit codes:
  0  done and complete
  1  failed; nothing is left under a final name
  2  the command line makes no sense
  3  finished with losses (--salvage); each lost range is listed
  compare: 0 same, 1 different, 2 could not compare
  check: 0 clean, 1 could not check, 2 corrupt, 3 leaks only
  vma: those of the vma program

Examples:
  imgtool info vm.vma.zst
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert disk.vhdx disk.qcow2
  imgtool VERB --help";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Convert images and archives into another format
    Convert(Box<ConvertArgs>),
    /// Show what an image or archive holds, without reading its data
    Info(InfoArgs),
    /// Show which parts of a disk hold data
    Map(MapArgs),
    /// Check the structure of an image or archive, all of it
    Check(CheckArgs),
    /// Compare the guest content of two images, whatever their formats
    Compare(CompareArgs),
    /// Print a digest of the guest content, for each device
    Checksum(ChecksumArgs),
    /// Tell how many bytes an image will need before it is made
    Measure(MeasureArgs),
    /// Make an empty image
    Create(CreateArgs),
    /// Stand in for the vma program of Proxmox VE, flag for flag; also when imgtool is called vma
    Vma(VmaArgs),
    /// List the formats, what each can do, and its -o options
    Formats(FormatsArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all verbs into a directory
    Man(ManArgs),
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OutputFormat {
    /// For a person
    #[default]
    Human,
    /// One JSON document on standard output
    Json,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Print for a person, or one JSON document (its fields: docs/json.md) [default: human]
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
    /// Whether JSON is wanted.
    pub fn is_json(self) -> bool {
        self.output == OutputFormat::Json
    }
}

/// How images are opened.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Reading")]
pub struct InputArgs {
    /// Format of the input; nothing is guessed then [default: found by content]
    #[arg(
        short = 'f',
        long = "format",
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub format: Option<String>,

    /// Let the image open this file (backing file, data file, parent); repeatable.
    /// 'chain' allows regular files in the image's own directory and below
    ///
    /// Without it an image opens no other file, whatever it names.
    #[arg(long, value_name = "PATH|chain")]
    pub allow_external: Vec<PathBuf>,

    /// Accept bytes after the end of an archive
    #[arg(long)]
    pub ignore_trailing: bool,

    /// Taken for qemu-img's sake, no effect: images are never locked
    #[arg(short = 'U', long = "force-share")]
    pub force_share: bool,

    /// Refused: images are named by plain paths, formats by -f
    #[arg(long, hide_short_help = true)]
    pub image_opts: bool,

    /// Refused: there are no secrets or other objects, as no encrypted or remote image is opened
    #[arg(long, value_name = "OBJECT", hide_short_help = true)]
    pub object: Vec<String>,
}

/// Whose content of an image is read.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Reading")]
pub struct SnapshotArgs {
    /// Read this internal snapshot (its name or ID) instead of the current state
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ProgressMode {
    /// A bar when standard error is a terminal, else nothing
    #[default]
    Auto,
    /// A bar when standard error is a terminal, else a line now and then
    Bar,
    /// One JSON object a line on standard error, at least each second
    Json,
    /// Nothing
    None,
}

/// How much is told on standard error.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Messages")]
pub struct MessageArgs {
    /// Show progress; the same as --progress bar
    #[arg(short = 'p')]
    pub show_progress: bool,

    /// How progress is shown on standard error
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub progress: ProgressMode,

    /// Say nothing unless something fails
    #[arg(short = 'q', long)]
    pub quiet: bool,
}

impl MessageArgs {
    /// What `-p`, `-q` and `--progress` come to.
    pub fn mode(self) -> ProgressMode {
        match (self.progress, self.show_progress, self.quiet) {
            // As in qemu-img: -q silences -p.
            (ProgressMode::Auto, _, true) => ProgressMode::None,
            (ProgressMode::Auto, true, false) => ProgressMode::Bar,
            (mode, _, _) => mode,
        }
    }
}

/// How many threads work.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Work")]
pub struct ThreadArgs {
    /// Worker threads, at most 64 [default: as many as there are CPUs]
    #[arg(short = 'm', long, value_name = "N", value_parser = threads)]
    pub threads: Option<u16>,
}

fn threads(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|threads| *threads > 0).ok_or_else(|| "it is a number, from 1 up".to_owned())
}

impl ThreadArgs {
    /// The number of workers.
    pub fn count(self) -> usize {
        let wanted = match self.threads {
            Some(threads) => usize::from(threads),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        wanted.clamp(1, imgtool_toolkit::pipeline::MAX_THREADS)
    }
}

/// `imgtool formats`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  imgtool formats
  imgtool formats --output json | jq -r '.[].name'
  imgtool convert -O qcow2 -o help")]
pub struct FormatsArgs {
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
    /// Which shell
    pub shell: clap_complete::Shell,
}

/// `imgtool man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  imgtool man | man -l -
  imgtool man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// A directory for imgtool.1 and a page for each verb; without it imgtool.1 is printed
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// The name under which the program stands in for another.
const VMA: &str = "vma";

/// Reads the command line.
///
/// # Errors
/// How to end when there is nothing to do, or when it makes no sense; the person has been told.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Exit> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let called_vma = args.first().is_some_and(|name| Path::new(name).file_stem() == Some(OsStr::new(VMA)));
    if called_vma {
        args.splice(0..1, [OsString::from("imgtool"), OsString::from(VMA)]);
    }
    // 'imgtool help convert' is what people type too.
    if args.get(1).is_some_and(|verb| verb == "help") {
        args.remove(1);
        args.push(OsString::from("--help"));
    }
    let stands_in = args.get(1).is_some_and(|verb| verb == VMA);
    Cli::try_parse_from(&args).map_err(|mistake| {
        let is_help = matches!(mistake.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        if stands_in && (called_vma || !is_help) {
            // Whoever calls the vma program knows it so.
            let _ = report::print(VMA_USAGE);
            return Exit::Failed;
        }
        if is_help || mistake.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            // Nobody to tell when that fails.
            let _ = mistake.print();
        } else {
            report::error(&mistakes::explain(&mistake, &args));
        }
        if is_help { Exit::Done } else { Exit::Usage }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definitions_do_not_clash() {
        Cli::command().debug_assert();
    }
}
