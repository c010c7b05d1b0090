//! The command lines of the verbs that look at images.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::values::{CACHE_MODES, Offer};
use super::{InputArgs, MessageArgs, OutputArgs, SnapshotArgs, ThreadArgs};

/// `imgtool info`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Examples:
  imgtool info vm.vma.zst
  ssh host cat vm.vma.zst | imgtool info --read-all -
  imgtool info --output json disk.qcow2
  imgtool info --backing-chain --allow-external chain overlay.qcow2"
)]
pub struct InfoArgs {
    /// Images or archives; '-' is standard input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// Show the image's backing files too, as far as --allow-external lets them be opened
    #[arg(long)]
    pub backing_chain: bool,

    /// Read an archive that comes as a stream to its end, however long: counts what is stored
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
  imgtool map --disk drive-scsi0 --output json vm.vma"
)]
pub struct MapArgs {
    /// The image or archive; '-' is standard input
    pub image: PathBuf,

    /// Only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    /// Begin at this guest offset: bytes, or with a suffix k, M, G, T [default: 0]
    #[arg(short = 's', long, value_name = "SIZE")]
    pub start_offset: Option<String>,

    /// Show at most this many bytes of the disk [default: to the end]
    #[arg(long, value_name = "SIZE")]
    pub max_length: Option<String>,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,
}

/// QEMU's cache mode, of the verbs that only read.
#[derive(Debug, Args)]
pub struct CacheArgs {
    /// No effect: images are read through the page cache
    #[arg(
        short = 'T',
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
  1  could not check
  2  corrupt
  3  leaks only: space is wasted, the content is right

Examples:
  imgtool check disk.qcow2
  imgtool check --output json vm.vma.zst"
)]
pub struct CheckArgs {
    /// The image or archive; '-' is standard input
    pub image: PathBuf,

    /// Refused: imgtool changes no image; a conversion makes a clean one
    #[arg(short = 'r', value_name = "leaks|all", hide_short_help = true)]
    pub repair: Option<String>,

    #[command(flatten)]
    pub cache: CacheArgs,

    /// Say nothing unless something is wrong
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
Devices are matched by name; an image of one device matches any other of one
device. Where one is longer, its tail must be zero.

Exit codes:
  0  same
  1  different
  2  could not compare

Examples:
  imgtool compare disk.qcow2 disk.vhdx
  imgtool compare --disk drive-scsi0 vm.vma.zst scsi0.raw"
)]
pub struct CompareArgs {
    /// The first image or archive
    #[arg(value_name = "A")]
    pub first: PathBuf,

    /// The second
    #[arg(value_name = "B")]
    pub second: PathBuf,

    /// Format of B (-f is that of A) [default: found by content]
    #[arg(short = 'F', value_name = "FMT", value_parser = Offer::Formats, hide_possible_values = true)]
    pub second_format: Option<String>,

    /// Sizes must be equal too, and what holds data and what does not
    #[arg(short = 's', long)]
    pub strict: bool,

    /// Compare only this device; repeatable
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

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

/// A digest that `checksum` can make.
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
The digest is that of the raw disk, so images of different formats with the
same content have the same digest.

Examples:
  imgtool checksum disk.qcow2
  imgtool checksum -a blake3 vm.vma.zst"
)]
pub struct ChecksumArgs {
    /// Images or archives; '-' is standard input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// Which digest
    #[arg(short = 'a', long, value_name = "NAME", value_enum, default_value_t)]
    pub algorithm: Algorithm,

    /// Only this device; repeatable
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
  imgtool measure -O qcow2 -o cluster_size=2M --size 1T"
)]
pub struct MeasureArgs {
    /// The image whose content is to be held
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    pub image: Option<PathBuf>,

    /// An empty disk of this size instead of an image
    #[arg(long, value_name = "SIZE")]
    pub size: Option<String>,

    /// Format of the image to be made [default: raw]
    #[arg(
        short = 'O',
        long = "to",
        value_name = "FMT",
        value_parser = Offer::Formats,
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
    /// The image to be made
    #[arg(value_name = "PATH", required_unless_present = "options")]
    pub path: Option<PathBuf>,

    /// Its virtual size: bytes, or with a suffix k, M, G, T, P, E [default: that of -b's file]
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,

    /// Its format [default: by PATH's extension, else raw]
    #[arg(
        short = 'f',
        long = "format",
        value_name = "FMT",
        value_parser = Offer::Formats,
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

    /// The image below the new one, relative to it; -o backing_file=FILE
    #[arg(
        short = 'b',
        long,
        value_name = "FILE",
        requires = "backing_format",
        value_hint = ValueHint::FilePath
    )]
    pub backing: Option<String>,

    /// The format of the backing file; -o backing_fmt=FMT
    #[arg(
        short = 'F',
        long,
        value_name = "FMT",
        value_parser = Offer::Formats,
        hide_possible_values = true
    )]
    pub backing_format: Option<String>,

    /// Do not look at the backing file: it may be missing, and SIZE has to be given
    #[arg(short = 'u', long)]
    pub unsafe_backing: bool,

    /// Refused: there are no secrets or other objects
    #[arg(long, value_name = "OBJECT", hide_short_help = true)]
    pub object: Vec<String>,

    /// Overwrite an existing file
    #[arg(long)]
    pub force: bool,

    /// Say nothing unless something fails
    #[arg(short = 'q', long)]
    pub quiet: bool,

    #[command(flatten)]
    pub output: OutputArgs,
}
