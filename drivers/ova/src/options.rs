//! The options of a new package.

use imgtool_core::{CreateOptions, Error, OptionKind, OptionSpec, Result};

use crate::manifest::Algorithm;

/// The options of a new package.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "manifest",
        help: "digests of the files: sha256 for vSphere 6 and newer, sha1 for older, sha512 for vSphere 7 alone",
        default: "sha256",
        kind: OptionKind::OneOf(&["sha256", "sha1", "sha512", "none"]),
    },
    OptionSpec {
        name: "align",
        help: "multiple to which the virtual sizes are rounded up; some programs hang unless it is 64k",
        default: "512",
        kind: OptionKind::OneOfSizes(&[SECTOR, 64 << 10]),
    },
];

/// Size in bytes of a VMDK sector. The size of every disk is a multiple of it.
const SECTOR: u64 = 512;

/// The options of a new package, parsed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OvaOptions {
    /// Algorithm of the digests; `None` for a package without a manifest.
    pub(crate) manifest: Option<Algorithm>,
    /// Multiple, in bytes, to which the sizes of the disks are rounded up. The writer of the disks has it
    /// too.
    pub(crate) align: u64,
    /// Time of the last change of all files, in seconds since 1970.
    pub(crate) mtime: u64,
}

impl OvaOptions {
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.blank {
            return Err(
                Error::unsupported("a package without content is of no use").hint("convert disks into one")
            );
        }
        let name = options.values.text("manifest").unwrap_or("sha256");
        let manifest = Algorithm::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(name));
        let mtime = options.source_date_epoch.and_then(|time| u64::try_from(time).ok()).unwrap_or(0);
        Ok(Self { manifest, align: options.values.size("align").unwrap_or(SECTOR), mtime })
    }
}
