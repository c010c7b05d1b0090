//! On-disk structures: headers of sparse files, markers of streams.

pub(crate) mod cowd;
pub(crate) mod hosted;
pub(crate) mod marker;
pub(crate) mod sesparse;

/// Size of a disk sector in bytes, and the unit of most numbers.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Maximum number of sectors of a disk. Our limit: its size in bytes fits into 63 bits.
pub(crate) const MAX_SECTORS: u64 = 1 << 54;

/// A fault of a structure, worded to follow its name ("the header …").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The image needs a feature that this driver does not have.
    Unsupported(String),
    /// The structure is damaged or contradicts itself.
    Malformed(String),
}

impl Fault {
    /// Converts the fault of the structure `name` at `file_offset` into an error.
    pub(crate) fn of(self, name: &str, file_offset: u64) -> imgtool_core::Error {
        match self {
            Self::Unsupported(what) => imgtool_core::Error::unsupported(format!("the {name} {what}")),
            Self::Malformed(what) => imgtool_core::Error::malformed(format!("the {name} {what}")),
        }
        .at(file_offset)
    }
}
