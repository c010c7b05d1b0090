//! Markers of a stream: a sector each, before a grain, a table, the directory, the footer, and at the end.

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
