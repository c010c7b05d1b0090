//! [`Archive`], the list of the members of a tar archive in a file.

use std::collections::HashMap;
use std::sync::Arc;

use imgtool_core::{Error, Input, Lease, Memory, RandomInput, Result};

use crate::pieces::Pieces;
use crate::tar::{Entry, Positions, Run, Walker};

/// Maximum number of members. Our limit: a package has a file for each disk and chunk, and a few more.
pub(crate) const MAX_MEMBERS: usize = 1 << 16;

/// Maximum length of all names together, in bytes. Our limit: 128 bytes for each of the most members.
const MAX_NAMES: usize = 8 << 20;

/// Memory in bytes for a member besides its name, which is kept twice: its entry, and its place in the index.
const MEMBER_BYTES: u64 = 256;

/// Memory in bytes for a run of a sparse file: itself, and the pieces when it is opened.
const RUN_BYTES: u64 = size_of::<Run>() as u64 + 3 * Pieces::PIECE_BYTES;

/// The members of an archive.
#[derive(Debug)]
pub(crate) struct Archive {
    input: RandomInput,
    members: Vec<Entry>,
    by_name: HashMap<String, usize>,
    pub(crate) notes: Vec<String>,
    _lease: Lease,
}

impl Archive {
    /// Reads the headers of all members.
    ///
    /// # Errors
    /// Those of [`Walker::next`]; `Malformed` for two members of one name; `LimitExceeded`.
    pub(crate) fn open(input: RandomInput, memory: &Memory) -> Result<Self> {
        let mut walker = Walker::new(Positions::new(input.clone()));
        let mut lease = memory.lease(0, "the list of an archive's members")?;
        let (mut members, mut by_name) = (Vec::new(), HashMap::new());
        let (mut notes, mut names) = (Vec::new(), 0);
        while let Some(entry) = walker.next()? {
            if !entry.kind.is_file() {
                note_other(&entry, &mut notes);
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
            members.push(entry);
        }
        notes.extend(walker.take_notes());
        Ok(Self { input, members, by_name, notes, _lease: lease })
    }

    /// Returns the names of all files, in the order of the archive.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    fn member(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).and_then(|index| self.members.get(*index))
    }

    /// Opens a file, whose bytes are read from their place in the archive; `None` if there is none of this
    /// name.
    pub(crate) fn open_file(&self, name: &str) -> Result<Option<Input>> {
        let Some(member) = self.member(name) else { return Ok(None) };
        let stored = self.input.section(member.start..member.start.saturating_add(member.stored))?;
        if member.kind != crate::tar::Kind::Sparse {
            return Ok(Some(stored));
        }
        let cancel = stored.cancel_token();
        let mut pieces = Pieces::default();
        let source = pieces.source(stored)?;
        let mut position = 0;
        for run in &member.runs {
            pieces.push_zeros_until(run.start)?;
            pieces.push(source, position, run.len)?;
            // The sum of all lengths is that of the member.
            position += run.len;
        }
        pieces.push_zeros_until(member.size)?;
        Ok(Some(Input::from_read_at(self.input.location(), Arc::new(pieces)).cancelled_by(cancel)))
    }
}

/// Notes a member that is no file, except a directory.
fn note_other(entry: &Entry, notes: &mut Vec<String>) {
    /// Maximum number of notes. Our limit: a person reads no more.
    const MAX_NOTES: usize = 10;
    if entry.kind != crate::tar::Kind::Directory && notes.len() < MAX_NOTES {
        notes.push(format!("'{}' is {}, and is left out", entry.name, entry.kind.name()));
    }
}
