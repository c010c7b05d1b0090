//! The header of a hosted sparse file (magic number KDMV), which is also the footer of a stream.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Fault, MAX_SECTORS};

pub(crate) const MAGIC: &[u8; 4] = b"KDMV";
/// Length of the header in bytes.
pub(crate) const HEADER_LEN: usize = 512;

/// Value of `gdOffset` if only the footer has the offset of the grain directory.
pub(crate) const GD_AT_END: u64 = u64::MAX;

/// Flag: the bytes that reveal a text-mode transfer are valid.
const VALID_NEWLINE_TEST: u32 = 1 << 0;
/// Flag: the file has a redundant grain directory.
const REDUNDANT_TABLES: u32 = 1 << 1;
/// Flag: entry 1 of a grain table means a grain of zeros.
const ZEROED_GRAINS: u32 = 1 << 2;
/// Flag: grains are compressed.
const COMPRESSED: u32 = 1 << 16;
/// Flag: grains and tables have markers.
const MARKERS: u32 = 1 << 17;

/// Bytes that a transfer in text mode changes.
const NEWLINE_TEST: [u8; 4] = *b"\n \r\n";

/// Maximum number of sectors of a grain: 1 MiB. Our limit: VMware writes 64 KiB, and a grain is decoded
/// as a whole.
const MAX_GRAIN_SECTORS: u64 = 2048;
/// Maximum number of entries of a grain table, and the only number that VMware writes.
pub(crate) const MAX_TABLE_ENTRIES: u32 = 512;
/// Maximum length of the embedded descriptor in bytes; see [`crate::descriptor::MAX_LEN`].
const MAX_DESCRIPTOR_SECTORS: u64 = crate::descriptor::MAX_LEN as u64 / 512;

/// The header as stored. Each field's doc begins with its offset in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0
    magic: [u8; 4],
    /// 4
    version: U32,
    /// 8
    flags: U32,
    /// 12: sectors
    capacity: U64,
    /// 20: sectors
    grain_size: U64,
    /// 28: sectors
    descriptor_offset: U64,
    /// 36: sectors
    descriptor_size: U64,
    /// 44: number of entries of a grain table
    table_entries: U32,
    /// 48: sector of the redundant grain directory
    redundant_directory: U64,
    /// 56: sector of the grain directory
    directory: U64,
    /// 64: sectors before the first grain
    overhead: U64,
    /// 72: 1 if the file was not closed
    unclean_shutdown: u8,
    /// 73
    newline_test: [u8; 4],
    /// 77: 1 for deflate
    compression: U16,
    /// 79
    padding: [u8; 433],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// A decoded and checked header. Offsets and lengths are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) capacity: u64,
    /// Number of sectors of a grain: a power of two up to 2048.
    pub(crate) grain_size: u64,
    pub(crate) descriptor_offset: u64,
    /// Length of the embedded descriptor, 0 without one.
    pub(crate) descriptor_size: u64,
    /// Number of entries of a grain table: a power of two up to 512.
    pub(crate) table_entries: u32,
    /// Sector of the redundant grain directory, if there is one.
    pub(crate) redundant_directory: Option<u64>,
    /// Sector of the grain directory, or [`GD_AT_END`].
    pub(crate) directory: u64,
    pub(crate) overhead: u64,
    /// True if the program that wrote the file did not close it.
    pub(crate) unclean_shutdown: bool,
    /// True if entry 1 of a grain table means a grain of zeros.
    pub(crate) zeroed_grains: bool,
    pub(crate) compressed: bool,
    /// True if grains and tables have markers.
    pub(crate) markers: bool,
    /// Flags without a known meaning that a reader may ignore: those of the lower half.
    pub(crate) unknown_flags: u32,
}

impl Header {
    /// Decodes and checks a header. `bytes` begins with the magic number.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let malformed = |what: String| Err(Fault::Malformed(what));
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return malformed("is cut short".to_owned());
        };
        if raw.magic != *MAGIC {
            return malformed("has no magic number".to_owned());
        }
        let (version, flags) = (raw.version.get(), raw.flags.get());
        if !(1..=3).contains(&version) {
            return Err(Fault::Unsupported(format!("has version {version}; versions 1 to 3 are supported")));
        }
        let unknown = flags >> 16 & !3;
        if unknown != 0 {
            return Err(Fault::Unsupported(format!("has unknown flags ({flags:#x})")));
        }
        if flags & VALID_NEWLINE_TEST != 0 && raw.newline_test != NEWLINE_TEST {
            return malformed(
                "shows that the file was transferred in text mode, which changed it".to_owned(),
            );
        }
        let compressed = flags & COMPRESSED != 0;
        match (raw.compression.get(), compressed) {
            (0, false) | (1, true) => {}
            (algorithm @ 0..=1, _) => {
                return malformed(format!(
                    "has compression {algorithm}, but its flags ({flags:#x}) contradict that"
                ));
            }
            (algorithm, _) => return Err(Fault::Unsupported(format!("has unknown compression {algorithm}"))),
        }
        let header = Self {
            version,
            capacity: raw.capacity.get(),
            grain_size: raw.grain_size.get(),
            descriptor_offset: raw.descriptor_offset.get(),
            descriptor_size: raw.descriptor_size.get(),
            table_entries: raw.table_entries.get(),
            redundant_directory: (flags & REDUNDANT_TABLES != 0).then_some(raw.redundant_directory.get()),
            directory: raw.directory.get(),
            overhead: raw.overhead.get(),
            unclean_shutdown: raw.unclean_shutdown != 0,
            zeroed_grains: flags & ZEROED_GRAINS != 0,
            compressed,
            markers: flags & MARKERS != 0,
            unknown_flags: flags & 0xffff & !(VALID_NEWLINE_TEST | REDUNDANT_TABLES | ZEROED_GRAINS),
        };
        header.check()?;
        Ok(header)
    }

    /// Checks the numbers. A header with capacity 0 only wraps a descriptor; its grains do not count.
    fn check(&self) -> Result<(), Fault> {
        let malformed = |what: String| Err(Fault::Malformed(what));
        if self.capacity >= MAX_SECTORS {
            return malformed(format!("has a capacity of {} sectors; the limit is 2^54", self.capacity));
        }
        if self.descriptor_size > MAX_DESCRIPTOR_SECTORS || self.descriptor_offset >= MAX_SECTORS {
            return malformed(format!(
                "has a descriptor of {} sectors at {}; the limit is {MAX_DESCRIPTOR_SECTORS}",
                self.descriptor_size, self.descriptor_offset
            ));
        }
        if self.is_wrapper() {
            return Ok(());
        }
        if !self.grain_size.is_power_of_two() || self.grain_size > MAX_GRAIN_SECTORS {
            return malformed(format!(
                "has grains of {} sectors, not a power of two up to {MAX_GRAIN_SECTORS}",
                self.grain_size
            ));
        }
        if !self.table_entries.is_power_of_two() || self.table_entries > MAX_TABLE_ENTRIES {
            return malformed(format!(
                "has grain tables of {} entries, not a power of two up to {MAX_TABLE_ENTRIES}",
                self.table_entries
            ));
        }
        if self.markers && !self.compressed {
            return malformed("has markers, but no compression".to_owned());
        }
        Ok(())
    }

    /// True if the file only wraps the descriptor of a disk in other files.
    pub(crate) fn is_wrapper(&self) -> bool {
        self.capacity == 0 && self.descriptor_size > 0 && self.descriptor_offset > 0
    }

    /// Returns the number of entries of the grain directory.
    pub(crate) fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(self.grain_size * u64::from(self.table_entries))
    }

    /// Encodes the header.
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader::new_zeroed();
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        raw.magic = *MAGIC;
        raw.version = self.version.into();
        let flags = VALID_NEWLINE_TEST
            | flag(self.redundant_directory.is_some(), REDUNDANT_TABLES)
            | flag(self.zeroed_grains, ZEROED_GRAINS)
            | flag(self.compressed, COMPRESSED)
            | flag(self.markers, MARKERS);
        raw.flags = flags.into();
        raw.capacity = self.capacity.into();
        raw.grain_size = self.grain_size.into();
        raw.descriptor_offset = self.descriptor_offset.into();
        raw.descriptor_size = self.descriptor_size.into();
        raw.table_entries = self.table_entries.into();
        raw.redundant_directory = self.redundant_directory.unwrap_or(0).into();
        raw.directory = self.directory.into();
        raw.overhead = self.overhead.into();
        raw.unclean_shutdown = u8::from(self.unclean_shutdown);
        raw.newline_test = NEWLINE_TEST;
        raw.compression = u16::from(self.compressed).into();
        zerocopy::transmute!(raw)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn header() -> Header {
        Header {
            version: 3,
            capacity: 1000,
            grain_size: 128,
            descriptor_offset: 1,
            descriptor_size: 20,
            table_entries: 512,
            redundant_directory: Some(21),
            directory: 40,
            overhead: 128,
            unclean_shutdown: false,
            zeroed_grains: true,
            compressed: true,
            markers: true,
            unknown_flags: 0,
        }
    }

    #[test]
    fn a_header_survives_encoding() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
        assert_eq!(header().directory_entries(), 1);
    }

    #[test]
    fn refuses_numbers_beyond_their_limits() {
        let faults: [(usize, &[u8], &str); 9] = [
            (4, &[4], "version 4"),
            (10, &[7], "unknown flags"),
            (77, &[0], "contradict"),
            (77, &[2], "unknown compression 2"),
            (76, b"\r", "text mode"),
            (20, &[0], "grains of 0 sectors"),
            (20, &[0, 16], "grains of 4096 sectors"),
            (44, &[0, 4], "tables of 1024 entries"),
            (19, &[1], "capacity"),
        ];
        for (at, bytes, expected) in faults {
            let mut header = header().encode();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            let (Fault::Unsupported(text) | Fault::Malformed(text)) = Header::decode(&header).unwrap_err();
            assert!(text.contains(expected), "{text}, not {expected}");
        }
    }
}
