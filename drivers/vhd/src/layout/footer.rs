//! The footer (section "Hard Disk Footer Format").

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Fault, SECTOR_SIZE, VERSION, check_integrity, checksum};

/// Signature of the footer.
pub(crate) const COOKIE: &[u8; 8] = b"conectix";
/// Length of the footer in bytes. Virtual PC before 2004 omitted the last byte; see [`footer_len`].
pub(crate) const FOOTER_LEN: usize = 512;
/// Offset of the checksum in the footer, in bytes.
const CHECKSUM_AT: usize = 64;
/// Data offset of a fixed image.
const NO_HEADER: u64 = u64::MAX;
/// Bit of `features` that is always set.
const RESERVED_FEATURE: u32 = 2;
/// Creator of new images: Windows, one for which QEMU does not derive the size from the geometry.
const CREATOR: [u8; 4] = *b"win ";
/// Version of the creator: Windows 10, as Azure's own tools write it.
const CREATOR_VERSION: u32 = 0x000a_0000;
/// Host system of new images.
const HOST_OS: [u8; 4] = *b"Wi2k";

/// Maximum number of sectors that the geometry can express.
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;

/// The footer as stored. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    /// 0
    cookie: [u8; 8],
    /// 8
    features: U32,
    /// 12
    version: U32,
    /// 16: file offset of the dynamic header
    data_offset: U64,
    /// 24: seconds since 2000-01-01 00:00 UTC
    time: U32,
    /// 28
    creator: [u8; 4],
    /// 32
    creator_version: U32,
    /// 36
    host_os: [u8; 4],
    /// 40: size in bytes when the image was created
    original_size: U64,
    /// 48: size in bytes
    current_size: U64,
    /// 56
    cylinders: U16,
    /// 58
    heads: u8,
    /// 59
    sectors: u8,
    /// 60
    disk_type: U32,
    /// 64
    checksum: U32,
    /// 68
    uuid: [u8; 16],
    /// 84: 1 if the guest's state is saved
    saved_state: u8,
    /// 85
    reserved: [u8; 427],
}
const _: () = assert!(size_of::<RawFooter>() == FOOTER_LEN);

/// Type of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskType {
    /// All bytes of the disk, in order.
    Fixed,
    /// Blocks that are allocated when the guest writes to them.
    Dynamic,
    /// The changes to a parent.
    Differencing,
}

impl DiskType {
    /// Returns the name for the user.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// A decoded footer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Type of the image.
    pub(crate) disk_type: DiskType,
    /// File offset of the dynamic header; meaningless in a fixed image.
    pub(crate) data_offset: u64,
    /// Seconds since 2000-01-01 00:00 UTC at which the image was created.
    pub(crate) time: u32,
    /// Program that made the image, four characters.
    pub(crate) creator: [u8; 4],
    /// Virtual size in bytes, a multiple of a sector.
    pub(crate) current_size: u64,
    /// Geometry.
    pub(crate) geometry: Geometry,
    /// UUID of the image.
    pub(crate) uuid: Uuid,
    /// True if the image contains the saved state of a guest's session.
    pub(crate) saved_state: bool,
}

impl Footer {
    /// Decodes and checks a footer from its 512 bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let Ok((raw, _)) = RawFooter::ref_from_prefix(bytes) else { return Err(Fault::NoSignature) };
        if &raw.cookie != COOKIE {
            return Err(Fault::NoSignature);
        }
        check_integrity(raw.as_bytes(), CHECKSUM_AT, raw.checksum.get(), raw.version.get())?;
        let disk_type = match raw.disk_type.get() {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => return Err(Fault::Unsupported(format!("has the disk type {other}"))),
        };
        let current_size = raw.current_size.get();
        if !current_size.is_multiple_of(SECTOR_SIZE) || current_size > MAX_FIXED_SIZE {
            return Err(Fault::Malformed(format!("has the virtual size {current_size}")));
        }
        Ok(Self {
            disk_type,
            data_offset: raw.data_offset.get(),
            time: raw.time.get(),
            creator: raw.creator,
            current_size,
            geometry: Geometry { cylinders: raw.cylinders.get(), heads: raw.heads, sectors: raw.sectors },
            uuid: Uuid::from_bytes(raw.uuid),
            saved_state: raw.saved_state != 0,
        })
    }

    /// Encodes the footer of a new image.
    pub(crate) fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut raw = RawFooter::new_zeroed();
        raw.cookie = *COOKIE;
        raw.features = RESERVED_FEATURE.into();
        raw.version = VERSION.into();
        raw.data_offset = match self.disk_type {
            DiskType::Fixed => NO_HEADER.into(),
            DiskType::Dynamic | DiskType::Differencing => self.data_offset.into(),
        };
        raw.time = self.time.into();
        raw.creator = CREATOR;
        raw.creator_version = CREATOR_VERSION.into();
        raw.host_os = HOST_OS;
        raw.original_size = self.current_size.into();
        raw.current_size = self.current_size.into();
        raw.cylinders = self.geometry.cylinders.into();
        raw.heads = self.geometry.heads;
        raw.sectors = self.geometry.sectors;
        raw.disk_type = self.disk_type.number().into();
        raw.uuid = *self.uuid.as_bytes();
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM_AT).into();
        let mut bytes = [0; FOOTER_LEN];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }
}

/// Returns the length in bytes of the footer of a file of `file_len` bytes: all else in it has whole sectors.
pub(crate) fn footer_len(file_len: u64) -> usize {
    FOOTER_LEN - usize::from(file_len % SECTOR_SIZE == SECTOR_SIZE - 1)
}

/// True if a damaged footer was that of a fixed image, in which the guest may have written anything at the start:
/// it has the signature and either the type or the data offset of one, or both of them.
pub(crate) fn was_fixed(bytes: &[u8]) -> bool {
    let Ok((raw, _)) = RawFooter::ref_from_prefix(bytes) else { return false };
    let signs = [
        &raw.cookie == COOKIE,
        raw.disk_type.get() == DiskType::Fixed.number(),
        raw.data_offset.get() == NO_HEADER,
    ];
    signs.iter().filter(|sign| **sign).count() >= 2
}

/// Maximum virtual size of a fixed image in bytes. Our limit: guest and file offsets stay below 2^63.
const MAX_FIXED_SIZE: u64 = (1 << 63) - SECTOR_SIZE;

/// Cylinders, heads and sectors per track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cylinders: u16,
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
}

impl Geometry {
    /// Computes the geometry of a disk (appendix "CHS Calculation").
    pub(crate) fn of(virtual_size: u64) -> Self {
        let total = (virtual_size / SECTOR_SIZE).min(MAX_GEOMETRY);
        let (heads, sectors) = if total > 65535 * 16 * 63 {
            (16, 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if tracks < heads * 1024 && heads <= 16 {
                (heads, 17)
            } else if total / 31 < 16 * 1024 {
                (16, 31)
            } else {
                (16, 63)
            }
        };
        // The number of sectors is limited, so all three fit.
        let cylinders = total / sectors / heads;
        Self { cylinders: cylinders as u16, heads: heads as u8, sectors: sectors as u8 }
    }

    /// Returns the size in bytes that the geometry expresses.
    pub(crate) fn size(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR_SIZE
    }

    /// True if the geometry is the largest possible, which stands for any larger size.
    pub(crate) fn is_largest(self) -> bool {
        (self.cylinders, self.heads, self.sectors) == (65535, 16, 255)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_matches_known_disks() {
        // As QEMU 10.0 writes them with force_size=on.
        for (size, expected) in [
            (1 << 20, (30, 4, 17)),
            (64 << 20, (963, 8, 17)),
            (1 << 30, (2080, 16, 63)),
            (2040 << 30, (65535, 16, 255)),
        ] {
            let found = Geometry::of(size);
            assert_eq!((found.cylinders, found.heads, found.sectors), expected, "{size}");
        }
    }
}
