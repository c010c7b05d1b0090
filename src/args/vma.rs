//! The command line of `imgtool vma`, flag for flag that of the `vma` program.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What `vma` prints for a command line that it does not understand.
pub const USAGE: &str = "\
usage: vma COMMAND ...
  vma list FILE
  vma config FILE [-c NAME]
  vma create FILE [-v] [-c CONFIG]... [DEV=]PATH...
  vma create FILE [-v] [-c CONFIG]... [-d format=FMT:[DEV=]PATH]...
  vma extract FILE [-v] [-d DRIVE,...] [-r MAP] DIR
  vma verify FILE [-v]
";

/// `imgtool vma`. Of an option that comes twice the last counts, as getopt(3) has it.
#[derive(Debug, Args)]
pub struct VmaArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: VmaVerb,
}

/// The commands of the `vma` program.
#[derive(Debug, Subcommand)]
pub enum VmaVerb {
    /// List configurations, devices and creation time
    List {
        /// The archive; '-' is standard input
        file: PathBuf,
    },
    /// Print a configuration
    #[command(args_override_self = true)]
    Config {
        /// The archive; '-' is standard input
        file: PathBuf,
        /// Its name
        #[arg(
            short = 'c',
            value_name = "NAME",
            default_value = "qemu-server.conf",
            allow_hyphen_values = true
        )]
        name: String,
    },
    /// Make an archive
    Create(VmaCreateArgs),
    /// Extract disks and configurations
    Extract(VmaExtractArgs),
    /// Read all of an archive and check it
    #[command(args_override_self = true)]
    Verify {
        /// The archive; '-' is standard input
        file: PathBuf,
        /// Print the list and progress
        #[arg(short = 'v')]
        verbose: bool,
    },
}

/// `imgtool vma create`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct VmaCreateArgs {
    /// The archive: a new file, a FIFO, or 'exec:COMMAND' for the standard input of a command
    pub file: PathBuf,
    /// Print progress on standard error
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Pack this configuration file; repeatable
    #[arg(short = 'c', value_name = "CONFIG", allow_hyphen_values = true)]
    pub configs: Vec<PathBuf>,
    /// Pack a disk of this format; repeatable
    #[arg(short = 'd', value_name = "format=FMT:[DEV=]PATH", allow_hyphen_values = true)]
    pub drives: Vec<OsString>,
    /// Pack these disks; without DEV= they are called disk0, disk1 ...
    #[arg(value_name = "[DEV=]PATH")]
    pub disks: Vec<OsString>,
}

/// `imgtool vma extract`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_long_help = "\
MAP is a file or FIFO, read until 'done', an empty line or its end. 1 writes
zeros, 0 takes PATH to read as zeros already. The least of all throttling.bps
limits the whole extraction; throttling.group and cache are read, checked, and
have no effect.

Lines of MAP:
  [format=FMT:][throttling.bps=N:][throttling.group=G:][cache=MODE:](0|1):DEV=PATH
  skip=DEV"
)]
pub struct VmaExtractArgs {
    /// The archive; '-' is standard input
    pub file: PathBuf,
    /// The directory to be made
    pub dir: PathBuf,
    /// Print progress
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Read from here where each device goes
    #[arg(short = 'r', value_name = "MAP", allow_hyphen_values = true)]
    pub map: Option<PathBuf>,
    /// Extract only these drives
    #[arg(short = 'd', value_name = "DRIVE,...", allow_hyphen_values = true)]
    pub drives: Option<String>,
}
