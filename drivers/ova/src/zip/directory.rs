//! The central directory: where it is, and its entries.

use imgtool_core::{Error, RandomInput, Result};

use crate::tar::Kind;

/// Length in bytes of the end record without its comment (APPNOTE, 4.3.16).
const END_LEN: usize = 22;
/// Signatures of the end record, of the zip64 locator and record, and of an entry.
const END: &[u8] = b"PK\x05\x06";
const LOCATOR: &[u8] = b"PK\x06\x07";
const END_64: &[u8] = b"PK\x06\x06";
const ENTRY: &[u8] = b"PK\x01\x02";
/// Lengths in bytes of the zip64 locator and of the fixed part of the zip64 record.
const LOCATOR_LEN: u64 = 20;
const END_64_LEN: u64 = 56;
/// Length in bytes of an entry without name, extra fields and comment.
const ENTRY_LEN: usize = 46;
/// Maximum length of a directory in bytes. Our limit: 65536 entries with names of 128 bytes and the fields of
/// usual programs take less.
const MAX_LEN: u64 = 24 << 20;
/// Tag of the extra field with numbers of 64 bits.
const ZIP_64: u16 = 1;

fn cut() -> Error {
    Error::corrupt("the zip archive has no directory at its end")
        .hint("the file is cut short: copy it again, or use a backup")
}

fn damaged(at: u64) -> Error {
    Error::malformed("the directory of the zip archive is damaged").at(at).hint("copy the archive again")
}

/// Little-endian numbers of a record.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn u16(&self, at: usize) -> u16 {
        self.bytes(at).map_or(0, u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> u32 {
        self.bytes(at).map_or(0, u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.bytes(at).map_or(0, u64::from_le_bytes)
    }

    /// Every record is as long as its fields.
    fn bytes<const LEN: usize>(&self, at: usize) -> Option<[u8; LEN]> {
        self.0.get(at..)?.first_chunk().copied()
    }
}

/// Place of the central directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory {
    start: u64,
    len: u64,
    entries: u64,
}

impl Directory {
    /// Finds the directory by the record at the end of the file.
    ///
    /// # Errors
    /// `Corrupt` if there is none; `Unsupported` for an archive in several files; `Malformed`,
    /// `LimitExceeded`.
    pub(super) fn find(input: &RandomInput) -> Result<Self> {
        let tail_len = input.len().min(END_LEN as u64 + u64::from(u16::MAX));
        let tail_start = input.len() - tail_len;
        // At most 64 KiB, so it fits.
        let tail = input.read_vec(tail_start, tail_len as usize)?;
        // The comment behind the record ends the file.
        let ends = |at: &usize| {
            let record = &tail[*at..];
            record.starts_with(END)
                && record.len() >= END_LEN
                && usize::from(Fields(record).u16(20)) == record.len() - END_LEN
        };
        let at = (0..tail.len()).rev().find(ends).ok_or_else(cut)?;
        let (end, end_at) = (Fields(&tail[at..]), tail_start + at as u64);
        let mut disks = [u32::from(end.u16(4)), u32::from(end.u16(6))];
        let mut found =
            Self { start: end.u32(16).into(), len: end.u32(12).into(), entries: end.u16(10).into() };
        let mut behind = end_at;
        let is_full = found.start == u64::from(u32::MAX)
            || found.len == u64::from(u32::MAX)
            || found.entries == u64::from(u16::MAX)
            || disks.contains(&u16::MAX.into());
        if let Some((record, record_at)) = if is_full { zip_64(input, end_at)? } else { None } {
            let record = Fields(&record);
            disks = [record.u32(16), record.u32(20)];
            found = Self { start: record.u64(48), len: record.u64(40), entries: record.u64(32) };
            behind = record_at;
        }
        if disks != [0, 0] {
            return Err(Error::unsupported("the zip archive is split over several files")
                .hint("join them: zip -s 0 SPLIT.zip --out WHOLE.zip"));
        }
        found.checked(behind)
    }

    fn checked(self, behind: u64) -> Result<Self> {
        if self.start.checked_add(self.len).is_none_or(|end| end > behind) {
            return Err(damaged(self.start));
        }
        if self.len > MAX_LEN {
            return Err(Error::limit(format!(
                "the directory of the zip archive has {} bytes; the limit is {MAX_LEN}",
                self.len
            )));
        }
        if self.entries > self.len / ENTRY_LEN as u64 {
            return Err(damaged(self.start));
        }
        Ok(self)
    }

    /// Position in the file.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Reads the directory.
    pub(super) fn read(&self, input: &RandomInput) -> Result<Vec<u8>> {
        // At most 24 MiB, so it fits.
        input.read_vec(self.start, self.len as usize)
    }
}

/// Returns the zip64 record, which a locator before the end record refers to, and its position; `None` if
/// there is no locator: a field may have its largest value.
fn zip_64(input: &RandomInput, end_at: u64) -> Result<Option<(Vec<u8>, u64)>> {
    let Some(locator_at) = end_at.checked_sub(LOCATOR_LEN) else { return Ok(None) };
    let locator = input.read_vec(locator_at, LOCATOR_LEN as usize)?;
    if !locator.starts_with(LOCATOR) {
        return Ok(None);
    }
    let record_at = Fields(&locator).u64(8);
    if record_at.checked_add(END_64_LEN).is_none_or(|end| end > locator_at) {
        return Err(damaged(locator_at));
    }
    let record = input.read_vec(record_at, END_64_LEN as usize)?;
    match record.starts_with(END_64) {
        true => Ok(Some((record, record_at))),
        false => Err(damaged(record_at)),
    }
}

/// An entry.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) flags: u16,
    pub(super) method: u16,
    pub(super) crc: u32,
    pub(super) stored: u64,
    pub(super) size: u64,
    /// Position of the member's header.
    pub(super) header: u64,
    /// Mode of the file, if the archive is of Unix.
    mode: Option<u32>,
}

impl Entry {
    /// Parses the entry at the beginning of `bytes`. Returns it with the bytes behind it.
    ///
    /// # Errors
    /// `Malformed`, with the position `directory` in the archive.
    pub(super) fn parse(bytes: &[u8], directory: u64) -> Result<(Self, &[u8])> {
        let fields = Fields(bytes);
        let lens = [28, 30, 32].map(|at| usize::from(fields.u16(at)));
        let end = ENTRY_LEN + lens[0] + lens[1] + lens[2];
        let whole = bytes.get(..end).filter(|entry| entry.starts_with(ENTRY));
        let whole = whole.ok_or_else(|| damaged(directory))?;
        let name = &whole[ENTRY_LEN..][..lens[0]];
        let extra = &whole[ENTRY_LEN + lens[0]..][..lens[1]];
        let mut entry = Self {
            name: name.to_vec(),
            flags: fields.u16(8),
            method: fields.u16(10),
            crc: fields.u32(16),
            stored: fields.u32(20).into(),
            size: fields.u32(24).into(),
            header: fields.u32(42).into(),
            // 4.4.2.2: 3 is Unix.
            mode: (fields.u16(4) >> 8 == 3).then(|| fields.u32(38) >> 16),
        };
        let mut wide = zip_64_field(extra).chunks_exact(8).map(|number| Fields(number).u64(0));
        // 4.5.3: only those whose field in the entry is full, in this order.
        for number in [&mut entry.size, &mut entry.stored, &mut entry.header] {
            if *number == u64::from(u32::MAX) {
                *number = wide.next().unwrap_or(*number);
            }
        }
        Ok((entry, &bytes[end..]))
    }

    /// Returns the kind of the member.
    pub(super) fn kind(&self) -> Kind {
        /// Bits of a mode with the type of the file, and their values. Source: POSIX, sys/stat.h in Linux.
        const TYPE: u32 = 0o170_000;
        match self.mode.unwrap_or(0) & TYPE {
            _ if self.name.ends_with(b"/") => Kind::Directory,
            // What zip(1) reads from a pipe has the type of the pipe.
            0 | 0o100_000 | 0o010_000 => Kind::File,
            0o040_000 => Kind::Directory,
            0o120_000 => Kind::Link,
            _ => Kind::Special,
        }
    }
}

/// Returns the content of the zip64 field; nothing if there is none.
fn zip_64_field(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let (tag, len) = (Fields(head).u16(0), usize::from(Fields(head).u16(2)));
        let Some((content, behind)) = rest.split_at_checked(len) else { break };
        if tag == ZIP_64 {
            return content;
        }
        extra = behind;
    }
    &[]
}
