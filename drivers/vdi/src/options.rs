//! The options of a new image, and the layout that follows from them.

use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{BackingName, CreateOptions, Error, OptionKind, OptionSpec, OptionValues, Result};
use uuid::Uuid;

use crate::layout::{ENTRY_LEN, Header, ImageType, MAX_BLOCK_SIZE, SECTOR_SIZE};

/// Alignment in bytes of the map and of the first block: the default size of a block, as in VirtualBox.
const MIB: u64 = 1 << 20;

/// Maximum size in bytes of the blocks of a new image over a parent. Our limit: a block is compared as a whole.
const MAX_CHILD_BLOCK_SIZE: u64 = 2 << 20;

/// The options of a new image.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "static",
        help: "store all blocks in the file, not only those with data",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "block_size",
        help: "unit in which space is allocated; QEMU reads only 1M",
        default: "1M",
        kind: OptionKind::PowerOfTwo { min: MIB, max: MAX_BLOCK_SIZE as u64 },
    },
    OptionSpec {
        name: "backing_file",
        help: "parent of the new image, a VDI image: only the difference to it is stored",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "backing_fmt",
        help: "format of the parent: vdi",
        default: "none",
        kind: OptionKind::Text("a format name"),
    },
    OptionSpec {
        name: "uuid",
        help: "UUID of the image; VirtualBox registers no two images with the same",
        default: "derived from content and options",
        kind: OptionKind::Text("a UUID"),
    },
    OptionSpec {
        name: "modification_uuid",
        help: "UUID that differencing images use to identify this content",
        default: "derived from content and options",
        kind: OptionKind::Text("a UUID"),
    },
];

/// The options of a new image, parsed and checked.
#[derive(Debug, Clone)]
pub(crate) struct VdiOptions {
    /// Type of the image.
    pub(crate) image_type: ImageType,
    /// Size of a block in bytes.
    block_size: u64,
    /// Parent of a differencing image.
    pub(crate) backing: Option<BackingName>,
    /// UUID of the image; `None` if it is derived from content and options.
    pub(crate) uuid: Option<Uuid>,
    /// UUID of the content; `None` if it is derived from content and options.
    pub(crate) modification_uuid: Option<Uuid>,
    /// True for an image without content. Such images differ in their names alone, so that their UUIDs are derived from
    /// the name as well: a child identifies its parent by them.
    pub(crate) blank: bool,
    /// Length in bytes of the shortest run of zeros that becomes a hole; `None` if all zeros are stored.
    pub(crate) zero_unit: Option<u64>,
}

impl VdiOptions {
    /// Parses the options. A request for compression or an invalid UUID is a usage error.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::usage("VDI images can't be compressed")
                .hint("choose another format, or a name that ends in .zst or .gz"));
        }
        let values = &options.values;
        let block_size = values.size("block_size").unwrap_or(MIB);
        let backing = BackingName::of_same_format(values, &[crate::FORMAT])?;
        let image_type = match (&backing, values.flag("static").unwrap_or(false)) {
            (Some(_), true) => return Err(Error::usage("backing_file and static=on can't be combined")),
            (Some(_), false) if block_size > MAX_CHILD_BLOCK_SIZE => {
                return Err(Error::usage(format!(
                    "an image over a parent has blocks of {MAX_CHILD_BLOCK_SIZE} bytes at most, not {block_size}"
                )));
            }
            (Some(_), false) => ImageType::Differencing,
            (None, true) => ImageType::Fixed,
            (None, false) => ImageType::Dynamic,
        };
        Ok(Self {
            image_type,
            block_size,
            backing,
            uuid: uuid(values, "uuid")?,
            modification_uuid: uuid(values, "modification_uuid")?,
            blank: options.blank,
            zero_unit: options.zero_unit(ZERO_GRANULARITY as u64),
        })
    }

    /// True if every block is stored from the start.
    pub(crate) fn is_fixed(&self) -> bool {
        self.image_type == ImageType::Fixed
    }

    /// Returns the header of a new image for a device of `size` bytes, without UUIDs and the number of stored
    /// blocks.
    ///
    /// # Errors
    /// `Unsupported` if the blocks or the map exceed the fields of the header, which have 32 bits.
    pub(crate) fn layout(&self, size: u64) -> Result<Header> {
        let too_large = || {
            Error::unsupported(format!(
                "the device has {size} bytes, too many for VDI with blocks of {} bytes",
                self.block_size
            ))
            .hint("choose a larger block_size, or another format")
        };
        let virtual_size = size.checked_next_multiple_of(SECTOR_SIZE).ok_or_else(too_large)?;
        let blocks = virtual_size.div_ceil(self.block_size);
        let map_end = blocks.checked_mul(ENTRY_LEN).and_then(|len| len.checked_add(MIB));
        let data_offset = map_end.and_then(|end| end.checked_next_multiple_of(MIB)).ok_or_else(too_large)?;
        if u32::try_from(data_offset).is_err() {
            return Err(too_large());
        }
        Ok(Header {
            version: 0,
            image_type: self.image_type,
            comment: String::new(),
            map_offset: MIB,
            data_offset: data_offset.max(2 * MIB),
            virtual_size,
            block_size: self.block_size,
            block_extra: 0,
            blocks,
            allocated: 0,
            uuid: Uuid::nil(),
            modification_uuid: Uuid::nil(),
            parent_uuid: Uuid::nil(),
            parent_modification_uuid: Uuid::nil(),
        })
    }
}

/// Parses the UUID of option `name`, which must not be nil; `None` if the option is not set.
fn uuid(values: &OptionValues, name: &str) -> Result<Option<Uuid>> {
    let Some(text) = values.text(name) else { return Ok(None) };
    match Uuid::try_parse(text) {
        Ok(uuid) if !uuid.is_nil() => Ok(Some(uuid)),
        _ => Err(Error::usage(format!(
            "option '{name}' must be a UUID such as 6a1b2c3d-0000-4000-8000-000000000001, not '{text}'"
        ))),
    }
}
