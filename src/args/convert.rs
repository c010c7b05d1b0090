//! The command line of `imgtool convert`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::values::{CACHE_MODES, Offer};
use super::{InputArgs, MessageArgs, OutputArgs, SnapshotArgs, ThreadArgs};

/// At the end of the short help.
const EXAMPLES: &str = "\
Examples:
  imgtool convert disk.vhdx disk.qcow2
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert vm.vma.zst --disk drive-scsi0 scsi0.raw
  imgtool convert scsi0=a.qcow2 efidisk0=b.raw --config qemu-server.conf vm.vma
  zstdcat vm.vma.zst | imgtool convert - --to vhdx outdir/
  imgtool convert vm.vma --target drive-scsi0=/dev/vg/disk,zeroed";

/// At the end of the long help and of the manual page.
const RULES_AND_EXAMPLES: &str = "\
DEST is a file when one disk goes into one image, or all into one archive.
Else it is a directory, made if it is missing: each disk becomes
<device>.<extension>, each configuration keeps its name, the memory of a
running guest becomes vmstate.bin. One disk into a directory (one that exists,
or a DEST that ends in '/') is named after its source.

The format of DEST is that of --to, else that of its extension, else raw. A
name ending in .zst or .gz compresses the whole output, where the format can be
written in one pass.

Until it is finished an output is called .NAME.partial-XXXXXX; whatever goes
wrong, no unfinished output is left under its final name, and of several
outputs all appear or none.

Exit codes:
  0  done and complete
  1  failed; nothing is left under a final name
  2  the command line makes no sense
  3  finished with losses (--salvage); each lost range is listed

Examples:
  imgtool convert disk.vhdx disk.qcow2
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert vm.vma.zst --disk drive-scsi0 scsi0.raw
  imgtool convert scsi0=a.qcow2 efidisk0=b.raw --config qemu-server.conf vm.vma
  zstdcat vm.vma.zst | imgtool convert - --to vhdx outdir/
  imgtool convert vm.vma --target drive-scsi0=/dev/vg/disk,zeroed";

/// `imgtool convert`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "imgtool convert [-f FMT] [-O FMT] [OPTIONS] SOURCE... DEST",
    after_help = EXAMPLES,
    after_long_help = RULES_AND_EXAMPLES
)]
pub struct ConvertArgs {
    /// What to convert and where to: SOURCE... DEST
    ///
    /// A SOURCE is a path, or '-' for standard input; NAME=PATH names its device. DEST is a path, or
    /// '-' for standard output where the format can be streamed; it may be left out when every
    /// device has a --target.
    #[arg(value_name = "PATH", num_args = 1.., value_hint = ValueHint::AnyPath)]
    pub paths: Vec<OsString>,

    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,

    #[command(flatten)]
    pub devices: DeviceArgs,

    #[command(flatten)]
    pub work: WorkArgs,

    #[command(flatten)]
    pub threads: ThreadArgs,

    #[command(flatten)]
    pub messages: MessageArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub compat: CompatArgs,
}

/// What is made.
#[derive(Debug, Args)]
#[command(next_help_heading = "Writing")]
pub struct TargetArgs {
    /// Format of the output [default: by DEST's extension, else raw]
    #[arg(
        short = 'O',
        long = "to",
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub to: Option<String>,

    /// Options of the output format; repeatable; '-o help' lists them
    #[arg(
        short = 'o',
        long = "options",
        value_name = "K=V,...",
        value_parser = Offer::OptionKeys,
        hide_possible_values = true
    )]
    pub options: Vec<String>,

    /// Compress: qcow2 clusters (zlib, zstd), or a whole VMA archive (zstd, gzip)
    #[arg(
        short = 'c',
        long,
        value_name = "ALG[:LEVEL]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ""
    )]
    pub compress: Option<String>,

    /// Runs of zeros of this length take no space; 0 writes zeros like data [default: 4k]
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE")]
    pub sparse_size: Option<String>,

    /// Overwrite existing files, take devices that are in use, accept images marked as corrupt
    #[arg(long)]
    pub force: bool,

    /// Store only the difference to this image; -o backing_file=FILE
    #[arg(short = 'B', value_name = "FILE", requires = "backing_format", value_hint = ValueHint::FilePath)]
    pub backing: Option<String>,

    /// The format of -B's file; -o backing_fmt=FMT
    #[arg(
        short = 'F',
        value_name = "FMT",
        requires = "backing",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub backing_format: Option<String>,

    /// Do not create DEST: write into the file or block device that is there
    ///
    /// A target up to 4 MiB larger than the disk is accepted and its tail left alone (--force:
    /// however large); a smaller one is refused.
    #[arg(short = 'n', long = "no-create")]
    pub no_create: bool,

    /// With -n: the target is known to read as zeros, so zeros need no writing
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,

    /// Read the outputs back and compare them with the sources before they get their names
    #[arg(long)]
    pub verify: bool,
}

/// Which devices go where, and what goes with them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices and configurations")]
pub struct DeviceArgs {
    /// Take only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    /// Send a device to a place of its own; repeatable
    ///
    /// A PATH that exists is written in place and keeps its length, under the rules of -n; 'zeroed'
    /// says that it is known to read as zeros. The format is that of format=, else that of PATH's
    /// extension, else raw.
    #[arg(long, value_name = "NAME=PATH[,format=FMT][,zeroed]")]
    pub target: Vec<OsString>,

    /// Pack this configuration file into the archive; repeatable
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,

    /// Keep the configurations of the sources beside those of --config and --proxmox (without these
    /// they are kept anyway)
    #[arg(long)]
    pub config_from_source: bool,

    /// Pack a qemu-server.conf with what qmrestore needs to know of the disks, and this setting;
    /// repeatable
    ///
    /// Disks called like a drive (scsi0, drive-virtio1, efidisk0 ...) become that drive, others the
    /// next free SCSI disk; they are named as qmrestore expects. Memory is 2048 unless said.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1)]
    pub proxmox: Vec<String>,
}

/// How the work is done.
#[derive(Debug, Args)]
#[command(next_help_heading = "Work")]
pub struct WorkArgs {
    /// Restore what is whole of a damaged image, fill the rest with zeros, list it, exit with 3
    #[arg(long)]
    pub salvage: bool,

    /// Copy at most this many bytes of data a second (50M)
    #[arg(short = 'r', long = "rate-limit", value_name = "RATE")]
    pub rate_limit: Option<String>,
}

/// Flags that scripts pass to qemu-img.
#[derive(Debug, Args)]
#[command(next_help_heading = "Taken for qemu-img's sake")]
pub struct CompatArgs {
    /// No effect: outputs are always flushed before they get their names
    #[arg(short = 't', value_name = "CACHE", value_parser = CACHE_MODES, hide_possible_values = true)]
    pub target_cache: Option<String>,

    /// No effect: sources are read through the page cache
    #[arg(short = 'T', value_name = "CACHE", value_parser = CACHE_MODES, hide_possible_values = true)]
    pub source_cache: Option<String>,

    /// No effect: writes are made in any order wherever that is safe
    #[arg(short = 'W')]
    pub out_of_order: bool,

    /// No effect: how bytes are copied is decided for each pair of formats
    #[arg(short = 'C')]
    pub copy_offload: bool,

    /// Refused: targets are named by plain paths
    #[arg(long, hide_short_help = true)]
    pub target_image_opts: bool,

    /// Refused: persistent bitmaps are not written
    #[arg(long, hide_short_help = true)]
    pub bitmaps: bool,

    /// Refused: belongs to --bitmaps
    #[arg(long, hide_short_help = true)]
    pub skip_broken_bitmaps: bool,
}
