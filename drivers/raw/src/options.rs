//! The validated options of a new image.

use imgtool_core::driver::ENCRYPT;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{CreateOptions, Error, Result};

/// Smallest sparse granularity in bytes: qemu-img's limit for `-S`.
const SECTOR: u64 = 512;

/// Values of the option `preallocation`, named as in qemu-img.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preallocation {
    /// The file starts as a hole.
    Off,
    /// The file system reserves the space.
    Falloc,
    /// Every byte is written, including zeros.
    Full,
}

/// The options of a new image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteOptions {
    pub(crate) preallocation: Preallocation,
    /// Length in bytes of the shortest run of zeros that becomes a hole; a power of two.
    pub(crate) zero_unit: u64,
    /// True if zeros are written like data instead of being left as holes.
    pub(crate) stores_zeros: bool,
}

impl WriteOptions {
    /// Parses the options. A request for compression or encryption is a usage error.
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::usage("raw images can't be compressed")
                .hint("choose another format, or a name that ends in .zst or .gz"));
        }
        if options.values.text(ENCRYPT).is_some() {
            return Err(
                Error::usage("a raw image is not encrypted itself").hint("write its encrypted form, luks")
            );
        }
        let preallocation = match options.values.text("preallocation") {
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            _ => Preallocation::Off,
        };
        let zero_unit = match options.sparse_granularity {
            None => Some(ZERO_GRANULARITY as u64),
            Some(_) => options.zero_unit(SECTOR),
        };
        Ok(Self {
            preallocation,
            zero_unit: zero_unit.unwrap_or(ZERO_GRANULARITY as u64),
            stores_zeros: zero_unit.is_none() || preallocation == Preallocation::Full,
        })
    }
}
