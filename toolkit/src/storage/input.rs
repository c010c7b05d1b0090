//! Inputs: a file that is read by position, or a stream that is read once.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::os::{self, FileClass};
use super::outer::{self, Compression};
use crate::error::{Error, Result};
use crate::progress::CancelToken;

mod random;
mod read_at;
mod stream;

pub use random::RandomInput;
use read_at::RandomFile;
pub use read_at::ReadAt;
pub use stream::Stream;
use stream::{Cursor, read_error};

/// Bytes of an image that a driver's probe sees. Ours: every magic number lies in the first 4 KiB.
pub const PROBE_LEN: usize = 4096;

/// Layers of outer compression that are undone. Ours: more than one is a mistake, more than this a trap.
const MAX_LAYERS: usize = 4;

/// How many times its length a compressed file may expand to where only facts are wanted. Ours: disk
/// images are rarely compressed beyond 20:1; a bomb is by 1000:1 (gzip) to a million to one (bzip2).
const MOST_EXPANSION: u64 = 256;

/// What a file may expand to in any case then: decompressed in a few seconds.
const FREELY_SPOOLED: u64 = 2 << 30;

/// What an image is read from.
pub struct Input {
    path: PathBuf,
    compression: Vec<Compression>,
    stored_len: Option<u64>,
    spooled: bool,
    cancel: CancelToken,
    body: Body,
}

enum Body {
    Random(Arc<dyn ReadAt>),
    Stream(Stream),
}

/// How outer compression is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outer {
    ByContent,
    ByName,
    Plain,
}

impl Input {
    /// Opens a path, or standard input for `-`; undoes outer compression found by content.
    ///
    /// # Errors
    /// When the file can't be opened, is a directory, or is no valid compressed file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_outer(path, Outer::ByContent).map_err(|e| e.path(path))
    }

    /// Like [`Input::open`], for a format in which anything is legal (raw): compression is undone
    /// only when the file's name says that it is compressed, so that the content decides nothing.
    ///
    /// # Errors
    /// Those of [`Input::open`].
    pub fn open_unguessed(path: &Path) -> Result<Self> {
        Self::open_outer(path, Outer::ByName).map_err(|e| e.path(path))
    }

    /// Opens a path and takes the bytes as they are.
    ///
    /// # Errors
    /// When the file can't be opened or is a directory.
    pub fn open_plain(path: &Path) -> Result<Self> {
        Self::open_outer(path, Outer::Plain).map_err(|e| e.path(path))
    }

    /// An input over bytes that a caller provides: a network object, memory in a test.
    pub fn from_read_at(path: impl Into<PathBuf>, source: Arc<dyn ReadAt>) -> Self {
        let len = source.len();
        Self {
            path: path.into(),
            compression: Vec::new(),
            stored_len: Some(len),
            spooled: false,
            cancel: CancelToken::new(),
            body: Body::Random(source),
        }
    }

    /// An input over a stream that a caller provides; outer compression is undone.
    ///
    /// # Errors
    /// When its first bytes can't be read, or are no valid compressed file.
    pub fn from_stream(path: impl Into<PathBuf>, reader: Box<dyn Read + Send>) -> Result<Self> {
        let path = path.into();
        let stream = Stream::plain(path.clone(), reader)?;
        Self {
            path,
            compression: Vec::new(),
            stored_len: None,
            spooled: false,
            cancel: CancelToken::new(),
            body: Body::Stream(stream),
        }
        .decompressed()
    }

    fn open_outer(path: &Path, outer: Outer) -> Result<Self> {
        let input = if path == Path::new("-") { Self::open_stdin()? } else { Self::open_file(path)? };
        let undo = match outer {
            Outer::ByContent => true,
            Outer::ByName => outer::by_name(path).is_some(),
            Outer::Plain => false,
        };
        if undo { input.decompressed() } else { Ok(input) }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("open", e))?;
        if os::classify(&meta) == FileClass::Directory {
            return Err(Error::usage("is a directory, not an image"));
        }
        let file = File::open(path).map_err(|e| Error::io("open", e))?;
        Self::from_file(path.to_owned(), file)
    }

    fn open_stdin() -> Result<Self> {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(Error::usage("standard input is a terminal")
                .hint("pipe an image into the program, or name a file"));
        }
        #[cfg(unix)]
        {
            use std::os::fd::AsFd;
            let owned = stdin.as_fd().try_clone_to_owned().map_err(|e| Error::io("open", e))?;
            let mut file = File::from(owned);
            let at_start = file.stream_position().is_ok_and(|position| position == 0);
            let name = PathBuf::from("-");
            if at_start {
                return Self::from_file(name, file);
            }
            let stream = Stream::plain(name.clone(), Box::new(file))?;
            Ok(Self {
                path: name,
                compression: Vec::new(),
                stored_len: None,
                spooled: false,
                cancel: CancelToken::new(),
                body: Body::Stream(stream),
            })
        }
        #[cfg(not(unix))]
        {
            let name = PathBuf::from("-");
            let stream = Stream::plain(name.clone(), Box::new(stdin))?;
            Ok(Self {
                path: name,
                compression: Vec::new(),
                stored_len: None,
                spooled: false,
                cancel: CancelToken::new(),
                body: Body::Stream(stream),
            })
        }
    }

    /// An input over an open file, taken as it is.
    ///
    /// # Errors
    /// When its length can't be found or, for a stream, its first bytes can't be read.
    pub fn from_file(path: PathBuf, file: File) -> Result<Self> {
        let meta = file.metadata().map_err(|e| Error::io("open", e))?;
        let (stored_len, body) = match os::classify(&meta) {
            FileClass::Regular | FileClass::BlockDevice => {
                let len = os::file_len(&file).map_err(|e| Error::io("find the length", e))?;
                (Some(len), Body::Random(Arc::new(RandomFile::new(file, len))))
            }
            FileClass::Stream => (None, Body::Stream(Stream::plain(path.clone(), Box::new(file))?)),
            FileClass::Directory => return Err(Error::usage("is a directory, not an image")),
        };
        Ok(Self {
            path,
            compression: Vec::new(),
            stored_len,
            spooled: false,
            cancel: CancelToken::new(),
            body,
        })
    }

    /// Undoes outer compression found by content.
    ///
    /// # Errors
    /// When it is no valid compressed file.
    pub fn decompressed(mut self) -> Result<Self> {
        while let Some(compression) = outer::detect(&self.head()?) {
            if self.compression.len() >= MAX_LAYERS {
                return Err(Error::limit(format!("compressed more than {MAX_LAYERS} times over")));
            }
            let path = self.path.clone();
            self.body = match self.body {
                Body::Random(source) => match outer::open_seekable(compression, &source) {
                    Some(seekable) => Body::Random(seekable),
                    None => Body::Stream(Stream::new(
                        path.clone(),
                        outer::decoder(compression, Box::new(Cursor { source, position: 0 }))?,
                    )?),
                },
                Body::Stream(stream) => {
                    Body::Stream(Stream::new(path.clone(), outer::decoder(compression, Box::new(stream))?)?)
                }
            };
            self.compression.push(compression);
        }
        Ok(self)
    }

    /// Reading from it ends with [`crate::ErrorKind::Cancelled`] once the token is cancelled: so does
    /// opening, checking or measuring an image, whatever its driver does between two reads.
    #[must_use]
    pub fn cancelled_by(mut self, cancel: CancelToken) -> Self {
        if let Body::Stream(stream) = &mut self.body {
            stream.cancel = cancel.clone();
        }
        self.cancel = cancel;
        self
    }

    /// What it is [cancelled by](Self::cancelled_by): for drivers that go on where reading fails, and would
    /// take the end of it for damage.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// The name for messages: the path, or `-`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The layers of outer compression that are undone, outermost first.
    pub fn compression(&self) -> &[Compression] {
        &self.compression
    }

    /// Length in bytes after decompression, if it is known.
    pub fn len(&self) -> Option<u64> {
        match &self.body {
            Body::Random(source) => Some(source.len()),
            Body::Stream(_) => None,
        }
    }

    /// Whether it is known to be empty.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Length of the file itself in bytes, before decompression, if it is a file.
    pub fn stored_len(&self) -> Option<u64> {
        self.stored_len
    }

    /// Whether it can only be read once, in order.
    pub fn is_stream(&self) -> bool {
        matches!(self.body, Body::Stream(_))
    }

    /// Whether it was copied to temporary storage ([`Input::spool`]).
    pub fn is_spooled(&self) -> bool {
        self.spooled
    }

    /// The first bytes, up to [`PROBE_LEN`]; reading goes on from the start.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn head(&self) -> Result<Vec<u8>> {
        match &self.body {
            Body::Stream(stream) => Ok(stream.head.clone()),
            Body::Random(source) => {
                let len = usize::try_from(source.len()).unwrap_or(PROBE_LEN).min(PROBE_LEN);
                let mut head = vec![0; len];
                source.read_exact_at(&mut head, 0).map_err(|e| read_error(e, &self.path, 0))?;
                Ok(head)
            }
        }
    }

    /// Copies a stream to an unnamed temporary file (in TMPDIR), so that it can be read by position.
    ///
    /// # Errors
    /// When the stream can't be read or the copy can't be written.
    pub fn spool(self) -> Result<Self> {
        self.spool_within(u64::MAX)
    }

    /// [`Input::spool`] for a few facts about an image, not its content: a file that expands to many
    /// times its length is not decompressed to its end only for them.
    ///
    /// # Errors
    /// Those of [`Input::spool`]; [`crate::ErrorKind::LimitExceeded`].
    pub fn spool_for_facts(self) -> Result<Self> {
        let limit =
            self.stored_len.map_or(u64::MAX, |len| len.saturating_mul(MOST_EXPANSION).max(FREELY_SPOOLED));
        self.spool_within(limit)
    }

    fn spool_within(self, limit: u64) -> Result<Self> {
        match self.body {
            Body::Random(_) => Ok(self),
            Body::Stream(stream) => {
                let file = super::spool::spool(stream, limit)?;
                let len = os::file_len(&file).map_err(|e| Error::io("find the length", e))?;
                Ok(Self { spooled: true, body: Body::Random(Arc::new(RandomFile::new(file, len))), ..self })
            }
        }
    }

    /// The input by position.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a stream.
    pub fn into_random(self) -> Result<RandomInput> {
        match self.body {
            Body::Random(source) => Ok(RandomInput { path: self.path, source, cancel: self.cancel }),
            Body::Stream(_) => {
                Err(Error::unsupported("this format can't be read from a stream").path(self.path))
            }
        }
    }

    /// The input as a stream, from its start.
    ///
    /// # Errors
    /// When its first bytes can't be read.
    pub fn into_stream(self) -> Result<Stream> {
        match self.body {
            Body::Stream(stream) => Ok(stream),
            Body::Random(source) => {
                let mut stream = Stream::plain(self.path, Box::new(Cursor { source, position: 0 }))?;
                stream.cancel = self.cancel;
                Ok(stream)
            }
        }
    }
}
