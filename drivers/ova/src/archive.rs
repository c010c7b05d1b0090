//! [`Archive`], the list of the members of a tar or zip archive in a file.

use std::collections::HashMap;
use std::sync::Arc;

use imgtool_core::{Error, Externals, Input, Lease, OpenOptions, RandomInput, Result};

use crate::manifest::Manifest;
use crate::pieces::{Bytes, Pieces};
use crate::tar::{Entry, Kind, Positions, Run, Walker};
use crate::zip::{self, Method};

/// Maximum number of members. Our limit: a package has a file for each disk and chunk, and a few more.
pub(crate) const MAX_MEMBERS: usize = 1 << 16;

/// Maximum length of all names together, in bytes. Our limit: 128 bytes for each of the most members.
pub(crate) const MAX_NAMES: usize = 8 << 20;

/// Memory in bytes for a member besides its name, which is kept twice: its entry, and its place in the index.
const MEMBER_BYTES: u64 = 256;

/// Memory in bytes for a run of a sparse file: itself, and the pieces when it is opened.
const RUN_BYTES: u64 = size_of::<Run>() as u64 + 3 * Pieces::PIECE_BYTES;

/// The members of an archive.
#[derive(Debug)]
pub(crate) struct Archive {
    input: RandomInput,
    members: Vec<Member>,
    by_name: HashMap<String, usize>,
    pub(crate) notes: Vec<String>,
    /// Name of the form of a tar archive, by its first file.
    form: Option<&'static str>,
    /// Name of the member within which the archive was cut, in a salvage; empty if that was within a header.
    pub(crate) cut: Option<String>,
    /// Checksums of the members that are stored as they are, if the archive has any.
    pub(crate) sums: Option<Manifest>,
    /// Decoder of compressed members.
    externals: Externals,
    _lease: Lease,
}

/// A file in the archive.
#[derive(Debug)]
struct Member {
    name: String,
    /// Position and number of its bytes in the archive.
    start: u64,
    stored: u64,
    form: Form,
}

/// Form in which the archive stores the bytes of a member.
#[derive(Debug)]
enum Form {
    /// As they are.
    Plain,
    /// Without holes: the runs of data, and the length of the file.
    Sparse(Vec<Run>, u64),
    /// Compressed with deflate: CRC-32 and length of the file.
    Deflated(u32, u64),
    /// In a way that is not read.
    Unknown(&'static str),
}

impl Archive {
    /// Reads the headers of all members of a tar archive. A salvage ends with the member that was cut.
    ///
    /// # Errors
    /// Those of [`Walker::next`]; `Malformed` for two members of one name; `LimitExceeded`.
    pub(crate) fn open_tar(input: RandomInput, options: &OpenOptions) -> Result<Self> {
        let mut walker = Walker::new(Positions::new(input.clone())).salvaging(options.salvage);
        let mut lease = options.memory.lease(0, "the list of an archive's members")?;
        let (mut members, mut by_name) = (Vec::new(), HashMap::new());
        let (mut notes, mut names, mut form) = (Vec::new(), 0, None);
        while let Some(entry) = walker.next()? {
            if !entry.kind.is_file() {
                note_other(&entry.name, entry.kind, &mut notes);
                continue;
            }
            names += entry.name.len();
            if members.len() == MAX_MEMBERS || names > MAX_NAMES {
                return Err(Error::limit(format!(
                    "the archive has more than {MAX_MEMBERS} members, or longer names than {MAX_NAMES} bytes"
                )));
            }
            let bytes = MEMBER_BYTES + 2 * entry.name.len() as u64 + RUN_BYTES * entry.runs.len() as u64;
            lease.raise(lease.bytes() + bytes, "the list of an archive's members")?;
            if by_name.insert(entry.name.clone(), members.len()).is_some() {
                return Err(Error::malformed(format!("two members are called '{}'", entry.name))
                    .at(entry.start)
                    .hint("unpack the archive, and convert the file that you mean"));
            }
            form = form.or(Some(entry.form));
            members.push(Member::of(entry));
        }
        notes.extend(walker.take_notes());
        let (externals, cut) = (Externals::default(), walker.take_cut());
        Ok(Self { input, members, by_name, notes, form, cut, sums: None, externals, _lease: lease })
    }

    /// Reads the directory of a zip archive.
    ///
    /// # Errors
    /// Those of [`zip::members`].
    pub(crate) fn open_zip(input: RandomInput, options: &OpenOptions) -> Result<Self> {
        let zip::Members { files, notes, lease } = zip::members(&input, &options.memory)?;
        let stored = files.iter().filter(|member| member.method == Method::Stored);
        let sums = Manifest::of_crcs(stored.map(|member| (member.name.clone(), member.crc)));
        let by_name = (0..).zip(&files).map(|(index, member)| (member.name.clone(), index)).collect();
        let member = |member: zip::Member| {
            let form = match member.method {
                Method::Stored => Form::Plain,
                Method::Deflated => Form::Deflated(member.crc, member.size),
                Method::Other(name) => Form::Unknown(name),
            };
            Member { name: member.name, start: member.start, stored: member.stored, form }
        };
        let members = files.into_iter().map(member).collect();
        let externals = options.externals.clone();
        let (cut, sums) = (None, Some(sums));
        Ok(Self { input, members, by_name, notes, form: None, cut, sums, externals, _lease: lease })
    }

    /// Returns the names of all files, in the order of the archive.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    /// Returns the name of the form of a tar archive, by its first file; `None` for a zip archive.
    pub(crate) fn form(&self) -> Option<&'static str> {
        self.form
    }

    /// True if there is a file of this name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Opens a file, whose bytes are read from their place in the archive, or unpacked if they are
    /// compressed; `None` if there is none of this name.
    ///
    /// # Errors
    /// `Unsupported` for a member that is compressed in a way that is not read; `Corrupt` for a wrong checksum of
    /// a compressed one.
    pub(crate) fn open_file(&self, name: &str) -> Result<Option<Input>> {
        let Some(member) = self.by_name.get(name).and_then(|index| self.members.get(*index)) else {
            return Ok(None);
        };
        let stored = self.input.section(member.start..member.start.saturating_add(member.stored))?;
        match &member.form {
            Form::Plain => Ok(Some(stored)),
            Form::Sparse(runs, size) => self.sparse(stored, runs, *size).map(Some),
            Form::Deflated(crc, size) => self.inflated(stored, *crc, *size).map(Some),
            Form::Unknown(method) => Err(Error::unsupported(format!(
                "'{name}' is packed with {method}; stored and deflated members of a zip archive are read"
            ))
            .hint("unpack the archive, and convert the file in it")),
        }
    }

    fn sparse(&self, stored: Input, runs: &[Run], size: u64) -> Result<Input> {
        let cancel = stored.cancel_token();
        let mut pieces = Pieces::default();
        let source = pieces.source(stored)?;
        let mut position = 0;
        for run in runs {
            pieces.push_zeros_until(run.start)?;
            pieces.push(source, position, run.len)?;
            // The sum of all lengths is that of the member.
            position += run.len;
        }
        pieces.push_zeros_until(size)?;
        Ok(Input::from_read_at(self.input.location(), Arc::new(pieces)).cancelled_by(cancel))
    }

    /// Unpacks a deflated member. A gzip file is such a stream between a header and its checksum and length
    /// (RFC 1952), which the decoder of gzip compares.
    fn inflated(&self, stored: Input, crc: u32, size: u64) -> Result<Input> {
        /// Header of a gzip file that is compressed with deflate, without a name and a time, of an unknown
        /// system.
        const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
        let cancel = stored.cancel_token();
        // The length modulo 2^32.
        let end = [crc.to_le_bytes(), ((size & u64::from(u32::MAX)) as u32).to_le_bytes()].concat();
        let around = Bytes([&HEADER[..], &end].concat());
        let mut pieces = Pieces::default();
        let location = self.input.location();
        let around = pieces.source(Input::from_read_at(location, Arc::new(around)))?;
        let len = stored.len().unwrap_or(0);
        let source = pieces.source(stored)?;
        pieces.push(around, 0, HEADER.len() as u64)?;
        pieces.push(source, 0, len)?;
        pieces.push(around, HEADER.len() as u64, end.len() as u64)?;
        let gzip = Input::from_read_at(location, Arc::new(pieces)).cancelled_by(cancel);
        let file = self.externals.decompressed(gzip, "gzip")?;
        match file.len().filter(|found| *found != size) {
            Some(found) => Err(Error::corrupt(format!(
                "a member has {found} bytes; the directory of the archive says {size}"
            ))
            .hint("the archive is damaged: copy it again")),
            None => Ok(file),
        }
    }
}

impl Member {
    fn of(entry: Entry) -> Self {
        let form = match entry.kind {
            Kind::Sparse => Form::Sparse(entry.runs, entry.size),
            _ => Form::Plain,
        };
        Self { name: entry.name, start: entry.start, stored: entry.stored, form }
    }
}

/// Notes a member that is no file, except a directory.
pub(crate) fn note_other(name: &str, kind: Kind, notes: &mut Vec<String>) {
    /// Maximum number of notes. Our limit: a person reads no more.
    const MAX_NOTES: usize = 10;
    if kind != Kind::Directory && notes.len() < MAX_NOTES {
        notes.push(format!("'{name}' is {}, and is left out", kind.name()));
    }
}
