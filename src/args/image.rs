//! The command lines of `info`, `map`, `check`, `compare`, `checksum`, `measure` and `create`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use imgtool_core::SnapshotChoice;
use imgtool_platform::Platform;

use crate::compat;
use crate::secrets::SecretSource;

use super::values::{CACHE_MODES, Offer, PlatformName, SecretPlace};
use super::{InputArgs, MessageArgs, OutputArgs, SnapshotArgs, ThreadArgs};

/// `imgtool info`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  imgtool info vm.vma.zst
  ssh host cat vm.vma.zst | imgtool info --read-all -
  imgtool info https://example.com/disk.qcow2
  imgtool info --output json disk.qcow2
  imgtool info --backing-chain --allow-external chain overlay.qcow2"
)]
pub struct InfoArgs {
    /// Images or archives: paths, URLs (http, https, nbd), or '-' for standard
    /// input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// Also show the backing files, as far as --allow-external permits opening them
    #[arg(short = 'b', long)]
    pub backing_chain: bool,

    /// Read a stream to its end, however long: counts the bytes that an archive stores, and the size of a
    /// compressed raw image
    #[arg(long)]
    pub read_all: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,
}

/// `imgtool map`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  imgtool map disk.qcow2
  imgtool map --disk drive-scsi0 --output json vm.vma
  imgtool map --output svg vm.vma > map.svg"
)]
pub struct MapArgs {
    /// The image or archive: a path, a URL (http, https, nbd), or '-' for standard
    /// input
    pub image: PathBuf,

    /// Show only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    /// Start at this guest offset: bytes, or with a suffix k, M, G, T, P, E [default: 0]
    #[arg(short = 's', long, value_name = "SIZE")]
    pub start_offset: Option<String>,

    /// Show at most this many bytes of the disk [default: up to its end]
    #[arg(short = 'l', long, value_name = "SIZE")]
    pub max_length: Option<String>,

    /// Show ranges whose place is lost as zeros, name them on standard error and exit with 3
    #[arg(long)]
    pub salvage: bool,

    /// Print text, one JSON document (fields: docs/json.md), or an SVG drawing for browsers [default: human]
    #[arg(
        long,
        value_name = "human|json|svg",
        value_enum,
        default_value_t,
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub output: MapFormat,

    #[command(flatten)]
    pub input: InputArgs,

    /// Read this internal snapshot (name or ID) instead of the current state
    #[arg(long, value_name = "NAME", value_parser = super::snapshot, help_heading = "Reading")]
    pub snapshot: Option<SnapshotChoice>,
}

/// Format of the result of `imgtool map`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum MapFormat {
    /// Text for people
    #[default]
    Human,
    /// One JSON document on standard output
    Json,
    /// A drawing on standard output, as an SVG document
    Svg,
}

/// QEMU's cache mode, for the commands that only read.
#[derive(Debug, Args)]
pub struct CacheArgs {
    /// Accepted for compatibility, no effect: images are read through the page cache
    #[arg(
        short = 'T',
        long,
        value_name = "CACHE",
        value_parser = CACHE_MODES,
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub cache: Option<String>,
}

/// `imgtool check`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Exit codes:
  0  clean
  1  could not check, or usage error
  2  corrupt
  3  leaks only: space is wasted, the content is intact
  63 the format has no structure to check (raw)
With --for: 0 the platform takes all, 1 could not check, 2 it refuses one

Examples:
  imgtool check disk.qcow2
  imgtool check -r leaks disk.qcow2
  imgtool check --output json vm.vma.zst
  imgtool check --for azure disk.vhd"
)]
pub struct CheckArgs {
    /// The image or archive: a path, a URL (http, https, nbd), or '-' for standard
    /// input
    pub image: PathBuf,

    /// With --for: further images
    #[arg(value_name = "IMAGE", hide = true)]
    pub others: Vec<PathBuf>,

    /// Check whether this platform takes the image, and nothing else; several images may be named
    ///
    /// proxmox, libvirt, hyperv, azure, aws, gce, vmware, virtualbox, openstack; hyperv:gen1 and hyperv:gen2 (azure
    /// likewise) state the generation of the machine. docs/platforms.md lists the rules.
    #[arg(
        long = "for",
        value_name = "PLATFORM",
        value_parser = PlatformName,
        hide_possible_values = true,
        conflicts_with = "repair"
    )]
    pub platform: Option<Platform>,

    /// Repair the image in place (qcow2, VHDX): only leaked clusters, or all that can be repaired
    ///
    /// Damage that is not repaired (lost tables, blocks outside the file) is refused before anything is
    /// written. 'convert --salvage' makes a copy of what is intact.
    #[arg(short = 'r', long, value_name = "leaks|all", value_enum)]
    pub repair: Option<RepairMode>,

    #[command(flatten)]
    pub cache: CacheArgs,

    /// Print nothing unless something is wrong
    #[arg(short = 'q', long)]
    pub quiet: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,
}

/// `imgtool compare`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Devices are matched by name; two images with a single device each always match.
If one device is longer, the rest of it must be zero. With -q, the comparison
stops at the first difference; otherwise it counts all of them.

Exit codes:
  0  identical
  1  different
  2  could not compare, or usage error

Examples:
  imgtool compare disk.qcow2 disk.vhdx
  imgtool compare --disk drive-scsi0 vm.vma.zst scsi0.raw"
)]
pub struct CompareArgs {
    /// The first image or archive
    #[arg(value_name = "A")]
    pub first: PathBuf,

    /// The second image or archive
    #[arg(value_name = "B")]
    pub second: PathBuf,

    /// Format of B; -f is the format of A [default: detected from its content]
    #[arg(
        short = 'F',
        long = "b-format",
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub second_format: Option<String>,

    /// Also require equal sizes and equal allocation, as qemu-img does
    ///
    /// Allocation is the state of each extent in the output of 'map --output json': present, zero, data,
    /// compressed, and whether it has an offset. Zeros that no file stores are equal only in images of
    /// one format.
    #[arg(short = 's', long)]
    pub strict: bool,

    /// Compare only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    /// List the ranges that differ
    #[arg(long)]
    pub list: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub cache: CacheArgs,

    #[command(flatten)]
    pub threads: ThreadArgs,

    #[command(flatten)]
    pub messages: MessageArgs,
}

/// Extent of a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairMode {
    /// Free clusters that nothing refers to
    Leaks,
    /// Everything that can be repaired: also refcounts, flags, copies of headers, and a pending log
    All,
}

/// Digest algorithm of `checksum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Algorithm {
    /// SHA-256, as sha256sum prints it for the raw image
    #[default]
    Sha256,
    /// BLAKE3, as b3sum prints it for the raw image
    Blake3,
}

/// `imgtool checksum`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
The digest is that of the raw disk: images of different formats have the same
digest if their content is the same.

Examples:
  imgtool checksum disk.qcow2
  imgtool checksum -a blake3 vm.vma.zst"
)]
pub struct ChecksumArgs {
    /// Images or archives: paths, URLs (http, https, nbd), or '-' for standard
    /// input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// Digest algorithm
    #[arg(short = 'a', long, value_name = "NAME", value_enum, default_value_t)]
    pub algorithm: Algorithm,

    /// Read only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,

    #[command(flatten)]
    pub threads: ThreadArgs,

    #[command(flatten)]
    pub messages: MessageArgs,
}

/// `imgtool measure`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  imgtool measure -O qcow2 disk.vhdx
  imgtool measure -O qcow2 -c vm.vma.zst
  imgtool measure -O qcow2 -o cluster_size=2M --size 1T"
)]
pub struct MeasureArgs {
    /// The image or archive whose content the new images will hold
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    pub image: Option<PathBuf>,

    /// Measure only this device; repeatable
    #[arg(long, value_name = "NAME", conflicts_with = "size")]
    pub disk: Vec<String>,

    /// Assume an empty disk of this size instead of an image
    #[arg(short = 's', long, value_name = "SIZE")]
    pub size: Option<String>,

    /// Also estimate the size with this compression, from samples of the data
    #[arg(
        short = 'c',
        long,
        value_name = "ALG[:LEVEL]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        conflicts_with = "size"
    )]
    pub compress: Option<String>,

    /// Format of the new image [default: raw]
    #[arg(
        short = 'O',
        long = "to",
        aliases = ["target-format", "output-format"],
        value_name = "FMT",
        value_parser = Offer::Targets,
        hide_possible_values = true
    )]
    pub to: Option<String>,

    /// Options of that format; repeatable; '-o help' lists them
    #[arg(
        short = 'o',
        long = "options",
        value_name = "K=V,...",
        value_parser = Offer::OptionKeys,
        hide_possible_values = true
    )]
    pub options: Vec<String>,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,

    #[command(flatten)]
    pub threads: ThreadArgs,
}

/// `imgtool create`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  imgtool create -f qcow2 disk.qcow2 20G
  imgtool create -f vhdx -o subformat=fixed disk.vhdx 512M
  imgtool create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2"
)]
pub struct CreateArgs {
    /// Path of the new image
    #[arg(value_name = "PATH", required_unless_present = "options")]
    pub path: Option<PathBuf>,

    /// Virtual size: bytes, or with a suffix k, M, G, T, P, E [default: size of the backing file]
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,

    /// Format of the new image [default: from PATH's extension, else raw]
    #[arg(
        short = 'f',
        long = "format",
        value_name = "FMT",
        value_parser = Offer::Targets,
        hide_possible_values = true
    )]
    pub format: Option<String>,

    /// Options of the format; repeatable; '-o help' lists them
    #[arg(
        short = 'o',
        long = "options",
        value_name = "K=V,...",
        value_parser = Offer::OptionKeys,
        hide_possible_values = true
    )]
    pub options: Vec<String>,

    /// Backing file, relative to the new image; same as -o backing_file=FILE
    #[arg(
        short = 'b',
        long,
        value_name = "FILE",
        value_hint = ValueHint::FilePath
    )]
    pub backing: Option<String>,

    /// Format of the backing file; same as -o backing_fmt=FMT
    #[arg(
        short = 'F',
        long,
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub backing_format: Option<String>,

    /// Passphrase of the new image, if it is encrypted (-f luks, or qcow2 with -o encrypt=luks)
    #[arg(
        long,
        alias = "secret",
        value_name = "file=PATH|env=NAME|fd=N",
        value_parser = SecretPlace,
        hide_possible_values = true
    )]
    pub target_secret: Option<SecretSource>,

    /// Do not open the backing file of a qcow2 image: it may be missing, but SIZE is required
    #[arg(short = 'u', long, alias = "backing-unsafe")]
    pub unsafe_backing: bool,

    /// Passphrase for -o key-secret=ID or encrypt.key-secret=ID: secret,id=ID,file=PATH; repeatable
    #[arg(long, value_name = "OBJECT", hide_short_help = true)]
    pub object: Vec<String>,

    /// Overwrite an existing file, use a block device that is in use
    #[arg(long)]
    pub force: bool,

    /// Print nothing unless something fails
    #[arg(short = 'q', long)]
    pub quiet: bool,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// `imgtool resize`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
New bytes are zeros; partitions and file systems in the disk keep their size. Only zeros are cut off, unless
--shrink is given: shrink the file systems first.

Examples:
  imgtool resize disk.qcow2 40G
  imgtool resize disk.qcow2 +10G
  imgtool resize disk.raw 8G"
)]
pub struct ResizeArgs {
    /// The image
    pub image: PathBuf,

    /// New size, or the change of it with + or -, such as 40G, +10G, -512M
    #[arg(allow_hyphen_values = true, value_parser = NewSize::parse)]
    pub size: NewSize,

    /// Cut off data
    #[arg(long)]
    pub shrink: bool,

    /// Allocate space for the new bytes of a raw file (falloc), or write zeros (full) [default: off]
    #[arg(
        long,
        value_name = "off|falloc|full",
        value_enum,
        default_value_t,
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub preallocation: Preallocation,

    /// Print nothing
    #[arg(short = 'q', long)]
    pub quiet: bool,

    #[command(flatten)]
    pub input: InputArgs,
}

/// Space for the bytes by which an image grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Preallocation {
    /// They are a hole.
    #[default]
    Off,
    /// The file system allocates it.
    Falloc,
    /// Zeros are written.
    Full,
}

/// Size that an image gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes.
    Exact(u64),
    /// The old size and this many bytes more.
    More(u64),
    /// The old size without this many bytes.
    Less(u64),
}

impl NewSize {
    /// Returns the new size in bytes of an image of `old` bytes; `None` if that is no size.
    pub fn of(self, old: u64) -> Option<u64> {
        match self {
            Self::Exact(size) => Some(size),
            Self::More(more) => old.checked_add(more),
            Self::Less(less) => old.checked_sub(less),
        }
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let size = |text: &str| {
            compat::parse_size(text).ok_or_else(|| "expected a size, such as 40G or +10G".to_owned())
        };
        match text.split_at_checked(1) {
            Some(("+", more)) => size(more).map(Self::More),
            Some(("-", less)) => size(less).map(Self::Less),
            _ => size(text).map(Self::Exact),
        }
    }
}
