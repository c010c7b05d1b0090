//! The chunks of a disk, in guest order.

use imgtool_core::{Error, Lease, Memory, RandomInput, Result};

use crate::layout::{RawChunk, SECTOR_SIZE, Table, Trailer};
use crate::tables;

/// Maximum length in bytes of the content of a compressed chunk. QEMU's limit; hdiutil writes up to 1 MiB.
const MAX_CHUNK: u64 = 64 << 20;

/// Form of a stored chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Zeros, not stored.
    Zero,
    /// Content that no file system uses; it reads as zeros.
    Ignored,
    Raw,
    Adc,
    Zlib,
    Bzip2,
    Lzfse,
    Lzma,
}

impl Kind {
    /// Returns the kind with this number; `None` for an entry of another kind.
    fn decode(number: u32) -> Result<Option<Self>> {
        Ok(Some(match number {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Ignored,
            0x8000_0004 => Self::Adc,
            0x8000_0005 => Self::Zlib,
            0x8000_0006 => Self::Bzip2,
            0x8000_0007 => Self::Lzfse,
            0x8000_0008 => Self::Lzma,
            // A comment and the end of a table.
            0x7fff_fffe | 0xffff_ffff => return Ok(None),
            _ => return Err(Error::unsupported(format!("a chunk has the unknown type {number:#x}"))),
        }))
    }

    /// Returns the name of the compression; `None` for a chunk that is not compressed.
    pub(crate) fn compression(self) -> Option<&'static str> {
        match self {
            Self::Zero | Self::Ignored | Self::Raw => None,
            Self::Adc => Some("adc"),
            Self::Zlib => Some("zlib"),
            Self::Bzip2 => Some("bzip2"),
            Self::Lzfse => Some("lzfse"),
            Self::Lzma => Some("lzma"),
        }
    }

    /// True if the content is not in the file.
    pub(crate) fn is_zero(self) -> bool {
        matches!(self, Self::Zero | Self::Ignored)
    }
}

/// A chunk of the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    /// Guest offset.
    pub(crate) start: u64,
    /// Length in bytes of the content, never 0.
    pub(crate) len: u64,
    /// File offset.
    pub(crate) file_offset: u64,
    /// Length in bytes as stored.
    pub(crate) stored_len: u64,
    pub(crate) kind: Kind,
}

impl Chunk {
    /// Returns the guest offset one past the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }

    fn decode(raw: &RawChunk, table: &Table<'_>, trailer: &Trailer) -> Result<Option<Self>> {
        let Some(kind) = Kind::decode(raw.kind.get())? else { return Ok(None) };
        let (sector, sectors) = (raw.sector.get(), raw.sectors.get());
        if sectors == 0 {
            return Ok(None);
        }
        let in_table = sector.checked_add(sectors).is_some_and(|end| end <= table.sectors);
        let start = table.first_sector.checked_add(sector);
        let end = start.and_then(|start| start.checked_add(sectors));
        let (Some(start), true) = (start.filter(|_| end.is_some_and(|end| end <= 1 << 54)), in_table) else {
            return Err(Error::malformed(format!(
                "a chunk of {sectors} sectors at {sector} exceeds the {} sectors of its table",
                table.sectors
            )));
        };
        let offset = trailer.data_offset.checked_add(table.data_offset);
        let offset = offset.and_then(|offset| offset.checked_add(raw.offset.get()));
        let chunk = Self {
            start: start * SECTOR_SIZE,
            len: sectors * SECTOR_SIZE,
            file_offset: offset.filter(|_| !kind.is_zero()).unwrap_or(0),
            stored_len: if kind.is_zero() { 0 } else { raw.len.get() },
            kind,
        };
        if offset.is_none() && !kind.is_zero() {
            return Err(Error::malformed(format!("the chunk at sector {start} is stored beyond any file")));
        }
        chunk.check_len()?;
        Ok(Some(chunk))
    }

    fn check_len(&self) -> Result<()> {
        let (len, stored) = (self.len, self.stored_len);
        if self.kind == Kind::Raw && stored < len {
            return Err(Error::malformed(format!("a chunk of {len} bytes is stored in {stored}")));
        }
        if self.kind.compression().is_some() && (len > MAX_CHUNK || stored > 2 * MAX_CHUNK) {
            return Err(Error::limit(format!(
                "a compressed chunk has {len} bytes, stored in {stored}; the maximum is {MAX_CHUNK}"
            )));
        }
        Ok(())
    }
}

/// A table of chunks, for its checksum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Guest range.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// CRC-32 of the content, if there is one.
    pub(crate) crc: Option<u32>,
}

/// All chunks of an image, in guest order.
#[derive(Debug)]
pub(crate) struct Chunks {
    list: Vec<Chunk>,
    /// The tables, by the first sector that they map.
    pub(crate) parts: Vec<Part>,
    _lease: Lease,
}

impl Chunks {
    /// Reads the chunks of an image. The list borrows from `memory`.
    ///
    /// # Errors
    /// Any error of [`tables::read`]; `Malformed` for chunks that overlap or contradict their table.
    pub(crate) fn read(input: &RandomInput, trailer: &Trailer, memory: &Memory) -> Result<Self> {
        let purpose = "the chunks of a DMG image";
        let _reading = memory.lease(tables::memory(trailer), purpose)?;
        let mut lease = memory.lease(0, purpose)?;
        let (mut list, mut parts) = (Vec::new(), Vec::new());
        tables::read(input, trailer, |bytes| {
            let table = Table::decode(bytes)?;
            let count = list.len() + table.chunks.len();
            // A list that grows may take twice its length.
            lease.raise(
                (2 * count * size_of::<Chunk>() + 2 * parts.len() * size_of::<Part>()) as u64,
                purpose,
            )?;
            for raw in table.chunks {
                list.extend(Chunk::decode(raw, &table, trailer)?);
            }
            let (start, len) = (table.first_sector, table.sectors);
            if start.checked_add(len).is_none_or(|end| end > 1 << 54) {
                return Err(Error::malformed(format!("a table maps {len} sectors from {start}")));
            }
            parts.push(Part { start: start * SECTOR_SIZE, len: len * SECTOR_SIZE, crc: table.crc });
            Ok(())
        })?;
        list.sort_unstable_by_key(|chunk: &Chunk| chunk.start);
        parts.sort_unstable_by_key(|part: &Part| part.start);
        for pair in list.windows(2) {
            if pair[1].start < pair[0].end() {
                return Err(Error::malformed(format!(
                    "two chunks store the sector {}",
                    pair[1].start / SECTOR_SIZE
                )));
            }
        }
        Ok(Self { list, parts, _lease: lease })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.list.iter()
    }

    /// Returns the guest offset at which the last chunk ends.
    pub(crate) fn end(&self) -> u64 {
        self.list.last().map_or(0, Chunk::end)
    }

    /// Returns the chunk that contains `guest_offset`, or the guest offset at which the next one begins.
    pub(crate) fn at(&self, guest_offset: u64) -> std::result::Result<&Chunk, u64> {
        match self.list.get(self.next(guest_offset)) {
            Some(chunk) if chunk.start <= guest_offset => Ok(chunk),
            Some(chunk) => Err(chunk.start),
            None => Err(u64::MAX),
        }
    }

    /// Like [`Chunks::at`], with the place of the chunk in the list.
    pub(crate) fn indexed_at(&self, guest_offset: u64) -> Option<(usize, &Chunk)> {
        let index = self.next(guest_offset);
        let chunk = self.list.get(index).filter(|chunk| chunk.start <= guest_offset)?;
        Some((index, chunk))
    }

    /// Returns the place of the first chunk that ends after `guest_offset`.
    fn next(&self, guest_offset: u64) -> usize {
        self.list.partition_point(|chunk| chunk.end() <= guest_offset)
    }

    /// Returns the maximum of a property of the compressed chunks; 0 without any.
    pub(crate) fn most(&self, property: impl Fn(&Chunk) -> u64) -> u64 {
        self.list.iter().filter(|chunk| chunk.kind.compression().is_some()).map(property).max().unwrap_or(0)
    }
}
