//! Markers of a stream: a sector each, before a grain, a table, the directory, the footer, and at the end.

use imgtool_core::zero::is_zero;

use super::SECTOR_SIZE;
use super::hosted::Header;

/// A marker of metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The end of the stream.
    End,
    /// A grain table.
    Table,
    /// The grain directory.
    Directory,
    /// The footer.
    Footer,
    /// A sign of life of the program that writes the stream; vCenter writes them, and nothing documents them.
    Progress,
}

/// A decoded marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marker {
    /// A compressed grain follows the marker's first 12 bytes.
    Grain {
        /// First sector of the grain in the guest.
        lba: u64,
        /// Number of compressed bytes.
        len: u32,
    },
    /// Metadata follows.
    Metadata {
        /// Number of sectors that follow.
        sectors: u64,
        /// Kind of the metadata.
        kind: Kind,
    },
    /// A type that is not known.
    Unknown(u32),
}

/// Length of the head of a grain with a marker: LBA and number of bytes.
pub(crate) const GRAIN_HEAD: usize = 12;
/// Length of the head of a compressed grain without a marker: the number of bytes.
pub(crate) const BARE_HEAD: usize = 4;

impl Marker {
    /// Decodes the first 16 bytes of a sector.
    pub(crate) fn decode(bytes: &[u8; 16]) -> Self {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let value = u64::from(number(4)) << 32 | u64::from(number(0));
        let kind = match (number(8), number(12)) {
            (len, _) if len > 0 => return Self::Grain { lba: value, len },
            (_, 0) => Kind::End,
            (_, 1) => Kind::Table,
            (_, 2) => Kind::Directory,
            (_, 3) => Kind::Footer,
            (_, 4) => Kind::Progress,
            (_, unknown) => return Self::Unknown(unknown),
        };
        Self::Metadata { sectors: value, kind }
    }

    /// True if a sector that decodes to this is likely to be a marker of a stream with this header, and no
    /// other data: for the search behind a damaged part. Zeros look like an end marker, so that is none.
    pub(crate) fn is_plausible(self, sector: &[u8; 512], header: &Header) -> bool {
        let sectors_of = |entries: u64| entries.saturating_mul(4).div_ceil(SECTOR_SIZE);
        match self {
            Self::Grain { lba, len } => {
                let is_grain = lba.is_multiple_of(header.grain_size) && lba < header.capacity;
                // The first bytes of a zlib stream: RFC 1950, section 2.2.
                let zlib = u16::from_be_bytes([sector[GRAIN_HEAD], sector[GRAIN_HEAD + 1]]);
                let is_zlib = zlib >> 8 & 0xf == 8 && zlib.is_multiple_of(31);
                is_grain && is_zlib && u64::from(len) <= 2 * header.grain_size * SECTOR_SIZE
            }
            Self::Metadata { kind, sectors } => {
                let expected = match kind {
                    Kind::Table => sectors_of(header.table_entries.into()),
                    Kind::Directory => sectors_of(header.directory_entries()),
                    Kind::Footer => 1,
                    Kind::End | Kind::Progress => return false,
                };
                sectors == expected && is_zero(&sector[16..])
            }
            Self::Unknown(_) => false,
        }
    }

    /// Encodes the sector of a marker of metadata.
    pub(crate) fn metadata(kind: Kind, sectors: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        bytes[..8].copy_from_slice(&sectors.to_le_bytes());
        bytes[12] = match kind {
            Kind::End => 0,
            Kind::Table => 1,
            Kind::Directory => 2,
            Kind::Footer => 3,
            Kind::Progress => 4,
        };
        bytes
    }

    /// Encodes the head of a grain.
    pub(crate) fn grain(lba: u64, len: u32) -> [u8; GRAIN_HEAD] {
        let mut bytes = [0; GRAIN_HEAD];
        bytes[..8].copy_from_slice(&lba.to_le_bytes());
        bytes[8..].copy_from_slice(&len.to_le_bytes());
        bytes
    }
}
