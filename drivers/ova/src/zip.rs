//! The members of a zip archive, as its central directory lists them (PKWARE's APPNOTE 6.3.10).

use std::collections::HashMap;

use imgtool_core::{Error, Lease, Memory, RandomInput, Result};

use crate::archive::{MAX_MEMBERS, MAX_NAMES};
use crate::tar::{Kind, checked_name};

mod directory;

use directory::Directory;

/// Method of a member that is stored as it is.
const STORED: u16 = 0;
/// Method of a member that is compressed with deflate.
const DEFLATED: u16 = 8;
/// Flag of an encrypted member.
const ENCRYPTED: u16 = 1;
/// Length in bytes of a local header without name and extra fields (4.3.7).
const LOCAL_LEN: u64 = 30;
/// Signature of a local header.
const LOCAL: &[u8] = b"PK\x03\x04";
/// Number of bytes to which deflate can expand one. Source: a match of 258 bytes takes two bits.
const MAX_EXPANSION: u64 = 1032;

/// Method by which the archive stores the bytes of a member (4.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// As they are.
    Stored,
    /// Compressed with deflate.
    Deflated,
    /// In a way that is not read, which has this name.
    Other(&'static str),
}

/// A file in the archive.
#[derive(Debug)]
pub(crate) struct Member {
    /// Name; untrusted.
    pub(crate) name: String,
    pub(crate) method: Method,
    /// Position of its bytes in the archive.
    pub(crate) start: u64,
    /// Number of its bytes in the archive.
    pub(crate) stored: u64,
    /// Length of the file in bytes.
    pub(crate) size: u64,
    /// CRC-32 of the file.
    pub(crate) crc: u32,
}

/// The files of an archive.
#[derive(Debug)]
pub(crate) struct Members {
    pub(crate) files: Vec<Member>,
    pub(crate) notes: Vec<String>,
    /// Lease of the list's memory.
    pub(crate) lease: Lease,
}

/// Memory in bytes for a member besides its name, which is kept twice, also in the entry of the directory.
const MEMBER_BYTES: u64 = 256;

/// True if `head` begins a zip archive: with a member, or without any.
pub(crate) fn is_zip(head: &[u8]) -> bool {
    head.starts_with(LOCAL) || head.starts_with(b"PK\x05\x06")
}

/// Reads the central directory, and compares it with the headers of the members.
///
/// # Errors
/// `Corrupt` for an archive that is cut; `Malformed` for entries that contradict each other; `Unsupported`
/// for an archive in several files; `LimitExceeded`.
pub(crate) fn members(input: &RandomInput, memory: &Memory) -> Result<Members> {
    const LIST: &str = "the list of an archive's members";
    let directory = Directory::find(input)?;
    let mut lease = memory.lease(directory.len(), LIST)?;
    let bytes = directory.read(input)?;
    let mut entries = Vec::new();
    let (mut rest, mut names) = (&bytes[..], 0);
    for _ in 0..directory.entries() {
        let (entry, behind) = directory::Entry::parse(rest, directory.start())?;
        rest = behind;
        names += entry.name.len();
        if entries.len() == MAX_MEMBERS || names > MAX_NAMES {
            return Err(Error::limit(format!(
                "the archive has more than {MAX_MEMBERS} members, or longer names than {MAX_NAMES} bytes"
            )));
        }
        lease.raise(lease.bytes() + MEMBER_BYTES + 2 * entry.name.len() as u64, LIST)?;
        entries.push(entry);
    }
    // A signature of the directory may follow its entries.
    if !rest.is_empty() && !rest.starts_with(b"PK\x05\x05") {
        return Err(Error::malformed(format!(
            "the directory of the archive has more than the {} entries that its end states",
            directory.entries()
        ))
        .at(directory.start())
        .hint("programs differ in what they find in it: pack the files again"));
    }
    entries.sort_by_key(|entry| entry.header);
    let (mut files, mut notes, mut free) = (Vec::new(), Vec::new(), 0);
    let mut seen: HashMap<String, ()> = HashMap::new();
    for entry in &entries {
        if entry.header < free {
            return Err(Error::malformed("two members of the archive share bytes")
                .at(entry.header)
                .hint("nobody makes such an archive by mistake: don't trust it"));
        }
        if entry.header.checked_add(LOCAL_LEN).is_none_or(|end| end > directory.start()) {
            return Err(
                Error::malformed("a member of the archive is behind its directory").at(directory.start())
            );
        }
        let member = member(input, entry)?;
        free = member.start.checked_add(member.stored).filter(|end| *end <= directory.start()).ok_or_else(
            || {
                Error::malformed(format!("'{}' reaches into the directory of the archive", member.name))
                    .at(entry.header)
            },
        )?;
        match entry.kind() {
            Kind::File if seen.insert(member.name.clone(), ()).is_some() => {
                return Err(Error::malformed(format!("two members are called '{}'", member.name))
                    .at(entry.header)
                    .hint("unpack the archive, and convert the file that you mean"));
            }
            Kind::File => files.push(member),
            kind => crate::archive::note_other(&member.name, kind, &mut notes),
        }
    }
    Ok(Members { files, notes, lease })
}

/// Compares an entry with the header of its member, and returns the member.
fn member(input: &RandomInput, entry: &directory::Entry) -> Result<Member> {
    let at = entry.header;
    let differs = || {
        Error::malformed("a member differs from its entry in the directory of the archive")
            .at(at)
            .hint("the archive is damaged, or was made to show different programs different files")
    };
    let mut header = [0; LOCAL_LEN as usize];
    input.read_exact_at(&mut header, at)?;
    let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (flags, method, name_len, extra_len) = (number(6), number(8), number(26), number(28));
    let mut name = vec![0; usize::from(name_len)];
    let name_at = at.checked_add(LOCAL_LEN).ok_or_else(differs)?;
    let start = name_at + u64::from(name_len) + u64::from(extra_len);
    if !header.starts_with(LOCAL) || method != entry.method {
        return Err(differs());
    }
    input.read_exact_at(&mut name, name_at)?;
    if name != entry.name {
        return Err(differs());
    }
    let name = checked_name(&entry.name)?;
    let method = method_of(entry, flags | entry.flags);
    let is_possible = match method {
        Method::Stored => entry.size == entry.stored,
        Method::Deflated => entry.size <= entry.stored.saturating_mul(MAX_EXPANSION),
        Method::Other(_) => true,
    };
    if !is_possible || entry.size > i64::MAX as u64 {
        return Err(Error::malformed(format!(
            "'{name}' can't have {} bytes, since {} are stored",
            entry.size, entry.stored
        ))
        .at(at));
    }
    Ok(Member { name, method, start, stored: entry.stored, size: entry.size, crc: entry.crc })
}

/// Returns the method of an entry. Names: APPNOTE, 4.4.5.
fn method_of(entry: &directory::Entry, flags: u16) -> Method {
    match entry.method {
        _ if flags & ENCRYPTED != 0 => Method::Other("encryption"),
        STORED => Method::Stored,
        DEFLATED => Method::Deflated,
        9 => Method::Other("deflate64"),
        12 => Method::Other("bzip2"),
        14 => Method::Other("LZMA"),
        93 => Method::Other("zstd"),
        95 => Method::Other("xz"),
        _ => Method::Other("an unknown method"),
    }
}
