//! Inputs: a file that is read by position, or a stream that is read once.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::os::{self, FileClass, FileRun};
use super::outer::{self, Certain, Compression, Decode};
use super::runs::Runs;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, ExtentList};
use crate::progress::CancelToken;

/// Bytes of an image that a driver's probe sees. Ours: every magic number lies in the first 4 KiB.
pub const PROBE_LEN: usize = 4096;

/// Layers of outer compression that are undone. Ours: more than one is a mistake, more than this a trap.
const MAX_LAYERS: usize = 4;

/// What is read at once where not all can be read: a page, in which a system reads disks.
const SALVAGE_SECTOR: u64 = 4096;
/// How many times its length a compressed file may expand to where only facts are wanted. Ours: disk
/// images are rarely compressed beyond 20:1; a bomb is by 1000:1 (gzip) to a million to one (bzip2).
const MOST_EXPANSION: u64 = 256;

/// What a file may expand to in any case then: decompressed in a few seconds.
const FREELY_SPOOLED: u64 = 2 << 30;

/// Bytes that can be read by position.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` from `position`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the range leaves the input.
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The run of data or hole around `position`, which is below the length.
    ///
    /// # Errors
    /// When the system can't tell.
    fn run(&self, _position: u64) -> io::Result<FileRun> {
        Ok(FileRun { end: self.len(), is_data: true })
    }

    /// The run around `position`, or the part of it up to `until`; what is a hole may be called data
    /// if there is data too before `until`. For who can do without the exact answer where it is costly.
    ///
    /// # Errors
    /// Those of [`ReadAt::run`].
    fn rough_run(&self, position: u64, _until: u64) -> io::Result<FileRun> {
        self.run(position)
    }

    /// Reading costs least in multiples of this many bytes.
    fn granule(&self) -> u64 {
        1
    }

    /// The file, when the bytes stand in one as they are.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// A regular file or block device.
struct RandomFile {
    file: File,
    len: u64,
    runs: Runs,
    lives_in_memory: bool,
    /// What was read leaves the page cache at once: so large a file would push out all else.
    is_passing: bool,
}

impl RandomFile {
    fn new(file: File, len: u64) -> Self {
        let lives_in_memory = os::lives_in_memory(&file);
        let is_passing = !lives_in_memory && os::memory_len().is_some_and(|memory| len > memory / 2);
        Self { file, len, runs: Runs::default(), lives_in_memory, is_passing }
    }
}

impl ReadAt for RandomFile {
    fn read_exact_at(&self, mut buf: &mut [u8], mut position: u64) -> io::Result<()> {
        let (start, len) = (position, buf.len() as u64);
        while !buf.is_empty() {
            match os::read_at(&self.file, buf, position) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buf = &mut buf[count..];
                    position += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.is_passing {
            os::forget_range(&self.file, start, len);
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        self.runs.find(&self.file, self.len, position)
    }

    fn rough_run(&self, position: u64, until: u64) -> io::Result<FileRun> {
        if !self.lives_in_memory {
            return self.run(position);
        }
        let data = os::next_data(&self.file, position, self.len)?;
        let is_data = data < until;
        Ok(FileRun { end: if is_data { until.min(self.len) } else { data }, is_data })
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

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
                let stream = Stream::plain(self.path, Box::new(Cursor { source, position: 0 }))?;
                Ok(Stream { cancel: self.cancel, ..stream })
            }
        }
    }
}

/// An input that is read by position; cloning shares it.
#[derive(Clone)]
pub struct RandomInput {
    path: PathBuf,
    source: Arc<dyn ReadAt>,
    cancel: CancelToken,
}

impl RandomInput {
    /// The name for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.source.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `position`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] when the file ends before; [`crate::ErrorKind::Io`];
    /// [`crate::ErrorKind::Cancelled`].
    pub fn read_exact_at(&self, buf: &mut [u8], position: u64) -> Result<()> {
        self.cancel.check()?;
        let fits = position.checked_add(buf.len() as u64).is_some_and(|end| end <= self.len());
        if !fits {
            let needed = match buf.len() {
                1 => format!("the byte at {position} is needed"),
                len => format!("{len} bytes from {position} are needed"),
            };
            return Err(Error::corrupt(format!("the file ends at {}, but {needed}", self.len()))
                .path(&self.path)
                .at(position)
                .hint("the file is cut short: copy it again, or use a backup"));
        }
        self.source.read_exact_at(buf, position).map_err(|e| read_error(e, &self.path, position))
    }

    /// Fills `buf` from `position` with what can be read, sector by sector where all of it can't, and
    /// with zeros for the rest, of which `lost` is told: bytes of `buf`, and why.
    pub fn read_what_is_there(
        &self,
        buf: &mut [u8],
        position: u64,
        mut lost: impl FnMut(Range<usize>, Error),
    ) {
        let there = usize::try_from(self.len().saturating_sub(position)).unwrap_or(usize::MAX).min(buf.len());
        let mut done = 0;
        while done < there {
            let at = position + done as u64;
            // Below a sector.
            let len = (SALVAGE_SECTOR - at % SALVAGE_SECTOR) as usize;
            let part = done..done.saturating_add(len).min(there);
            if let Err(e) = self.read_exact_at(&mut buf[part.clone()], at) {
                // Nothing more is going to be read: the rest is one loss.
                let part = if e.kind() == ErrorKind::Cancelled { done..buf.len() } else { part.clone() };
                buf[part.clone()].fill(0);
                lost(part.clone(), e);
                done = part.end;
                continue;
            }
            done = part.end;
        }
        if there < buf.len() {
            // The words for a range that leaves the file.
            if let Err(e) = self.read_exact_at(&mut buf[there..], position.saturating_add(there as u64)) {
                buf[there..].fill(0);
                lost(there..buf.len(), e);
            }
        }
    }

    /// `len` bytes from `position`, which the caller has bounded.
    ///
    /// # Errors
    /// Those of [`RandomInput::read_exact_at`].
    pub fn read_vec(&self, position: u64, len: usize) -> Result<Vec<u8>> {
        if position.checked_add(len as u64).is_none_or(|end| end > self.len()) {
            self.read_exact_at(&mut [0], position.saturating_add(len as u64))?;
        }
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, position)?;
        Ok(bytes)
    }

    /// The run of data or hole around `position`, which is below the length.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn run(&self, position: u64) -> Result<FileRun> {
        self.source.run(position).map_err(|e| read_error(e, &self.path, position))
    }

    /// The runs of data and holes of a part of the file, as a driver answers about a disk.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.extents_by(range, |position| self.run(position))
    }

    /// [`RandomInput::extents`] of what `run_at` says about the run at each position.
    ///
    /// # Errors
    /// Those of `run_at`.
    pub fn extents_by(
        &self,
        range: Range<u64>,
        run_at: impl Fn(u64) -> Result<FileRun>,
    ) -> Result<Vec<Extent>> {
        let mut extents = ExtentList::new();
        let mut position = range.start;
        while position < range.end && !extents.is_full() {
            let run = run_at(position)?;
            let end = run.end.min(range.end);
            let kind = if run.is_data { ExtentKind::Data } else { ExtentKind::Hole };
            extents.push(position, end - position, kind);
            position = end;
        }
        Ok(extents.into_vec())
    }

    /// The run around `position`, or the part of it up to `until`; what is a hole may be called data
    /// if there is data too before `until`. For who reads that part in one go anyway: on some file
    /// systems the exact answer is costly.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn rough_run(&self, position: u64, until: u64) -> Result<FileRun> {
        self.source.rough_run(position, until).map_err(|e| read_error(e, &self.path, position))
    }

    /// Reading costs least in multiples of this many bytes.
    pub fn granule(&self) -> u64 {
        self.source.granule()
    }

    /// The file, when the bytes stand in one as they are.
    pub fn file(&self) -> Option<&File> {
        self.source.file()
    }
}

/// An input that is read once, in order.
pub struct Stream {
    path: PathBuf,
    /// Never locked: the mutex only makes the stream `Sync`, so that sources may hold one.
    reader: Mutex<Box<dyn Decode>>,
    /// The first bytes, read ahead for probing.
    head: Vec<u8>,
    position: u64,
    cancel: CancelToken,
}

impl Stream {
    fn plain(path: PathBuf, reader: Box<dyn Read + Send>) -> Result<Self> {
        Self::new(path, Box::new(Certain(reader)))
    }

    fn new(path: PathBuf, mut reader: Box<dyn Decode>) -> Result<Self> {
        let mut head = vec![0; PROBE_LEN];
        let filled = fill(&mut *reader, &mut head).map_err(|e| read_error(e, &path, 0))?;
        head.truncate(filled);
        Ok(Self { path, reader: Mutex::new(reader), head, position: 0, cancel: CancelToken::new() })
    }

    /// The name for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Fills as much of `buf` as there is; less than all only at the end.
    ///
    /// # Errors
    /// When reading or decompressing fails.
    pub fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let position = self.position;
        fill(self, buf).map_err(|e| read_error(e, &self.path, position))
    }

    /// Up to where the content is known to be right, because a checksum of the compression said so or
    /// there is none. What lies between this and [`Stream::position`] may be found wrong later.
    pub fn checked_until(&mut self) -> u64 {
        let given = self.position.max(self.head.len() as u64);
        given.saturating_sub(self.decoder().unchecked())
    }

    /// Whether the last read failed only because the compressed data ended early: then what was read
    /// before is right.
    pub fn was_cut(&mut self) -> bool {
        self.decoder().was_cut()
    }

    /// After a failed read: goes on where decompressing can begin anew, at the next frame or member;
    /// false when there is none. What is read then follows the fault, at a distance that nobody knows;
    /// what was not checked before it is given up.
    ///
    /// # Errors
    /// When reading fails.
    pub fn resume(&mut self) -> Result<bool> {
        let position = self.position;
        self.decoder().resume().map_err(|e| read_error(e, &self.path, position))
    }

    fn decoder(&mut self) -> &mut dyn Decode {
        &mut **self.reader.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        let from_head = usize::try_from(self.position).ok().and_then(|at| self.head.get(at..)).unwrap_or(&[]);
        let count = if from_head.is_empty() {
            self.reader.get_mut().unwrap_or_else(PoisonError::into_inner).read(buf)?
        } else {
            let count = from_head.len().min(buf.len());
            buf[..count].copy_from_slice(&from_head[..count]);
            count
        };
        self.position += count as u64;
        Ok(count)
    }
}

/// Reads a random input in order.
struct Cursor {
    source: Arc<dyn ReadAt>,
    position: u64,
}

impl Read for Cursor {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.source.len().saturating_sub(self.position);
        let count = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.source.read_exact_at(&mut buf[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

fn fill(reader: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match reader.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// A failed read: decoders report damage as `InvalidData` or `UnexpectedEof`.
fn read_error(e: io::Error, path: &Path, position: u64) -> Error {
    if let Some(refusal) = outer::Refusal::within(&e) {
        return refusal.path(path);
    }
    let cancelled = |inner: &Error| inner.kind() == ErrorKind::Cancelled;
    if e.get_ref().and_then(|inner| inner.downcast_ref()).is_some_and(cancelled) {
        return Error::cancelled("interrupted");
    }
    let damaged = matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
    let error = if damaged {
        let text = e.to_string();
        Error::corrupt(if text.is_empty() { "the file ends early".to_owned() } else { text })
            .hint("copy it again, or use a backup; --salvage restores what is whole of an archive")
    } else {
        Error::io("read", e)
    };
    error.path(path).at(position)
}
