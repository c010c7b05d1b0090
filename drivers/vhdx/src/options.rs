//! The options of a new file, and the layout that follows from them.

use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{BackingName, CreateOptions, Error, OptionKind, OptionSpec, OptionValues, Result};
use uuid::Uuid;

use crate::layout::bat::{BatShape, ENTRY_LEN, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use crate::layout::region::Region;
use crate::layout::{HEADER_SECTION_LEN, MAX_VIRTUAL_SIZE, MIB};
use crate::sink::child::Parent;

/// Maximum length in bytes of the parent's name in a new image. Our limit, as in qcow2: well below the 64 KiB
/// of a value of a parent locator.
const MAX_PARENT_NAME: usize = 1023;
/// Default logical sector size in bytes: every guest can boot from it.
pub(crate) const DEFAULT_LOGICAL_SECTOR_SIZE: u64 = 512;
/// Default physical sector size in bytes, as in Hyper-V. Payload blocks are aligned to it.
const DEFAULT_PHYSICAL_SECTOR_SIZE: u64 = 4096;
/// Default length of the log in bytes, as in Hyper-V and QEMU.
const DEFAULT_LOG_SIZE: u64 = MIB;
/// Maximum length of the log in bytes. QEMU's limit: the largest multiple of 1 MiB that fits into the 32-bit
/// field of the header (section 2.2.2).
const MAX_LOG_SIZE: u64 = (4 << 30) - MIB;
/// Length of the metadata region in bytes: the minimum of 1 MiB, because the table and the items take less
/// than 66 KiB.
const METADATA_LEN: u64 = MIB;

/// The options of a new image.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        help: "blocks in the file: those with data (dynamic) or all (fixed)",
        default: "dynamic",
        kind: OptionKind::OneOf(&["dynamic", "fixed"]),
    },
    OptionSpec {
        name: "block_size",
        help: "unit in which space is allocated",
        default: "by size, as QEMU: 8M, above 1G 16M, above 100G 32M, above 32T 64M; as the parent",
        kind: OptionKind::PowerOfTwoOrZero { min: MIN_BLOCK_SIZE, max: MAX_BLOCK_SIZE },
    },
    OptionSpec {
        name: "logical_sector_size",
        help: "sector size that the guest sees; the virtual size is rounded up to it",
        default: "512",
        kind: OptionKind::OneOfSizes(&[512, 4096]),
    },
    OptionSpec {
        name: "physical_sector_size",
        help: "physical sector size that the guest sees",
        default: "4096",
        kind: OptionKind::OneOfSizes(&[512, 4096]),
    },
    OptionSpec {
        name: "log_size",
        help: "space for the log of later writers",
        default: "1M",
        kind: OptionKind::Size { min: MIB, max: MAX_LOG_SIZE, unit: MIB },
    },
    OptionSpec {
        name: "block_state_zero",
        help: "accepted for compatibility, no effect: absent blocks are marked as the specification says",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "disk_id",
        help: "SCSI page 83 identifier of the disk",
        default: "derived from content and options",
        kind: OptionKind::Text("a GUID"),
    },
    OptionSpec {
        name: "backing_file",
        help: "parent of the new image, a VHDX image: only the difference to it is stored",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "backing_fmt",
        help: "format of the parent: vhdx",
        default: "none",
        kind: OptionKind::Text("a format name"),
    },
    OptionSpec {
        name: "data_write_guid",
        help: "GUID by which differencing disks know this content",
        default: "derived from content and options",
        kind: OptionKind::Text("a GUID"),
    },
    OptionSpec {
        name: "file_write_guid",
        help: "GUID of this state of the file",
        default: "derived from content and options",
        kind: OptionKind::Text("a GUID"),
    },
];

/// The options of a new file, parsed and checked.
#[derive(Debug, Clone)]
pub(crate) struct VhdxOptions {
    /// True if every block is allocated from the start.
    pub(crate) fixed: bool,
    /// Size of a payload block in bytes; `None` if it depends on the virtual size.
    block_size: Option<u64>,
    /// Logical sector size in bytes; `None` for the parent's, or the default.
    logical_sector_size: Option<u64>,
    /// Physical sector size in bytes; `None` for the parent's, or the default.
    physical_sector_size: Option<u64>,
    /// Length of the log in bytes, a multiple of 1 MiB.
    log_size: u64,
    /// Parent of a differencing file.
    pub(crate) backing: Option<BackingName>,
    /// SCSI page 83 identifier; `None` if it is derived from content and options.
    pub(crate) disk_id: Option<Uuid>,
    /// GUID of the guest's content; `None` if it is derived from content and options.
    pub(crate) data_write_guid: Option<Uuid>,
    /// GUID of this state of the file; `None` if it is derived from content and options.
    pub(crate) file_write_guid: Option<Uuid>,
    /// Length in bytes of the shortest run of zeros that becomes a hole: a power of two, at least 4 KiB.
    /// `None` if all zeros are stored like data.
    pub(crate) zero_unit: Option<u64>,
}

impl VhdxOptions {
    /// Parses the options. A request for compression or an invalid GUID is a usage error.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::usage("VHDX images can't be compressed")
                .hint("choose another format, or a name that ends in .zst or .gz"));
        }
        let values = &options.values;
        let size = |name: &str, default: u64| values.size(name).unwrap_or(default);
        let fixed = values.text("subformat") == Some("fixed");
        let backing = BackingName::storable(values, &[crate::FORMAT])?;
        if let Some(backing) = &backing {
            check_backing(backing, fixed)?;
        }
        Ok(Self {
            fixed,
            // As in QEMU, 0 selects the default.
            block_size: values.size("block_size").filter(|size| *size > 0),
            logical_sector_size: values.size("logical_sector_size"),
            physical_sector_size: values.size("physical_sector_size"),
            log_size: size("log_size", DEFAULT_LOG_SIZE),
            backing,
            disk_id: guid(values, "disk_id")?,
            data_write_guid: guid(values, "data_write_guid")?,
            file_write_guid: guid(values, "file_write_guid")?,
            zero_unit: options.zero_unit(ZERO_GRANULARITY as u64),
        })
    }

    /// Lays out a file for a device of `size` bytes, with the block and sector sizes of its parent if it has
    /// one.
    ///
    /// # Errors
    /// `Unsupported` if the device is larger than the format's limit; `Usage` for a logical sector size other than
    /// the parent's.
    pub(crate) fn layout(&self, size: u64, parent: Option<&Parent>) -> Result<FileLayout> {
        if size > MAX_VIRTUAL_SIZE {
            return Err(Error::unsupported(format!(
                "the device has {size} bytes; the limit of VHDX is {MAX_VIRTUAL_SIZE} (64 TiB)"
            ))
            .hint("choose another format"));
        }
        let logical_sector_size = self.logical_sector_size(parent)?;
        let virtual_size = size.next_multiple_of(logical_sector_size);
        let block_size = self.block_size.or(parent.map(|parent| parent.block_size));
        let block_size = block_size.unwrap_or_else(|| default_block_size(virtual_size));
        let shape = BatShape::new(virtual_size, block_size, logical_sector_size);
        let bat_len = (shape.entries(self.backing.is_some()) * ENTRY_LEN).max(1).next_multiple_of(MIB);
        let physical_sector_size = self
            .physical_sector_size
            .or(parent.and_then(|parent| parent.physical_sector_size))
            .unwrap_or(DEFAULT_PHYSICAL_SECTOR_SIZE);
        let log = region(HEADER_SECTION_LEN, self.log_size);
        let metadata = region(log.end(), METADATA_LEN);
        let bat = region(metadata.end(), bat_len);
        let payload_start = bat.end();
        Ok(FileLayout { virtual_size, shape, physical_sector_size, log, metadata, bat, payload_start })
    }

    /// Returns an upper bound of the length in bytes of the BAT for a device of `size` bytes, whose parent is
    /// not known yet.
    pub(crate) fn max_bat_len(&self, size: u64) -> Result<u64> {
        let smallest = self.backing.as_ref().map(|_| MIN_BLOCK_SIZE);
        let layout = Self { block_size: self.block_size.or(smallest), ..self.clone() }.layout(size, None)?;
        Ok(layout.bat.length.into())
    }

    /// Returns the logical sector size: the parent's, or that of the options.
    fn logical_sector_size(&self, parent: Option<&Parent>) -> Result<u64> {
        let Some(parent) = parent else {
            return Ok(self.logical_sector_size.unwrap_or(DEFAULT_LOGICAL_SECTOR_SIZE));
        };
        match self.logical_sector_size {
            Some(other) if other != parent.logical_sector_size => Err(Error::usage(format!(
                "the parent has logical sectors of {} bytes, not {other}",
                parent.logical_sector_size
            ))
            .hint("leave out logical_sector_size")),
            _ => Ok(parent.logical_sector_size),
        }
    }
}

/// Refuses options that a differencing file can't have.
fn check_backing(backing: &BackingName, fixed: bool) -> Result<()> {
    if fixed {
        return Err(Error::usage("backing_file and subformat=fixed can't be combined"));
    }
    if !(1..=MAX_PARENT_NAME).contains(&backing.name.len()) {
        return Err(Error::usage(format!(
            "the parent's name must have 1 to {MAX_PARENT_NAME} bytes, not {}",
            backing.name.len()
        )));
    }
    Ok(())
}

/// Layout of a new file: header section, log, metadata, BAT and payload blocks, in this order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileLayout {
    /// Virtual size in bytes, a multiple of the logical sector size.
    pub(crate) virtual_size: u64,
    /// Dimensions of the BAT.
    pub(crate) shape: BatShape,
    /// Physical sector size in bytes.
    pub(crate) physical_sector_size: u64,
    /// The log.
    pub(crate) log: Region,
    /// The metadata region.
    pub(crate) metadata: Region,
    /// The BAT region.
    pub(crate) bat: Region,
    /// File offset in bytes of the first payload block; the others follow without gaps.
    pub(crate) payload_start: u64,
}

impl FileLayout {
    /// Returns the length in bytes of a file with `payload_blocks` payload blocks, which is also the file
    /// offset of the next block.
    pub(crate) fn file_len(&self, payload_blocks: u64) -> u64 {
        self.payload_start + payload_blocks * self.shape.block_size
    }
}

/// Creates a region. `length` fits into 32 bits: the log is shorter than 4 GiB, and the longest BAT has
/// 513 MiB.
fn region(file_offset: u64, length: u64) -> Region {
    Region { file_offset, length: u32::try_from(length).unwrap_or(u32::MAX) }
}

/// Returns QEMU's default: small disks get small files, and no BAT has much more than a million entries.
fn default_block_size(virtual_size: u64) -> u64 {
    const GIB: u64 = 1 << 30;
    match virtual_size {
        size if size > 32 * 1024 * GIB => 64 * MIB,
        size if size > 100 * GIB => 32 * MIB,
        size if size > GIB => 16 * MIB,
        _ => 8 * MIB,
    }
}

/// Parses the GUID of option `name`, which must not be nil; `None` if the option is not set.
fn guid(values: &OptionValues, name: &str) -> Result<Option<Uuid>> {
    let Some(text) = values.text(name) else { return Ok(None) };
    match Uuid::try_parse(text) {
        Ok(guid) if !guid.is_nil() => Ok(Some(guid)),
        _ => Err(Error::usage(format!(
            "option '{name}' must be a GUID such as 6a1b2c3d-0000-4000-8000-000000000001, not '{text}'"
        ))),
    }
}
