//! The command line of `imgtool convert`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use imgtool_platform::Platform;

use crate::secrets::SecretSource;

use super::values::{CACHE_MODES, Offer, PlatformName, SecretPlace};
use super::{InputArgs, MessageArgs, NewSize, OutputArgs, SnapshotArgs, ThreadArgs};

/// Text at the end of the short help.
const EXAMPLES: &str = "\
Examples:
  imgtool convert disk.vhdx disk.qcow2
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert vm.vma.zst --disk drive-scsi0 scsi0.raw
  imgtool convert a.qcow2 b.raw --config 100.conf \\
      vzdump-qemu-100-2026_01_31-12_00_00.vma.zst
  zstdcat vm.vma.zst | imgtool convert - --to vhdx outdir/
  imgtool convert vm.vma --target drive-scsi0=/dev/vg/disk,zeroed
  imgtool convert disk.qcow2 --for azure disk.vhd";

/// Text at the end of the long help and of the manual page.
const RULES_AND_EXAMPLES: &str = "\
DEST is a file if there is one disk, or if the output is one archive. Otherwise
it is a directory, created if missing: each disk becomes <device>.<extension>,
each configuration keeps its name, the memory of a running guest becomes
vmstate.bin. A single disk written into a directory (an existing one, or a DEST
ending in '/') is named after its source.

If a source is an archive, DEST is a directory even for one disk, unless its
name is that of a file: with the extension of a format (disk.qcow2), with any
extension if --disk chooses one disk, or '-'. Of several archives, each gets a
directory of its own in it, named after the archive.

The output format is that of --to, else that of DEST's extension, else raw. If
DEST ends in .zst or .gz, the whole output is compressed, provided that the
format can be written sequentially.

An unfinished output is called .NAME.partial-XXXXXXXXXXXX. If anything fails, no
unfinished output is left under its final name, and of several outputs either
all appear or none. A block device is overwritten in place; an empty file is
replaced, other files need --force.

--help-compat lists the other flags: those of qemu-img, and rare ones.

Exit codes:
  0  success
  1  failed; no output is left under its final name
  2  usage error
  3  finished with losses (--salvage); each lost range is listed
  75 failed, but another try may help (the network, a server)
  After Ctrl-C or another signal, the program cleans up and dies of the signal.
  SIGUSR1 prints the progress.

Examples:
  imgtool convert disk.vhdx disk.qcow2
  imgtool convert vm.vma.zst --to qcow2 outdir/
  imgtool convert vm.vma.zst --disk drive-scsi0 scsi0.raw
  imgtool convert a.qcow2 b.raw --config 100.conf \\
      vzdump-qemu-100-2026_01_31-12_00_00.vma.zst
  zstdcat vm.vma.zst | imgtool convert - --to vhdx outdir/
  imgtool convert vm.vma --target drive-scsi0=/dev/vg/disk,zeroed
  imgtool convert disk.qcow2 --for azure disk.vhd";

/// `imgtool convert`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "imgtool convert [-f FMT] [-O FMT] [OPTIONS] SOURCE... DEST",
    after_help = EXAMPLES,
    after_long_help = RULES_AND_EXAMPLES
)]
pub struct ConvertArgs {
    /// One or more sources and the destination: SOURCE... DEST
    ///
    /// A SOURCE is a path, a URL (http, https, nbd), or '-' for standard input; NAME=PATH sets the name of its device. DEST is a
    /// path, or '-' for standard output if the format can be streamed; it may be omitted if every
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

    /// Show the other flags: those of qemu-img, and rare ones
    #[arg(long)]
    pub help_compat: bool,
}

/// Flags for the outputs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Writing")]
pub struct TargetArgs {
    /// Format of the output [default: from DEST's extension, else raw]
    #[arg(
        short = 'O',
        long = "to",
        aliases = ["target-format", "output-format"],
        value_name = "FMT",
        value_parser = Offer::Targets,
        hide_possible_values = true
    )]
    pub to: Option<String>,

    /// Choose format, options, sizes and names for this platform, and check the result against its import rules
    ///
    /// proxmox, libvirt, hyperv, azure, aws, gce, vmware, virtualbox, openstack; hyperv:gen1 and hyperv:gen2 (azure
    /// likewise) state the generation of the machine. docs/platforms.md lists the rules.
    #[arg(
        long = "for",
        value_name = "PLATFORM",
        value_parser = PlatformName,
        hide_possible_values = true
    )]
    pub platform: Option<Platform>,

    /// Options of the output format; repeatable; '-o help' lists them
    #[arg(
        short = 'o',
        long = "options",
        aliases = ["target-options", "target-format-options"],
        value_name = "K=V,...",
        value_parser = Offer::OptionKeys,
        hide_possible_values = true
    )]
    pub options: Vec<String>,

    /// Compress qcow2 clusters (zlib, zstd), VMDK streams (zlib) or a whole VMA archive (zstd, gzip)
    #[arg(
        short = 'c',
        long,
        value_name = "ALG[:LEVEL]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ""
    )]
    pub compress: Option<String>,

    /// Shortest run of zeros to leave out; 0 writes all zeros like data [default: 4k]
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE")]
    pub sparse_size: Option<String>,

    /// Give the disk this virtual size, such as 40G or +10G; zeros fill the rest
    ///
    /// Partitions and file systems in the disk keep their size. A smaller size cuts off zeros, and is
    /// refused if data would be cut off: from a stream, when that data is read.
    #[arg(long, value_name = "SIZE", value_parser = NewSize::parse, allow_hyphen_values = true)]
    pub size: Option<NewSize>,

    /// Overwrite existing files, use block devices that are in use, read images marked as corrupt
    #[arg(long)]
    pub force: bool,

    /// Also copy the persistent bitmaps, from one qcow2 image to another
    #[arg(long)]
    pub bitmaps: bool,

    /// Leave out bitmaps that were not saved properly, instead of refusing them
    #[arg(long, requires = "bitmaps")]
    pub skip_broken_bitmaps: bool,

    /// Store only the differences from this backing file; same as -o backing_file=FILE
    #[arg(short = 'B', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
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

    /// Do not create DEST: write into an existing image, file or block device
    ///
    /// A qcow2 or VHDX image keeps its size, options, snapshots and backing file, and what follows
    /// the disk in it. A raw target may be up to 4 MiB larger than the disk (with --force, any larger
    /// size); the rest of it stays untouched. A smaller target is refused, and so is an image of
    /// another format, which could only be replaced. If neither -O nor the extension states the format,
    /// the content of DEST does; an image that is called .raw is refused. The size of a raw stream (a pipe, a .gz) is
    /// known, and compared, only at its end.
    #[arg(short = 'n', long = "no-create")]
    pub no_create: bool,

    /// With -n: assume that the target reads as zeros, and write no zeros to it
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,

    /// Passphrase of an encrypted output (-O luks, or qcow2 with -o encrypt=luks) [default: that of a single --secret]
    ///
    /// The key of an encrypted output is random, so the output differs from run to run.
    #[arg(
        long,
        value_name = "file=PATH|env=NAME|fd=N",
        value_parser = SecretPlace,
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub target_secret: Option<SecretSource>,

    /// Read the outputs back and compare them with the sources before they get their final names
    #[arg(long)]
    pub verify: bool,
}

/// Flags that choose devices, their targets and the configurations.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices and configurations")]
pub struct DeviceArgs {
    /// Convert only this device; repeatable. 'scsi0' also means 'drive-scsi0'
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,

    /// Join the disks of several sources to one disk, one after the other, as qemu-img does
    ///
    /// The length of each is rounded up to a multiple of 512 bytes. Each source holds one disk.
    #[arg(long)]
    pub join: bool,

    /// Write a device to a path of its own; repeatable
    ///
    /// An existing PATH, unless it is empty, is overwritten in place and keeps its length, under the rules
    /// of -n; 'zeroed' assumes that it reads as zeros. The format is that of format=, else that of PATH's
    /// extension, else that of an image at PATH, else raw.
    #[arg(long, value_name = "NAME=PATH[,format=FMT][,zeroed]")]
    pub target: Vec<OsString>,

    /// Add this configuration file to the archive; repeatable. A Proxmox VE guest's (100.conf) becomes that
    /// of a backup
    ///
    /// A guest's configuration as in /etc/pve/qemu-server becomes qemu-server.conf, whatever its name:
    /// without snapshots, pending changes, lock and unused volumes, and with the lines that assign the
    /// disks to its drives, by name (scsi0=PATH), size and order. 100.fw becomes qemu-server.fw.
    /// An OVF descriptor and the XML of a libvirt domain, found by their content, become qemu-server.conf
    /// too; the summary lists what it has no setting for.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Vec<PathBuf>,

    /// Keep the configurations of the sources in addition to those of --config and --proxmox; without
    /// either of these they are always kept
    #[arg(long)]
    pub config_from_source: bool,

    /// Set this in the guest's qemu-server.conf; repeatable
    ///
    /// It changes the configuration of --config, else that of the source, else a minimal one with 2048
    /// MiB of memory. An archive without any configuration gets a minimal one also without this flag. A disk
    /// named like a drive (scsi0, drive-virtio1, efidisk0 ...) becomes that drive, any other disk the
    /// next one, SCSI first; devices are renamed as qmrestore expects. Keys and values are those of
    /// qm.conf(5).
    #[arg(long, value_name = "KEY=VALUE", num_args = 1)]
    pub proxmox: Vec<String>,
}

/// Flags for the copying itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Work")]
pub struct WorkArgs {
    /// Recover the intact parts of a damaged image, fill the rest with zeros, list the lost ranges and
    /// exit with 3
    #[arg(long)]
    pub salvage: bool,

    /// Read at most this many bytes of data per second, such as 50M
    ///
    /// Counts the uncompressed data of the disks, stored zeros included, also of those in a stream that are
    /// not copied, and what --verify reads back. Holes do not count.
    #[arg(short = 'r', long = "rate-limit", alias = "rate", value_name = "RATE")]
    pub rate_limit: Option<String>,
}

/// Flags that scripts pass to qemu-img.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compatibility with qemu-img")]
pub struct CompatArgs {
    /// Accepted, no effect: outputs are always flushed before they get their final names
    #[arg(
        short = 't',
        long,
        value_name = "CACHE",
        value_parser = CACHE_MODES,
        hide_possible_values = true
    )]
    pub target_cache: Option<String>,

    /// Accepted, no effect: sources are read through the page cache
    #[arg(
        short = 'T',
        long,
        value_name = "CACHE",
        value_parser = CACHE_MODES,
        hide_possible_values = true
    )]
    pub source_cache: Option<String>,

    /// Accepted, no effect: writes are reordered wherever that is safe
    #[arg(short = 'W', long = "oob-writes")]
    pub out_of_order: bool,

    /// Accepted, no effect: the formats decide how bytes are copied
    #[arg(short = 'C', long = "copy-range-offloading")]
    pub copy_offload: bool,

    /// With -n: take DEST as options: driver=FORMAT,file.filename=PATH
    #[arg(long, hide_short_help = true)]
    pub target_image_opts: bool,
}
