//! The options of a new image, and the layout that follows from them.

use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{BackingName, CreateOptions, Error, OptionKind, OptionSpec, Result};
use uuid::Uuid;

use crate::layout::footer::{DiskType, FOOTER_LEN};
use crate::layout::header::{HEADER_LEN, Header};
use crate::layout::{ENTRY_LEN, SECTOR_SIZE};

/// Size of a block in bytes: Microsoft's default, and the only one that all readers take.
const BLOCK_SIZE: u64 = 2 << 20;

/// Maximum virtual size of a dynamic image in bytes: Microsoft's limit, 2040 GiB.
pub(crate) const MAX_DYNAMIC_SIZE: u64 = 2040 << 30;

/// Maximum virtual size of a fixed image in bytes. Our limit: with the footer, files stay far below 2^63.
const MAX_FIXED_SIZE: u64 = (1 << 62) - (1 << 20);

/// Default multiple, in bytes, of the virtual size of a fixed image: Azure takes whole MiB only.
pub(crate) const FIXED_ALIGNMENT: u64 = 1 << 20;

/// Maximum length in bytes of the parent's name in a new image. Our limit, as in qcow2.
const MAX_PARENT_PATH: usize = 1023;

/// Maximum length of the parent's file name in UTF-16 units: the header's field without a final NUL.
const MAX_PARENT_NAME: usize = 255;

/// Seconds from 1970 to 2000, the epoch of the format's times.
const EPOCH: i64 = 946_684_800;

/// The options of a new image.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        help: "blocks in the file: those with data (dynamic) or all (fixed, for Azure)",
        default: "dynamic",
        kind: OptionKind::OneOf(&["dynamic", "fixed"]),
    },
    OptionSpec {
        name: "align",
        help: "multiple to which the virtual size is rounded up; Azure requires 1M",
        default: "1M if fixed, else 512",
        kind: OptionKind::OneOfSizes(&[512, 1 << 20]),
    },
    OptionSpec {
        name: "backing_file",
        help: "parent of the new image, a VHD image: only the difference to it is stored",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "backing_fmt",
        help: "format of the parent: vhd",
        default: "none",
        kind: OptionKind::Text("a format name"),
    },
    OptionSpec {
        name: "force_size",
        help: "accepted for compatibility: sizes are never rounded to a geometry",
        default: "on",
        kind: OptionKind::OneOf(&["on"]),
    },
    OptionSpec {
        name: "uuid",
        help: "UUID of the image, by which differencing images identify it",
        default: "derived from content and options",
        kind: OptionKind::Text("a UUID"),
    },
];

/// The options of a new image, parsed and checked.
#[derive(Debug, Clone)]
pub(crate) struct VhdOptions {
    /// Type of the image.
    pub(crate) disk_type: DiskType,
    /// Multiple, in bytes, to which the virtual size is rounded up.
    align: u64,
    /// Parent of a differencing image.
    pub(crate) backing: Option<BackingName>,
    /// UUID of the image; `None` if it is derived from content and options.
    pub(crate) uuid: Option<Uuid>,
    /// Time of creation in the format's unit, seconds since 2000.
    pub(crate) time: u32,
    /// True for an image without content. Such images differ in their names alone, so that their UUIDs are derived from
    /// the name as well: a child identifies its parent by its UUID.
    pub(crate) blank: bool,
    /// Length in bytes of the shortest run of zeros that becomes a hole; `None` if all zeros are stored.
    pub(crate) zero_unit: Option<u64>,
}

impl VhdOptions {
    /// Parses the options. A request for compression or an invalid UUID is a usage error.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::usage("VHD images can't be compressed")
                .hint("choose another format, or a name that ends in .zst or .gz"));
        }
        let values = &options.values;
        let is_fixed = values.text("subformat") == Some("fixed");
        let uuid = match values.text("uuid").map(|text| (text, Uuid::try_parse(text))) {
            None => None,
            Some((_, Ok(uuid))) if !uuid.is_nil() => Some(uuid),
            Some((text, _)) => {
                return Err(Error::usage(format!(
                    "option 'uuid' must be a UUID such as 6a1b2c3d-0000-4000-8000-000000000001, not '{text}'"
                )));
            }
        };
        let seconds = options.source_date_epoch.map_or(0, |seconds| seconds.saturating_sub(EPOCH).max(0));
        let backing = BackingName::storable(values, &[crate::FORMAT, "vpc"])?;
        let disk_type = match &backing {
            Some(_) if is_fixed => {
                return Err(Error::usage("backing_file and subformat=fixed can't be combined"));
            }
            Some(backing) => {
                check_name(&backing.name)?;
                DiskType::Differencing
            }
            None if is_fixed => DiskType::Fixed,
            None => DiskType::Dynamic,
        };
        Ok(Self {
            disk_type,
            backing,
            align: values.size("align").unwrap_or(if is_fixed { FIXED_ALIGNMENT } else { SECTOR_SIZE }),
            uuid,
            time: u32::try_from(seconds).unwrap_or(u32::MAX),
            blank: options.blank,
            zero_unit: options.zero_unit(ZERO_GRANULARITY as u64),
        })
    }

    /// True if the image is fixed.
    pub(crate) fn is_fixed(&self) -> bool {
        self.disk_type == DiskType::Fixed
    }

    /// Returns the virtual size for a device of `size` bytes.
    ///
    /// # Errors
    /// `Unsupported` if the device is larger than the format's limit.
    pub(crate) fn virtual_size(&self, size: u64) -> Result<u64> {
        let most = if self.is_fixed() { MAX_FIXED_SIZE } else { MAX_DYNAMIC_SIZE };
        if let Some(rounded) = size.checked_next_multiple_of(self.align).filter(|rounded| *rounded <= most) {
            return Ok(rounded);
        }
        let (limit, hint) = if self.is_fixed() {
            (format!("fixed VHD images is {most}"), "choose a smaller disk")
        } else {
            (format!("dynamic VHD images is {most} (2040 GiB)"), "choose VHDX, or the subformat fixed")
        };
        Err(Error::unsupported(format!("the device has {size} bytes; the limit of {limit}")).hint(hint))
    }
}

/// Refuses a name of a parent that is too long for the header.
fn check_name(name: &str) -> Result<()> {
    let last = name.rsplit('/').next().unwrap_or_default().encode_utf16().count();
    if (1..=MAX_PARENT_NAME).contains(&last) && name.len() <= MAX_PARENT_PATH {
        return Ok(());
    }
    Err(Error::usage(format!(
        "the parent's file name must have 1 to {MAX_PARENT_NAME} characters, and its path {MAX_PARENT_PATH} bytes at most"
    )))
}

/// Returns the dynamic header for a disk of `virtual_size` bytes: a copy of the footer, the header and the BAT
/// follow each other.
pub(crate) fn header(virtual_size: u64) -> Header {
    Header {
        bat_offset: (FOOTER_LEN + HEADER_LEN) as u64,
        entries: virtual_size.div_ceil(BLOCK_SIZE),
        block_size: BLOCK_SIZE,
        parent_uuid: Uuid::nil(),
        parent_time: 0,
        parent_name: String::new(),
        locators: Vec::new(),
    }
}

/// Returns the length in bytes of a BAT, padded to whole sectors.
pub(crate) fn bat_len(header: &Header) -> u64 {
    (header.entries * ENTRY_LEN).next_multiple_of(SECTOR_SIZE)
}
