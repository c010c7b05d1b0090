//! [`Files`], the files of a package: members of an archive, or files beside a descriptor.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use imgtool_core::external::is_plain_name;
use imgtool_core::{Error, Externals, Input, Location, Memory, RandomInput, Result};

use imgtool_machine::ovf::FileRef;

use crate::archive::{Archive, MAX_MEMBERS};
use crate::pieces::Pieces;

/// Maximum number of chunks of a file beside a descriptor: all of them are open at once. Our limit: a process
/// may have 1024 files by default.
const MAX_OPEN_CHUNKS: usize = 500;

/// Memory in bytes for an open chunk besides its name: its input, its piece, and its place in the list. Our
/// bound: 260 bytes were measured with 65,000 chunks.
const CHUNK_BYTES: u64 = 512;

/// The files of a package.
#[derive(Debug)]
pub(crate) enum Files {
    /// Members of a tar or zip archive.
    Archive(Box<Archive>),
    /// Files in the directory of the descriptor at this location.
    Folder(Location, Externals),
}

/// A file of a package, as it is stored. It stays open: a program may confine itself to the files that are
/// open.
#[derive(Debug)]
pub(crate) struct StoredFile {
    pub(crate) name: String,
    pub(crate) bytes: RandomInput,
}

impl Files {
    /// Opens a file by the name that the descriptor states; `None` if there is none.
    ///
    /// # Errors
    /// `Refused` for a name that is not that of a file in the package.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Input>> {
        match self {
            Self::Archive(archive) => archive.open_file(name),
            Self::Folder(descriptor, externals) => {
                if !is_plain_name(name) {
                    return Err(Error::refused(format!("the file '{name}' is not beside its descriptor"))
                        .path(descriptor));
                }
                let opened = externals.open_part("file", name, descriptor);
                opened.map(Some).or_else(|error| match error.io_error().map(io::Error::kind) {
                    Some(io::ErrorKind::NotFound) => Ok(None),
                    _ => Err(error),
                })
            }
        }
    }

    /// True if there is a file of this name. A compressed one is not unpacked for that.
    ///
    /// # Errors
    /// Same as [`Files::open`].
    fn contains(&self, name: &str) -> Result<bool> {
        match self {
            Self::Archive(archive) => Ok(archive.contains(name)),
            Self::Folder(..) => Ok(self.open(name)?.is_some()),
        }
    }

    /// Returns the name of a file that the descriptor lists: its reference as it is, or, if there is no such
    /// file, without the percent-encoding of a URI (DSP0243, 7.1; RFC 3986).
    ///
    /// # Errors
    /// Same as [`Files::open`].
    pub(crate) fn name_of<'f>(&self, file: &'f FileRef) -> Result<Cow<'f, str>> {
        let href = &*file.href;
        let stored = |name: &str| file.chunk_size.map_or_else(|| name.to_owned(), |_| chunk_name(name, 0));
        match percent_decoded(href) {
            Some(decoded) if !self.contains(&stored(href))? && self.contains(&stored(&decoded))? => {
                Ok(Cow::Owned(decoded))
            }
            _ => Ok(Cow::Borrowed(href)),
        }
    }

    /// Opens a file that the descriptor names.
    ///
    /// # Errors
    /// `Corrupt` if it is missing.
    pub(crate) fn expect(&self, name: &str) -> Result<Input> {
        self.open(name)?.ok_or_else(|| missing(name))
    }

    /// True if the package does not contain a file that its descriptor lists.
    pub(crate) fn lacks(&self, file: &FileRef) -> bool {
        let name = self.name_of(file).unwrap_or(Cow::Borrowed(&file.href));
        let found = match file.chunk_size {
            Some(_) => self.contains(&chunk_name(&name, 0)),
            None => self.contains(&name),
        };
        // A file that may not be opened, such as a link, is there.
        matches!(found, Ok(false))
    }

    /// Opens a file that is split into chunks, `NAME.000000000` and so on. Returns it with the names and
    /// bytes of the chunks. The input holds the lease of their memory.
    ///
    /// # Errors
    /// `Corrupt` if the first chunk is missing; `LimitExceeded` for too many.
    pub(crate) fn expect_chunks(&self, name: &str, memory: &Memory) -> Result<(Input, Vec<StoredFile>)> {
        const CHUNKS: &str = "the chunks of a file";
        let most = match self {
            Self::Archive(_) => MAX_MEMBERS,
            Self::Folder(..) => MAX_OPEN_CHUNKS,
        };
        let first = self.expect(&chunk_name(name, 0))?;
        let (location, cancel) = (first.location().clone(), first.cancel_token());
        let mut lease = memory.lease(0, CHUNKS)?;
        let (mut pieces, mut chunks, mut next) = (Pieces::default(), Vec::new(), Some(first));
        while let Some(chunk) = next {
            if chunks.len() == most {
                return Err(Error::limit(format!("the file '{name}' has more than {most} chunks")));
            }
            lease.raise(lease.bytes() + CHUNK_BYTES + name.len() as u64, CHUNKS)?;
            let bytes = chunk.into_random()?;
            let source = pieces.source(bytes.clone().into())?;
            pieces.push(source, 0, bytes.len())?;
            chunks.push(StoredFile { name: chunk_name(name, chunks.len()), bytes });
            next = self.open(&chunk_name(name, chunks.len()))?;
        }
        pieces.hold(lease);
        Ok((Input::from_read_at(location, Arc::new(pieces)).cancelled_by(cancel), chunks))
    }
}

/// Returns the error for a file that the package lists and does not contain.
pub(crate) fn missing(name: &str) -> Error {
    Error::corrupt(format!("the file '{name}' is missing from the package"))
        .hint("the package is incomplete: export or copy it again")
}

/// Returns a reference without its percent-encoding; `None` if it has none, or is no text then. The result is
/// as untrusted as the reference.
fn percent_decoded(href: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(href.len());
    let mut rest = href.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        let is_code = |code: &&str| code.bytes().all(|digit| digit.is_ascii_hexdigit());
        match code.filter(is_code).and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8(bytes).ok().filter(|decoded| decoded != href)
}

/// Returns the name of a chunk (DSP0243, 7.1).
fn chunk_name(name: &str, number: usize) -> String {
    format!("{name}.{number:09}")
}

/// Reads a small file of a package. `role` names it in the error.
///
/// # Errors
/// `LimitExceeded` if it is longer than `most` bytes.
pub(crate) fn read_small(input: Input, most: u64, role: &str) -> Result<Vec<u8>> {
    let input = input.into_random()?;
    if input.len() > most {
        return Err(Error::limit(format!("{role} has {} bytes; the limit is {most}", input.len())));
    }
    // At most a few MiB, so it fits.
    input.read_vec(0, input.len() as usize)
}
