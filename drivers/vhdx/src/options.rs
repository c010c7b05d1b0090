//! The `-o` options, and the layout of a new file that follows from them.

use imgtool_toolkit::zero::ZERO_GRANULARITY;
use imgtool_toolkit::{CreateOptions, Error, OptionSpec, Result};
use uuid::Uuid;

use crate::layout::bat::{BatShape, ENTRY_LEN, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use crate::layout::region::Region;
use crate::layout::{HEADER_SECTION_LEN, MAX_VIRTUAL_SIZE, MIB};

/// What every guest can boot from.
pub(crate) const DEFAULT_LOGICAL_SECTOR_SIZE: u64 = 512;
/// What Hyper-V's own files say: their blocks are aligned for it.
const DEFAULT_PHYSICAL_SECTOR_SIZE: u64 = 4096;
/// The log of Hyper-V and QEMU.
const DEFAULT_LOG_SIZE: u64 = MIB;
/// QEMU's limit: it must fit 32 bits.
const MAX_LOG_SIZE: u64 = (4 << 30) - MIB;
/// Table and items take less than 66 KiB; regions come in units of 1 MiB.
const METADATA_LEN: u64 = MIB;

pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        help: "whether blocks take space only when they hold data, or all from the start",
        default: "dynamic",
        values: "dynamic|fixed",
    },
    OptionSpec {
        name: "block_size",
        help: "unit in which space is allocated",
        default: "by size, as QEMU: 8M, above 1G 16M, above 100G 32M, above 32T 64M",
        values: "1M..256M, a power of two",
    },
    OptionSpec {
        name: "logical_sector_size",
        help: "sector size that the guest sees; the virtual size is rounded up to it",
        default: "512",
        values: "512|4096",
    },
    OptionSpec {
        name: "physical_sector_size",
        help: "sector size that the guest is told the disk has inside",
        default: "4096",
        values: "512|4096",
    },
    OptionSpec {
        name: "log_size",
        help: "space for the log of later writers",
        default: "1M",
        values: "a multiple of 1M, less than 4G",
    },
    OptionSpec {
        name: "disk_id",
        help: "SCSI page 83 identifier of the disk",
        default: "derived from content and options",
        values: "a GUID",
    },
    OptionSpec {
        name: "data_write_guid",
        help: "GUID by which differencing disks know this content",
        default: "derived from content and options",
        values: "a GUID",
    },
    OptionSpec {
        name: "file_write_guid",
        help: "GUID of this state of the file",
        default: "derived from content and options",
        values: "a GUID",
    },
];

/// The options, checked.
#[derive(Debug, Clone)]
pub(crate) struct VhdxOptions {
    /// All blocks are allocated.
    pub(crate) fixed: bool,
    /// Bytes; `None`: by the disk's size.
    block_size: Option<u64>,
    /// Bytes.
    pub(crate) logical_sector_size: u64,
    /// Bytes.
    pub(crate) physical_sector_size: u64,
    /// Bytes.
    log_size: u64,
    pub(crate) disk_id: Option<Uuid>,
    pub(crate) data_write_guid: Option<Uuid>,
    pub(crate) file_write_guid: Option<Uuid>,
    /// `-S`: zeros shorter than this many bytes (a power of two, at least 4 KiB) are stored like data;
    /// `None`: all zeros are.
    pub(crate) zero_unit: Option<u64>,
}

impl VhdxOptions {
    /// The options from their texts.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        options.check_names("vhdx", OPTIONS)?;
        if options.compress.is_some() {
            return Err(Error::usage("VHDX images are not compressed")
                .hint("choose another format, or a name that ends in .zst or .gz"));
        }
        let fixed = match options.get("subformat") {
            None | Some("dynamic") => false,
            Some("fixed") => true,
            Some(other) => {
                return Err(Error::usage(format!("option 'subformat' is dynamic or fixed, not '{other}'")));
            }
        };
        // 0 is QEMU's word for "by size".
        let block_size = options.size("block_size")?.filter(|&size| size != 0);
        if let Some(size) = block_size
            && (!size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size))
        {
            return Err(Error::usage(format!(
                "option 'block_size' is a power of two from 1M to 256M, not {size}"
            )));
        }
        let log_size = options.size("log_size")?.unwrap_or(DEFAULT_LOG_SIZE);
        if !log_size.is_multiple_of(MIB) || !(MIB..=MAX_LOG_SIZE).contains(&log_size) {
            return Err(Error::usage(format!(
                "option 'log_size' is a multiple of 1M from 1M to 4095M, not {log_size}"
            )));
        }
        Ok(Self {
            fixed,
            block_size,
            logical_sector_size: sector_size(options, "logical_sector_size", DEFAULT_LOGICAL_SECTOR_SIZE)?,
            physical_sector_size: sector_size(options, "physical_sector_size", DEFAULT_PHYSICAL_SECTOR_SIZE)?,
            log_size,
            disk_id: guid(options, "disk_id")?,
            data_write_guid: guid(options, "data_write_guid")?,
            file_write_guid: guid(options, "file_write_guid")?,
            zero_unit: options.zero_unit(ZERO_GRANULARITY as u64),
        })
    }

    /// The layout of a file for a device of `size` bytes.
    pub(crate) fn layout(&self, size: u64) -> Result<Layout> {
        if size > MAX_VIRTUAL_SIZE {
            return Err(Error::unsupported(format!(
                "the device has {size} bytes, VHDX holds at most {MAX_VIRTUAL_SIZE} (64 TiB)"
            ))
            .hint("choose another format"));
        }
        let virtual_size = size.next_multiple_of(self.logical_sector_size);
        let block_size = self.block_size.unwrap_or_else(|| default_block_size(virtual_size));
        let shape = BatShape::new(virtual_size, block_size, self.logical_sector_size);
        let bat_len = (shape.entries(false) * ENTRY_LEN).max(1).next_multiple_of(MIB);
        let log = region(HEADER_SECTION_LEN, self.log_size);
        let metadata = region(log.end(), METADATA_LEN);
        let bat = region(metadata.end(), bat_len);
        Ok(Layout { virtual_size, shape, log, metadata, bat, payload_start: bat.end() })
    }
}

/// Where everything stands in a new file: header section, log, metadata, BAT, payload blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Bytes, a multiple of the logical sector size.
    pub(crate) virtual_size: u64,
    pub(crate) shape: BatShape,
    pub(crate) log: Region,
    pub(crate) metadata: Region,
    pub(crate) bat: Region,
    /// Where the first payload block stands; the others follow without a gap.
    pub(crate) payload_start: u64,
}

impl Layout {
    /// Length of a file with so many payload blocks.
    pub(crate) fn file_len(&self, payload_blocks: u64) -> u64 {
        self.payload_start + payload_blocks * self.shape.block_size
    }
}

/// A region; lengths are bounded by the options: a BAT has at most 512 MiB + 128 KiB.
fn region(file_offset: u64, length: u64) -> Region {
    Region { file_offset, length: u32::try_from(length).unwrap_or(u32::MAX) }
}

/// QEMU's choice: small disks make small files, and no BAT has more than a million entries.
fn default_block_size(virtual_size: u64) -> u64 {
    const GIB: u64 = 1 << 30;
    match virtual_size {
        size if size > 32 * 1024 * GIB => 64 * MIB,
        size if size > 100 * GIB => 32 * MIB,
        size if size > GIB => 16 * MIB,
        _ => 8 * MIB,
    }
}

fn sector_size(options: &CreateOptions, name: &str, default: u64) -> Result<u64> {
    match options.size(name)? {
        None => Ok(default),
        Some(size @ (512 | 4096)) => Ok(size),
        Some(other) => Err(Error::usage(format!("option '{name}' is 512 or 4096, not {other}"))),
    }
}

fn guid(options: &CreateOptions, name: &str) -> Result<Option<Uuid>> {
    let Some(text) = options.get(name) else { return Ok(None) };
    match Uuid::try_parse(text) {
        Ok(guid) if !guid.is_nil() => Ok(Some(guid)),
        _ => Err(Error::usage(format!(
            "option '{name}' is a GUID such as 6a1b2c3d-0000-4000-8000-000000000001, not '{text}'"
        ))),
    }
}
