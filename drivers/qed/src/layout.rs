//! The header, and the meaning of the entries of the tables.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use imgtool_core::{Error, Result};

/// Signature.
const MAGIC: &[u8; 4] = b"QED\0";

/// Feature: the image has a backing file.
const FEATURE_BACKING: u64 = 1;
/// Feature: the image was not closed; its tables may be out of date.
const FEATURE_NEED_CHECK: u64 = 2;
/// Feature: the backing file is raw, whatever its content.
const FEATURE_RAW_BACKING: u64 = 4;
const KNOWN_FEATURES: u64 = FEATURE_BACKING | FEATURE_NEED_CHECK | FEATURE_RAW_BACKING;

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Length of the header in bytes.
pub(crate) const HEADER_LEN: u64 = size_of::<RawHeader>() as u64;
/// Width of an entry of a table in bytes.
pub(crate) const ENTRY_LEN: u64 = 8;
/// Sizes in bytes that a cluster may have, powers of two (specification).
const CLUSTER_SIZES: std::ops::RangeInclusive<u32> = 4 << 10..=64 << 20;
/// Sizes in clusters that a table may have, powers of two (specification).
const TABLE_CLUSTERS: std::ops::RangeInclusive<u32> = 1..=16;
/// Maximum length in bytes of the name of the backing file. QEMU's limit.
const MAX_NAME_LEN: u32 = 1023;

/// The header. Each field's doc begins with its file offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: [u8; 4],
    /// 4: bytes
    cluster_size: U32,
    /// 8: size of each table in clusters
    table_clusters: U32,
    /// 12: size of the header in clusters
    header_clusters: U32,
    /// 16: features that a reader must know
    features: U64,
    /// 24: features that a reader may ignore
    _compatible: U64,
    /// 32: features that a writer must clear if it does not know them
    _autoclear: U64,
    /// 40: file offset of the first table
    l1_offset: U64,
    /// 48: bytes
    virtual_size: U64,
    /// 56: file offset of the backing file's name, within the header
    name_offset: U32,
    /// 60: bytes
    name_len: U32,
}
const _: () = assert!(size_of::<RawHeader>() == 64);

/// The header of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) cluster_size: u64,
    /// Length of a table in bytes.
    pub(crate) table_len: u64,
    /// Length of the header in bytes, whole clusters.
    pub(crate) header_len: u64,
    pub(crate) l1_offset: u64,
    pub(crate) virtual_size: u64,
    /// True if the image was not closed.
    pub(crate) needs_check: bool,
    /// Place of the backing file's name: file offset and length in bytes.
    pub(crate) backing: Option<(u64, u64)>,
    /// True if the backing file is raw, whatever its content.
    pub(crate) raw_backing: bool,
}

/// Target of a table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing: the content is that of the backing file.
    Absent,
    /// A cluster of zeros, which is not stored.
    Zero,
    /// A cluster or table at this file offset.
    At(u64),
}

impl Entry {
    pub(crate) fn decode(bytes: [u8; 8]) -> Self {
        match u64::from_le_bytes(bytes) {
            0 => Self::Absent,
            1 => Self::Zero,
            file_offset => Self::At(file_offset),
        }
    }
}

/// True if an image begins with the signature.
pub(crate) fn is_qed(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// `WrongFormat` without the signature; `Unsupported` for unknown features; `Malformed` for impossible
    /// numbers.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if !is_qed(bytes) {
            return Err(Error::wrong_format("is not a QED image: the signature is missing"));
        }
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(Error::corrupt(format!(
                "the file has {} bytes, but the header needs {HEADER_LEN}",
                bytes.len()
            ))
            .hint("the file is cut short: copy it again, or use a backup"));
        };
        let features = raw.features.get();
        if features & !KNOWN_FEATURES != 0 {
            let unknown = features & !KNOWN_FEATURES;
            return Err(
                Error::unsupported(format!("the image requires unknown features {unknown:#x}")).at(16)
            );
        }
        let cluster_size = power_of_two("clusters", raw.cluster_size.get(), "bytes", CLUSTER_SIZES, 4)?;
        let table_clusters = power_of_two("tables", raw.table_clusters.get(), "clusters", TABLE_CLUSTERS, 8)?;
        let header = Self {
            cluster_size,
            table_len: cluster_size * table_clusters,
            // The product has at most 32 + 26 bits.
            header_len: u64::from(raw.header_clusters.get()) * cluster_size,
            l1_offset: raw.l1_offset.get(),
            virtual_size: raw.virtual_size.get(),
            needs_check: features & FEATURE_NEED_CHECK != 0,
            backing: (features & FEATURE_BACKING != 0)
                .then(|| (raw.name_offset.get().into(), raw.name_len.get().into())),
            raw_backing: features & FEATURE_RAW_BACKING != 0,
        };
        header.check(raw)?;
        Ok(header)
    }

    fn check(&self, raw: &RawHeader) -> Result<()> {
        let most = u128::from(self.entries()) * u128::from(self.l2_span());
        if u128::from(self.virtual_size) > most.min(1 << 63) {
            return Err(Error::malformed(format!(
                "the disk has {} bytes, but the tables reach {most}",
                self.virtual_size
            ))
            .at(48));
        }
        if !self.l1_offset.is_multiple_of(self.cluster_size) || self.l1_offset < self.header_len.max(1) {
            return Err(Error::malformed(format!(
                "the first table is at {}, which is not a cluster offset after the header",
                self.l1_offset
            ))
            .at(40));
        }
        let (offset, len) = (raw.name_offset.get(), raw.name_len.get());
        let is_inside = u64::from(offset) + u64::from(len) <= self.header_len;
        if self.backing.is_some() && (len > MAX_NAME_LEN || !is_inside || u64::from(offset) < HEADER_LEN) {
            return Err(Error::malformed(format!(
                "the backing file's name has {len} bytes at {offset}, not up to {MAX_NAME_LEN} in the header"
            ))
            .at(56));
        }
        Ok(())
    }

    /// Returns the number of entries of a table.
    pub(crate) fn entries(&self) -> u64 {
        self.table_len / ENTRY_LEN
    }

    /// Returns the number of guest bytes that a table of the second level maps.
    pub(crate) fn l2_span(&self) -> u64 {
        // At most 2^27 entries of 2^26 bytes.
        self.entries() * self.cluster_size
    }

    /// Returns the number of clusters of the disk.
    pub(crate) fn clusters(&self) -> u64 {
        self.virtual_size.div_ceil(self.cluster_size)
    }

    /// Returns the number of bytes of the cluster `index` that the disk uses.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.cluster_size);
        self.virtual_size.saturating_sub(start).min(self.cluster_size)
    }
}

fn power_of_two(
    what: &str,
    value: u32,
    unit: &str,
    range: std::ops::RangeInclusive<u32>,
    at: u64,
) -> Result<u64> {
    if value.is_power_of_two() && range.contains(&value) {
        return Ok(value.into());
    }
    Err(Error::malformed(format!(
        "the image has {what} of {value} {unit}, not a power of two from {} to {}",
        range.start(),
        range.end()
    ))
    .at(at))
}
