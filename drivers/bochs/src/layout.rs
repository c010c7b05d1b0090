//! The header, and the places of the extents.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use imgtool_core::{Error, Result};

/// Signature.
const MAGIC: &[u8; 32] = b"Bochs Virtual HD Image\0\0\0\0\0\0\0\0\0\0";
/// Type of the images that store disks in extents.
const TYPE: &[u8] = b"Redolog";
/// Subtype of the images that are whole disks.
const GROWING: &[u8] = b"Growing";
/// Numbers of the versions. bximage writes the second.
const VERSIONS: [u32; 2] = [0x0001_0000, 0x0002_0000];

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Number of bytes that contain the header.
pub(crate) const HEADER_LEN: u64 = 512;
/// Width of an entry of the catalog in bytes.
pub(crate) const ENTRY_LEN: u64 = 4;
/// Entry of an extent that the image does not contain.
const ABSENT: u32 = u32::MAX;
/// Maximum size of an extent in bytes. QEMU's limit is 8 MiB; bximage writes at most 2 MiB.
const MAX_EXTENT_SIZE: u32 = 64 << 20;

/// The header. Each field's doc begins with its file offset in bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: [u8; 32],
    /// 32
    image_type: [u8; 16],
    /// 48
    subtype: [u8; 16],
    /// 64
    version: U32,
    /// 68: length of the header in bytes
    header_len: U32,
    /// 72: number of entries of the catalog
    entries: U32,
    /// 76: length of a bitmap in bytes
    bitmap_len: U32,
    /// 80: size of an extent in bytes
    extent_size: U32,
    /// 84: in version 2, a time; in version 1, the size of the disk, which `size_1` reads
    time: U32,
    /// 88: size of the disk in bytes, version 2
    size_2: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 96);

/// The header of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) version: u32,
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// Number of entries of the catalog.
    pub(crate) entries: u64,
    /// File offset of the catalog.
    pub(crate) catalog_offset: u64,
    /// Length of a bitmap in bytes, as stored: whole sectors.
    pub(crate) bitmap_len: u64,
    /// Size of an extent in bytes.
    pub(crate) extent_size: u64,
}

/// True if an image begins with the signature.
pub(crate) fn is_bochs(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// `WrongFormat` without the signature; `Unsupported` for other types and versions; `Malformed` for
    /// impossible numbers.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if !is_bochs(bytes) {
            return Err(Error::wrong_format("is not a Bochs image: the signature is missing"));
        }
        let raw = RawHeader::ref_from_prefix(bytes).ok().filter(|_| bytes.len() as u64 >= HEADER_LEN);
        let Some((raw, _)) = raw else {
            return Err(Error::corrupt(format!(
                "the file has {} bytes, but the header needs {HEADER_LEN}",
                bytes.len()
            ))
            .hint("the file is cut short: copy it again, or use a backup"));
        };
        check_kind(raw)?;
        let version = raw.version.get();
        let size_1 = raw.time.get() as u64 | raw.size_2.get() << 32;
        let header = Self {
            version: version >> 16,
            virtual_size: if version == VERSIONS[0] { size_1 } else { raw.size_2.get() },
            entries: raw.entries.get().into(),
            catalog_offset: raw.header_len.get().into(),
            bitmap_len: u64::from(raw.bitmap_len.get()).next_multiple_of(SECTOR_SIZE),
            extent_size: raw.extent_size.get().into(),
        };
        header.check(raw)?;
        Ok(header)
    }

    fn check(&self, raw: &RawHeader) -> Result<()> {
        let (extent, bitmap) = (raw.extent_size.get(), raw.bitmap_len.get());
        if extent == 0 || extent > MAX_EXTENT_SIZE || u64::from(extent) % SECTOR_SIZE != 0 {
            return Err(Error::malformed(format!(
                "the image has extents of {extent} bytes, not whole sectors up to {MAX_EXTENT_SIZE} bytes"
            ))
            .at(80));
        }
        let sectors = self.extent_size / SECTOR_SIZE;
        if u64::from(bitmap) < sectors.div_ceil(8) || bitmap > MAX_EXTENT_SIZE {
            return Err(Error::malformed(format!(
                "the bitmap of an extent has {bitmap} bytes, not up to {MAX_EXTENT_SIZE} for {sectors} sectors"
            ))
            .at(76));
        }
        if self.catalog_offset < HEADER_LEN {
            let len = self.catalog_offset;
            return Err(
                Error::malformed(format!("the header has {len} bytes, fewer than {HEADER_LEN}")).at(68)
            );
        }
        if self.virtual_size > 1 << 63 || self.entries < self.extents() {
            return Err(Error::malformed(format!(
                "the disk has {} bytes, but the catalog has {} entries of {extent} bytes",
                self.virtual_size, self.entries
            ))
            .at(72));
        }
        Ok(())
    }

    /// Returns the number of extents of the disk.
    pub(crate) fn extents(&self) -> u64 {
        self.virtual_size.div_ceil(self.extent_size)
    }

    /// Returns the file offset at which the catalog ends and the extents begin.
    pub(crate) fn catalog_end(&self) -> u64 {
        self.catalog_offset + self.entries * ENTRY_LEN
    }

    /// Returns the length in bytes of an extent with its bitmap.
    pub(crate) fn stored_len(&self) -> u64 {
        self.bitmap_len + self.extent_size
    }

    /// Returns the file offset of the bitmap of an entry's extent, which its data follows; `None` if the image
    /// does not contain the extent.
    pub(crate) fn extent_offset(&self, entry: [u8; 4]) -> Option<u64> {
        let entry = u32::from_le_bytes(entry);
        // The product has at most 32 + 27 bits.
        (entry != ABSENT).then(|| self.catalog_end() + u64::from(entry) * self.stored_len())
    }

    /// Returns the number of bytes of the extent `index` that the disk uses.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.extent_size);
        self.virtual_size.saturating_sub(start).min(self.extent_size)
    }
}

fn check_kind(raw: &RawHeader) -> Result<()> {
    let word = |bytes: &[u8; 16]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    if raw.image_type[..TYPE.len()] != *TYPE {
        return Err(Error::unsupported(format!(
            "the image has the unknown type '{}'",
            word(&raw.image_type)
        ))
        .at(32));
    }
    if raw.subtype[..GROWING.len()] != *GROWING {
        return Err(Error::unsupported(format!(
            "the image is a redo log of the subtype '{}', which has only the changes to another image",
            word(&raw.subtype)
        ))
        .at(48)
        .hint("commit it to its base with bximage, and convert the base"));
    }
    let version = raw.version.get();
    if !VERSIONS.contains(&version) {
        return Err(Error::unsupported(format!("the image has the unknown version {version:#x}")).at(64));
    }
    Ok(())
}
