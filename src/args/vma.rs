//! The command line of `imgtool vma`. It has the same flags as Proxmox's `vma` program.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Usage text that the `vma` program prints for every usage error.
pub const USAGE: &str = "\
usage: vma COMMAND ...
  vma list FILE
  vma config FILE [-c NAME]
  vma create FILE [-v] [-c CONFIG]... [DEV=]PATH...
  vma create FILE [-v] [-c CONFIG]... [-d format=FMT:[DEV=]PATH]...
                  [--allow-external PATH]...
  vma extract FILE [-v] [-d DRIVE,...] [-r MAP] [--force] DIR
  vma verify FILE [-v]
";

/// Arguments of `imgtool vma`. If an option that is not repeatable occurs several times, the last one counts,
/// as with getopt(3).
#[derive(Debug, Args)]
pub struct VmaArgs {
    /// The command to run.
    #[command(subcommand)]
    pub command: VmaCommand,
}

/// The commands of the `vma` program.
#[derive(Debug, Subcommand)]
pub enum VmaCommand {
    /// List configurations, devices and creation time
    List {
        /// The archive; '-' for standard input
        file: PathBuf,
    },
    /// Print a configuration
    #[command(args_override_self = true)]
    Config {
        /// The archive; '-' for standard input
        file: PathBuf,
        /// Name of the configuration
        #[arg(
            short = 'c',
            value_name = "NAME",
            default_value = "qemu-server.conf",
            allow_hyphen_values = true
        )]
        name: OsString,
    },
    /// Create an archive
    Create(VmaCreateArgs),
    /// Extract disks and configurations
    Extract(VmaExtractArgs),
    /// Read a whole archive and check it
    #[command(args_override_self = true)]
    Verify {
        /// The archive; '-' for standard input
        file: PathBuf,
        /// Print the list and progress
        #[arg(short = 'v')]
        verbose: bool,
    },
}

impl VmaCommand {
    /// True if the command writes no file.
    pub fn only_reads(&self) -> bool {
        matches!(self, Self::List { .. } | Self::Config { .. } | Self::Verify { .. })
    }
}

/// Arguments of `imgtool vma create`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct VmaCreateArgs {
    /// The archive: a new file, a FIFO, or 'exec:COMMAND' for the standard input of a command
    pub file: PathBuf,
    /// Print progress on standard error
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Add this configuration file; repeatable
    #[arg(short = 'c', value_name = "CONFIG", allow_hyphen_values = true)]
    pub configs: Vec<PathBuf>,
    /// Add a disk of this format; repeatable
    #[arg(short = 'd', value_name = "format=FMT:[DEV=]PATH", allow_hyphen_values = true)]
    pub drives: Vec<OsString>,
    /// Let images open this backing or data file; 'chain': any in the image's directory; repeatable
    #[arg(long, value_name = "PATH")]
    pub allow_external: Vec<PathBuf>,
    /// Add these disks; without DEV= they are named disk0, disk1 ...
    #[arg(value_name = "[DEV=]PATH")]
    pub disks: Vec<OsString>,
}

/// Arguments of `imgtool vma extract`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_long_help = "\
MAP is a file or FIFO, read up to a line 'done', an empty line or its end. 1
writes zeros, 0 assumes that PATH already reads as zeros. The lowest
throttling.bps limits the whole extraction; throttling.group and cache are
checked, but have no effect.

Lines of MAP:
  [format=FMT:][throttling.bps=N:][throttling.group=G:][cache=MODE:](0|1):DEV=PATH
  skip=DEV"
)]
pub struct VmaExtractArgs {
    /// The archive; '-' for standard input
    pub file: PathBuf,
    /// Directory to create
    pub dir: PathBuf,
    /// Print progress
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Read the target of each device from MAP
    #[arg(short = 'r', value_name = "MAP", allow_hyphen_values = true)]
    pub map: Option<PathBuf>,
    /// Extract only these drives
    #[arg(short = 'd', value_name = "DRIVE,...", allow_hyphen_values = true)]
    pub drives: Option<OsString>,
    /// Write into targets that are in use, and do not check for free space
    #[arg(long)]
    pub force: bool,
}
