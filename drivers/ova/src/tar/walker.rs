//! [`Walker`], which goes from member to member of a tar archive, in a file or a stream.

use std::io::Read;

use imgtool_core::{Error, RandomInput, Result};

use super::pax::Records;
use super::sparse::{Map, Run};
use super::{BLOCK, Header, Kind, MAX_NAME, MAX_PAX};

/// Number of bytes behind the end of an archive in a file that are looked at. Our limit: GNU tar fills the
/// last record of at most 10 KiB with zeros, or as many as `-b` says.
const MAX_TAIL: u64 = 1 << 20;

/// The bytes of an archive, read in order.
pub(crate) trait Blocks {
    /// Fills `buf` as far as the archive reaches. Returns the number of bytes read.
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize>;

    /// Skips `len` bytes. Returns the number skipped, which is less at the end of the archive.
    fn skip(&mut self, len: u64) -> Result<u64>;

    /// Returns the position in bytes.
    fn position(&self) -> u64;

    /// Returns the number of bytes left, if it is known.
    fn left(&self) -> Option<u64>;
}

/// An archive in a file.
#[derive(Debug)]
pub(crate) struct Positions {
    input: RandomInput,
    position: u64,
}

impl Positions {
    /// Begins at the start of `input`.
    pub(crate) fn new(input: RandomInput) -> Self {
        Self { input, position: 0 }
    }

    fn rest(&self) -> u64 {
        self.input.len().saturating_sub(self.position)
    }
}

impl Blocks for Positions {
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let len = usize::try_from(self.rest()).unwrap_or(usize::MAX).min(buf.len());
        self.input.read_exact_at(&mut buf[..len], self.position)?;
        self.position += len as u64;
        Ok(len)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let len = len.min(self.rest());
        self.position += len;
        Ok(len)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn left(&self) -> Option<u64> {
        Some(self.rest())
    }
}

/// The first bytes of an archive.
impl Blocks for &[u8] {
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        Read::read(self, buf).map_err(|e| Error::io("read", e))
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(self.len());
        *self = &self[len..];
        Ok(len as u64)
    }

    fn position(&self) -> u64 {
        0
    }

    fn left(&self) -> Option<u64> {
        None
    }
}

/// A member.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Name, without `./` at its start; untrusted.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// Name of the form of its header, as GNU tar calls it.
    pub(crate) form: &'static str,
    /// Position of the content in the archive.
    pub(crate) start: u64,
    /// Length of the content in the archive, in bytes.
    pub(crate) stored: u64,
    /// Length of the file in bytes.
    pub(crate) size: u64,
    /// Runs of data of a sparse file, ascending.
    pub(crate) runs: Vec<Run>,
}

/// Iterates over the members of an archive.
#[derive(Debug)]
pub(crate) struct Walker<B> {
    blocks: B,
    /// Number of bytes of the current member's content that were not read.
    pending: u64,
    /// Number of bytes behind it that fill its last block.
    filler: u64,
    /// True once the last member was returned.
    ended: bool,
    /// True to return what is left of a member that was cut, as the last one.
    salvages: bool,
    /// True once a header of pax was met.
    has_pax: bool,
    /// Name of the member within which the archive was cut; empty if that was within a header.
    cut: Option<String>,
    notes: Vec<String>,
}

impl<B: Blocks> Walker<B> {
    /// Creates an iterator that begins with the first member.
    pub(crate) fn new(blocks: B) -> Self {
        Self {
            blocks,
            pending: 0,
            filler: 0,
            ended: false,
            salvages: false,
            has_pax: false,
            cut: None,
            notes: Vec::new(),
        }
    }

    /// Returns what is left of a member that was cut, as the last one, if `salvages` is set.
    pub(crate) fn salvaging(self, salvages: bool) -> Self {
        Self { salvages, ..self }
    }

    /// Returns the next member; `None` at the end. Skips what was not read of the one before.
    ///
    /// # Errors
    /// `Corrupt` for an archive that is cut or damaged; `Malformed` for headers that break the format.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        self.skip_pending()?;
        let (mut long_name, mut records) = (None, Records::default());
        while !self.ended {
            let at = self.blocks.position();
            let Some(block) = self.header_block()? else { break };
            let header = Header::parse(&block).map_err(|e| e.at(at))?;
            self.has_pax |= matches!(header.kind, Kind::Pax | Kind::GlobalPax);
            match header.kind {
                Kind::LongName => long_name = Some(self.content(&header, MAX_NAME).map_err(|e| e.at(at))?),
                Kind::LongLink => drop(self.content(&header, MAX_NAME).map_err(|e| e.at(at))?),
                Kind::Pax => {
                    let content = self.content(&header, MAX_PAX).map_err(|e| e.at(at))?;
                    records = Records::parse(&content).map_err(|e| e.at(at))?;
                }
                Kind::GlobalPax => self.global(&header).map_err(|e| e.at(at))?,
                _ => return self.entry(&header, long_name, records).map(Some).map_err(|e| e.at(at)),
            }
        }
        match self.salvages || long_name.is_none() && records.is_empty() {
            true => Ok(None),
            false => Err(Error::corrupt("the archive ends behind an extended header")
                .hint("the file is cut short: copy it again")),
        }
    }

    /// Fills `buf` with the content of the current member as far as it reaches. Returns the number of bytes
    /// read.
    ///
    /// # Errors
    /// `Corrupt` if the archive ends before.
    pub(crate) fn read_content(&mut self, buf: &mut [u8]) -> Result<usize> {
        let len = usize::try_from(self.pending).unwrap_or(usize::MAX).min(buf.len());
        let at = self.blocks.position();
        if self.blocks.read_full(&mut buf[..len])? < len {
            return Err(cut(at));
        }
        self.pending -= len as u64;
        Ok(len)
    }

    /// Returns the name of the member within which the archive was cut, or an empty name.
    pub(crate) fn take_cut(&mut self) -> Option<String> {
        self.cut.take()
    }

    /// Returns notes for the user, which stay.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns notes for the user.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Returns the block of the next header; `None` at the end of the archive.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let at = self.blocks.position();
        match self.blocks.read_full(&mut block)? {
            0 => self.notes.push("the archive ends without an end mark; it may be cut short".to_owned()),
            BLOCK if block.iter().any(|byte| *byte != 0) => return Ok(Some(block)),
            BLOCK => self.end_mark(at)?,
            _ if self.salvages => {
                self.cut = Some(String::new());
                self.notes.push("the archive was cut within a header".to_owned());
            }
            _ => return Err(cut(at)),
        }
        self.ended = true;
        Ok(None)
    }

    /// Reads the second block of zeros of the end mark, and looks at the bytes behind it.
    fn end_mark(&mut self, at: u64) -> Result<()> {
        let mut block = [0; BLOCK];
        let len = self.blocks.read_full(&mut block)?;
        if block[..len].iter().any(|byte| *byte != 0) {
            return Err(Error::malformed("a block of zeros lies before a member").at(at));
        }
        let behind = self.blocks.position();
        let mut looked_at = 0;
        let is_whole = loop {
            match self.blocks.read_full(&mut block)? {
                0 => break true,
                len if block[..len].iter().any(|byte| *byte != 0) => break false,
                len => looked_at += len as u64,
            }
            if self.blocks.left().is_some() && looked_at >= MAX_TAIL {
                break true;
            }
        };
        if !is_whole {
            self.notes.push(format!("other bytes follow the end of the archive, at {behind}"));
        }
        Ok(())
    }

    /// Reads the content of an extended header.
    fn content(&mut self, header: &Header<'_>, most: u64) -> Result<Vec<u8>> {
        if header.size > most {
            return Err(Error::limit(format!(
                "an extended header has {} bytes; the limit is {most}",
                header.size
            )));
        }
        // At most 64 KiB, so both fit.
        let mut content = vec![0; header.size as usize];
        let at = self.blocks.position();
        if self.blocks.read_full(&mut content)? != content.len() {
            return Err(cut(at));
        }
        self.filler = filler(header.size);
        self.skip_pending()?;
        Ok(content)
    }

    /// Reads a header of all further members, which must not change their names and sizes.
    fn global(&mut self, header: &Header<'_>) -> Result<()> {
        if Records::parse(&self.content(header, MAX_PAX)?)?.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported("a pax header gives all further members the same name or size"))
    }

    fn entry(&mut self, header: &Header<'_>, long_name: Option<Vec<u8>>, pax: Records) -> Result<Entry> {
        let stated = pax.path.or(long_name).unwrap_or_else(|| header.name());
        let name = checked_name(&stated)?;
        if pax.sparse {
            return Err(Error::unsupported(format!("'{name}' is a sparse file in a form that is not read"))
                .hint("make the archive with tar --format=oldgnu, or without --sparse"));
        }
        let (kind, stored) = match header.kind {
            // Archives from before POSIX have no flag for directories.
            Kind::File if name.ends_with('/') => (Kind::Directory, header.size),
            kind => (kind, pax.size.unwrap_or(header.size)),
        };
        if stored > 0 && matches!(kind, Kind::Directory | Kind::Link | Kind::Special) {
            return Err(Error::malformed(format!(
                "'{name}' is {}, but has {stored} bytes of content",
                kind.name()
            )));
        }
        let (mut size, mut runs) = (stored, Vec::new());
        if kind == Kind::Sparse {
            (size, runs) = self.sparse(header, stored)?;
        }
        let start = self.blocks.position();
        let mut stored = stored;
        if let Some(left) = self.blocks.left().filter(|left| *left < stored) {
            if !self.salvages || kind != Kind::File {
                return Err(cut(start));
            }
            self.notes.push(format!("'{name}' was cut: {left} of its {stored} bytes are left"));
            (stored, size, self.ended, self.cut) = (left, left, true, Some(name.clone()));
        }
        (self.pending, self.filler) = (stored, filler(stored));
        let form = if self.has_pax { "pax" } else { header.form() };
        Ok(Entry { name, kind, form, start, stored, size, runs })
    }

    /// Reads the map of a sparse file. Returns the length of the file and its runs of data.
    fn sparse(&mut self, header: &Header<'_>, stored: u64) -> Result<(u64, Vec<Run>)> {
        let mut map = Map::begin(header)?;
        let mut block = [0; BLOCK];
        while map.continues {
            let at = self.blocks.position();
            if self.blocks.read_full(&mut block)? != BLOCK {
                return Err(cut(at));
            }
            map.push_block(&block)?;
        }
        Ok((map.real_size, map.finish(stored)?))
    }

    /// Skips the rest of the current member. The bytes that fill its last block may be missing at the end.
    fn skip_pending(&mut self) -> Result<()> {
        let (at, pending) = (self.blocks.position(), std::mem::take(&mut self.pending));
        if self.blocks.skip(pending)? < pending {
            return Err(cut(at));
        }
        self.blocks.skip(std::mem::take(&mut self.filler)).map(drop)
    }
}

/// Returns the number of bytes that fill the last block of a content.
fn filler(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn cut(at: u64) -> Error {
    Error::corrupt("the archive ends within a member")
        .at(at)
        .hint("the file is cut short: copy it again, or use a backup")
}

/// Returns a name without `./`.
///
/// # Errors
/// `Malformed` for a name that leads out of the archive.
pub(crate) fn checked_name(name: &[u8]) -> Result<String> {
    let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default());
    let mut inner = &*name;
    while let Some(rest) = inner.strip_prefix("./") {
        inner = rest.trim_start_matches('/');
    }
    if name.starts_with('/') || inner.split('/').any(|part| part == "..") {
        return Err(Error::refused(format!("the name of the member '{name}' leads out of the archive"))
            .hint("nobody makes such an archive by mistake: don't trust it"));
    }
    if inner.is_empty() && !name.starts_with('.') {
        return Err(Error::malformed("a member has no name"));
    }
    Ok(inner.to_owned())
}
