//! The options of a new image.

use imgtool_core::{BackingName, CreateOptions, Error, OptionKind, OptionSpec, Result};

use crate::layout::SECTOR_SIZE;

/// Size of a grain in new images in bytes: the only size that all readers take.
pub(crate) const GRAIN_SIZE: u64 = 64 << 10;

/// Default deflate level. Our choice: the lowest that makes streams no larger than qemu-img's, with a third of
/// its processor time.
const DEFAULT_LEVEL: i32 = 5;

/// Default virtual hardware version: that of ESXi 6.5. Our choice: old enough for the importers in use.
const DEFAULT_HARDWARE: i64 = 13;
/// Maximum virtual hardware version. Our limit, above those of VMware.
const MAX_HARDWARE: i64 = 99;

/// Maximum length in bytes of the parent's name in a new image. Our limit, as in qcow2: the descriptor has 10
/// KiB.
const MAX_PARENT_NAME: usize = 1023;

/// Maximum size of a disk in bytes: VMware's limit, 62 TiB.
const MAX_SIZE: u64 = 62 << 40;

/// Variant of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subformat {
    StreamOptimized,
    MonolithicSparse,
    MonolithicFlat,
    /// A flat image as ESXi has it.
    Vmfs,
    SplitSparse,
    SplitFlat,
}

const SUBFORMATS: [(&str, Subformat); 6] = [
    ("streamOptimized", Subformat::StreamOptimized),
    ("monolithicSparse", Subformat::MonolithicSparse),
    ("monolithicFlat", Subformat::MonolithicFlat),
    ("vmfs", Subformat::Vmfs),
    ("twoGbMaxExtentSparse", Subformat::SplitSparse),
    ("twoGbMaxExtentFlat", Subformat::SplitFlat),
];

impl Subformat {
    /// Returns the name, which is also the `createType` of the descriptor.
    pub(crate) fn name(self) -> &'static str {
        SUBFORMATS.iter().find(|(_, subformat)| *subformat == self).map_or("custom", |(name, _)| name)
    }
}

/// The options of a new image.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        help: "variant: for import (streamOptimized), or for running machines; vmfs for ESXi datastores",
        default: "streamOptimized; monolithicSparse with a parent, and in create",
        kind: OptionKind::OneOf(&[
            "streamOptimized",
            "monolithicSparse",
            "monolithicFlat",
            "vmfs",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
        ]),
    },
    OptionSpec {
        name: "adapter_type",
        help: "disk controller that the descriptor names",
        default: "lsilogic",
        kind: OptionKind::OneOf(&["lsilogic", "buslogic", "ide", "legacyESX"]),
    },
    OptionSpec {
        name: "hwversion",
        help: "virtual hardware version, 1 to 99",
        default: "13",
        kind: OptionKind::Integer,
    },
    OptionSpec {
        name: "compat6",
        help: "hardware version 6, as in qemu-img",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "toolsversion",
        help: "version of VMware's guest tools that the descriptor states",
        default: "none",
        kind: OptionKind::Integer,
    },
    OptionSpec {
        name: "zeroed_grain",
        help: "mark zeros over data of the parent instead of storing them, and allow later writers to do so (version 2 \
               of the format)",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "backing_file",
        help: "parent of the new image, a VMDK image: only the difference to it is stored",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "backing_fmt",
        help: "format of the parent: vmdk",
        default: "none",
        kind: OptionKind::Text("a format name"),
    },
    OptionSpec {
        name: "align",
        help: "multiple to which the virtual size is rounded up; some programs hang unless it is 64k",
        default: "512",
        kind: OptionKind::OneOfSizes(&[512, 64 << 10]),
    },
];

/// The options of a new image, parsed and checked.
#[derive(Debug, Clone)]
pub(crate) struct VmdkOptions {
    pub(crate) subformat: Subformat,
    pub(crate) adapter: String,
    pub(crate) hardware: i64,
    pub(crate) tools: Option<i64>,
    /// Parent of the image.
    pub(crate) backing: Option<BackingName>,
    /// True if zeros over data of the parent are marked in the tables.
    pub(crate) zeroed_grains: bool,
    /// Multiple, in bytes, to which the virtual size is rounded up.
    align: u64,
    /// Deflate level of a stream.
    pub(crate) level: i32,
    /// Length in bytes of the shortest run of zeros that is not stored; `None` if all zeros are stored.
    pub(crate) zero_unit: Option<u64>,
}

impl VmdkOptions {
    /// Parses the options. Compression is a property of streams.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        let values = &options.values;
        let backing = BackingName::storable(values, &[crate::FORMAT])?;
        // No machine can write a stream.
        let is_for_machines = backing.is_some() || options.blank;
        let default = if is_for_machines { "monolithicSparse" } else { "streamOptimized" };
        let name = values.text("subformat").unwrap_or(default);
        let subformat = SUBFORMATS.iter().find(|(known, _)| *known == name);
        let subformat = subformat.map_or(Subformat::StreamOptimized, |(_, subformat)| *subformat);
        if let Some(backing) = &backing {
            check_backing(backing, subformat)?;
        }
        let level = match &options.compress {
            Some(_) if subformat != Subformat::StreamOptimized => {
                return Err(Error::usage(format!("VMDK images of the subformat {name} can't be compressed"))
                    .hint("choose the subformat streamOptimized"));
            }
            Some(compress) => compression_level(compress.algorithm.as_deref(), compress.level)?,
            None => DEFAULT_LEVEL,
        };
        let hardware = match (values.integer("hwversion"), values.flag("compat6").unwrap_or(false)) {
            (Some(_), true) => {
                return Err(Error::usage("options 'compat6' and 'hwversion' can't be combined"));
            }
            (Some(version), false) if !(1..=MAX_HARDWARE).contains(&version) => {
                return Err(Error::usage(format!("hwversion {version} is not within 1..{MAX_HARDWARE}")));
            }
            (Some(version), false) => version,
            (None, true) => 6,
            (None, false) => DEFAULT_HARDWARE,
        };
        let zeroed_grains = values.flag("zeroed_grain").unwrap_or(false);
        let is_flat = matches!(subformat, Subformat::MonolithicFlat | Subformat::SplitFlat | Subformat::Vmfs);
        if zeroed_grains && is_flat {
            return Err(Error::unsupported(
                "option 'zeroed_grain' needs grains, which a flat image does not have",
            )
            .hint("leave it out, or choose another subformat"));
        }
        let tools = values.integer("toolsversion");
        if tools.is_some_and(|version| !(0..=i64::from(i32::MAX)).contains(&version)) {
            return Err(Error::usage("toolsversion is not within 0..2147483647"));
        }
        Ok(Self {
            subformat,
            adapter: values.text("adapter_type").unwrap_or("lsilogic").to_owned(),
            hardware,
            tools,
            zeroed_grains,
            backing,
            align: values.size("align").unwrap_or(SECTOR_SIZE),
            level,
            zero_unit: options.zero_unit(imgtool_core::zero::ZERO_GRANULARITY as u64),
        })
    }

    /// Returns the number of sectors of a disk of `size` bytes.
    ///
    /// # Errors
    /// `Unsupported` if it is larger than VMware's limit.
    pub(crate) fn sectors(&self, size: u64) -> Result<u64> {
        match size.checked_next_multiple_of(self.align) {
            Some(rounded) if rounded <= MAX_SIZE => Ok(rounded / SECTOR_SIZE),
            _ => Err(Error::unsupported(format!(
                "the device has {size} bytes; the limit of VMDK is {MAX_SIZE} (62 TiB)"
            ))
            .hint("choose another format")),
        }
    }
}

/// Refuses a parent for variants that have none, and a name that the descriptor can't contain.
fn check_backing(backing: &BackingName, subformat: Subformat) -> Result<()> {
    if subformat != Subformat::MonolithicSparse {
        let name = subformat.name();
        return Err(Error::usage(format!("backing_file and subformat={name} can't be combined"))
            .hint("images with a parent have the subformat monolithicSparse"));
    }
    if !(1..=MAX_PARENT_NAME).contains(&backing.name.len()) {
        return Err(Error::usage(format!(
            "the parent's name must have 1 to {MAX_PARENT_NAME} bytes, not {}",
            backing.name.len()
        )));
    }
    Ok(())
}

fn compression_level(algorithm: Option<&str>, level: Option<i32>) -> Result<i32> {
    if let Some(other) = algorithm.filter(|name| !matches!(*name, "zlib" | "deflate")) {
        return Err(Error::usage(format!("VMDK images can't be compressed with '{other}'"))
            .hint("zlib, with a level if you like: zlib:3"));
    }
    let level = level.unwrap_or(DEFAULT_LEVEL);
    // libdeflate's level 0 does not compress.
    if (1..=12).contains(&level) {
        Ok(level)
    } else {
        Err(Error::usage(format!("zlib level {level} is not within 1..12")))
    }
}
