//! The header, and the meaning of the entries of the table.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use imgtool_core::{Error, Result};

/// Signature of images whose table counts sectors, and whose size has 32 bits.
const MAGIC_SECTORS: &[u8; 16] = b"WithoutFreeSpace";
/// Signature of images whose table counts clusters.
const MAGIC_CLUSTERS: &[u8; 16] = b"WithouFreSpacExt";
/// The only version.
const VERSION: u32 = 2;
/// Value of the field `in_use` while a program has the image open for writing.
const IN_USE: u32 = 0x746f_6e59;

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Length of the header in bytes; the table follows it.
pub(crate) const HEADER_LEN: u64 = size_of::<RawHeader>() as u64;
/// Width of an entry of the table in bytes.
pub(crate) const ENTRY_LEN: u64 = 4;
/// Maximum size of a cluster in sectors. Our limit: 1 GiB; Parallels Desktop writes 1 MiB.
const MAX_CLUSTER_SECTORS: u32 = 1 << 21;
/// Maximum size of a disk in sectors. Our limit: guest offsets stay below 2^63.
const MAX_SECTORS: u64 = 1 << 54;

/// The header. Each field's doc begins with its file offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: [u8; 16],
    /// 16
    version: U32,
    /// 20: geometry, which readers ignore
    _heads: U32,
    /// 24
    _cylinders: U32,
    /// 28: size of a cluster in sectors
    cluster_sectors: U32,
    /// 32: number of entries of the table
    entries: U32,
    /// 36: size of the disk in sectors; only the low half counts in images that count sectors
    sectors: U64,
    /// 44
    in_use: U32,
    /// 48: sector at which the clusters begin
    _data_start: U32,
    /// 52
    _flags: U32,
    /// 56: place of dirty bitmaps
    extension: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 64);

/// The header of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// Size of a cluster in bytes.
    pub(crate) cluster_size: u64,
    /// Number of entries of the table.
    pub(crate) entries: u64,
    /// Number of bytes that an entry counts.
    entry_unit: u64,
    /// True if the image was not closed.
    pub(crate) in_use: bool,
    /// True if the image has an extension, such as dirty bitmaps.
    pub(crate) has_extension: bool,
}

/// True if an image begins with one of the signatures.
pub(crate) fn is_parallels(head: &[u8]) -> bool {
    head.starts_with(MAGIC_SECTORS) || head.starts_with(MAGIC_CLUSTERS)
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// `WrongFormat` without a signature; `Unsupported` for another version; `Malformed` for impossible numbers.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if !is_parallels(bytes) {
            return Err(Error::wrong_format("is not a Parallels image: the signature is missing"));
        }
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(Error::corrupt(format!(
                "the file has {} bytes, but the header needs {HEADER_LEN}",
                bytes.len()
            ))
            .hint("the file is cut short: copy it again, or use a backup"));
        };
        let version = raw.version.get();
        if version != VERSION {
            return Err(Error::unsupported(format!("the image has version {version}, not {VERSION}")).at(16));
        }
        let cluster_sectors = raw.cluster_sectors.get();
        if cluster_sectors == 0 || cluster_sectors > MAX_CLUSTER_SECTORS {
            return Err(Error::malformed(format!(
                "the image has clusters of {cluster_sectors} sectors, not of 1 to {MAX_CLUSTER_SECTORS}"
            ))
            .at(28));
        }
        let counts_clusters = raw.magic == *MAGIC_CLUSTERS;
        let sectors =
            if counts_clusters { raw.sectors.get() } else { raw.sectors.get() & u64::from(u32::MAX) };
        if sectors > MAX_SECTORS {
            return Err(
                Error::limit(format!("the disk has {sectors} sectors, more than {MAX_SECTORS}")).at(36)
            );
        }
        let cluster_size = u64::from(cluster_sectors) * SECTOR_SIZE;
        let header = Self {
            virtual_size: sectors * SECTOR_SIZE,
            cluster_size,
            entries: raw.entries.get().into(),
            entry_unit: if counts_clusters { cluster_size } else { SECTOR_SIZE },
            in_use: raw.in_use.get() == IN_USE,
            has_extension: counts_clusters && raw.extension.get() != 0,
        };
        if header.entries < header.clusters() {
            return Err(Error::malformed(format!(
                "the table has {} entries, but the disk has {} clusters",
                header.entries,
                header.clusters()
            ))
            .at(32));
        }
        Ok(header)
    }

    /// Returns the number of clusters of the disk.
    pub(crate) fn clusters(&self) -> u64 {
        self.virtual_size.div_ceil(self.cluster_size)
    }

    /// Returns the file offset at which the table ends.
    pub(crate) fn table_end(&self) -> u64 {
        HEADER_LEN + self.entries * ENTRY_LEN
    }

    /// Returns the file offset of the cluster of an entry; `None` if the image does not contain the cluster.
    pub(crate) fn cluster_offset(&self, entry: [u8; 4]) -> Option<u64> {
        // The product has at most 32 + 30 bits.
        let entry = u64::from(u32::from_le_bytes(entry));
        (entry != 0).then_some(entry * self.entry_unit)
    }

    /// Returns the number of bytes of the cluster `index` that the disk uses.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.cluster_size);
        self.virtual_size.saturating_sub(start).min(self.cluster_size)
    }
}
