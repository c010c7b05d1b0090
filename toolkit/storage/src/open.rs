//! Opens inputs: removes outer compression, spools streams, and identifies files.

use std::fs::File;
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use imgtool_core::input::{Consumed, InputBody, retry};
use imgtool_core::{CancelToken, Copied, Error, Input, Location, Memory, Result, Stream};

use crate::file::RandomFile;
use crate::identity::Identity;
use crate::image_lock::Sharing;
use crate::os::{self, FileClass};
use crate::outer::{self, Compression};
use crate::spool;
use crate::watch::FileWatch;

/// Maximum number of layers of outer compression. Our limit: a second layer is probably a mistake, a fifth an
/// attack.
const MAX_LAYERS: usize = 4;

/// Maximum ratio of plain to compressed length for [`OpenInput::spool_for_facts`]. Our limit: disk images
/// rarely compress beyond 20:1; bombs reach 1000:1 (gzip) to 1,000,000:1 (bzip2).
const MAX_EXPANSION: u64 = 256;

/// Plain length in bytes that [`OpenInput::spool_for_facts`] accepts at any ratio. Our limit: decompressing
/// this much takes a few seconds.
const ALWAYS_SPOOLED: u64 = 2 << 30;

/// Treatment of outer compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Remove compression detected by its magic number.
    ByContent,
    /// Remove as many layers as the file name has extensions of compressions: one for "disk.raw.gz". This is
    /// for raw images: any content is legal in them, so a magic number proves nothing.
    ByName,
    /// Leave the bytes unchanged.
    Plain,
}

/// An open input, with the facts about its file.
#[derive(Debug)]
pub struct OpenInput {
    /// The input, without the layers in `compression`.
    pub input: Input,
    /// Removed layers of outer compression, outermost first.
    pub compression: Vec<Compression>,
    /// Length in bytes of the file or block device, before decompression; `None` for a stream.
    pub stored_len: Option<u64>,
    /// True if a stream was copied to temporary storage ([`OpenInput::spool`]).
    pub spooled: bool,
    /// Identity of the file or block device; `None` for anything else.
    pub identity: Option<Identity>,
    /// Watch over a regular file or block device; `None` for anything else.
    pub watch: Option<FileWatch>,
    /// Ledger from which decoders and caches borrow.
    pub memory: Memory,
}

/// Opens a path or standard input. Decoders and caches borrow from `memory`. Refuses a file that another program
/// may write, and locks the file so that none starts meanwhile.
///
/// # Errors
/// If the location can't be opened, is a directory or a terminal, or is an invalid compressed file;
/// [`imgtool_core::ErrorKind::Unsupported`] for every URL; [`imgtool_core::ErrorKind::Refused`] if the file is in
/// use.
pub fn open(location: &Location, opening: Opening, memory: &Memory) -> Result<OpenInput> {
    open_shared(location, opening, memory, Sharing::Refused)
}

/// Like [`open`], with another treatment of a file that is in use.
///
/// # Errors
/// Same as [`open`].
pub fn open_shared(
    location: &Location,
    opening: Opening,
    memory: &Memory,
    sharing: Sharing,
) -> Result<OpenInput> {
    open_at(location, opening, memory, sharing).map_err(|e| e.path(location))
}

fn open_at(location: &Location, opening: Opening, memory: &Memory, sharing: Sharing) -> Result<OpenInput> {
    let plain = match location {
        Location::Stdin => open_stdin(memory, sharing)?,
        Location::Path(path) => open_path(path, memory, sharing)?,
        Location::Url(url) => {
            return Err(Error::unsupported(format!("{}:// is not supported yet", url.scheme()))
                .hint("copy it to a file first, or pipe it in with curl or nbdcopy"));
        }
        _ => return Err(Error::usage("is not an input")),
    };
    plain.opened(opening)
}

/// Opens an input that is no file, such as one behind a URL. Decoders and caches borrow from `memory`.
///
/// # Errors
/// If it is an invalid compressed file.
pub fn from_input(input: Input, opening: Opening, memory: &Memory) -> Result<OpenInput> {
    let (location, stored_len) = (input.location().clone(), input.len());
    let open = OpenInput { stored_len, ..OpenInput::of(input).borrowing(memory) };
    open.opened(opening).map_err(|e| e.path(location))
}

fn open_path(path: &Path, memory: &Memory, sharing: Sharing) -> Result<OpenInput> {
    let file = File::open(path).map_err(|e| Error::io("open", e))?;
    from_file(Location::from(path), file, memory, sharing)
}

fn open_stdin(memory: &Memory, sharing: Sharing) -> Result<OpenInput> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(Error::usage("standard input is a terminal")
            .hint("pipe an image into the program, or name a file"));
    }
    let owned = stdin.as_fd().try_clone_to_owned().map_err(|e| Error::io("open", e))?;
    let mut file = File::from(owned);
    let at_start = file.stream_position().is_ok_and(|position| position == 0);
    if at_start {
        // The shell may keep standard input open, and its locks with it: another open file has its own.
        let own = File::open(os::path_of(&file)).ok().filter(|own| is_same_file(own, &file));
        return from_file(Location::Stdin, own.unwrap_or(file), memory, sharing);
    }
    let identity = Identity::of_file(&file);
    let file = Arc::new(file);
    let watch = FileWatch::start(&Location::Stdin, &file, sharing)?;
    let input = Input::from_reader(Location::Stdin, Box::new(file))?;
    Ok(OpenInput { identity, watch, ..OpenInput::of(input).borrowing(memory) })
}

/// True if both are the same regular file or block device.
fn is_same_file(one: &File, other: &File) -> bool {
    let identity = |file: &File| Identity::of_file(file).and_then(|identity| identity.id());
    identity(one).is_some_and(|id| identity(other) == Some(id))
}

/// Creates an input over the plain bytes of an open file.
///
/// # Errors
/// If the file is a directory, is in use, its length can't be determined or, for a stream, its first bytes can't
/// be read.
pub fn from_file(location: Location, file: File, memory: &Memory, sharing: Sharing) -> Result<OpenInput> {
    let meta = file.metadata().map_err(|e| Error::io("open", e))?;
    match os::classify(&meta) {
        class @ (FileClass::Regular | FileClass::BlockDevice) => {
            let identity = Identity::of_file(&file);
            let file = Arc::new(file);
            // The watch begins before anything of the file is used, its length included.
            let watch = FileWatch::start(&location, &file, sharing)?;
            let Some(len) = measure(&file, class)? else {
                let input = Input::from_reader(location, Box::new(file))?;
                return Ok(OpenInput { identity, watch, ..OpenInput::of(input).borrowing(memory) });
            };
            let input = Input::from_read_at(location, Arc::new(RandomFile::new(file, len, memory)));
            let open = OpenInput::of(input).borrowing(memory);
            Ok(OpenInput { stored_len: Some(len), identity, watch, ..open })
        }
        FileClass::Stream => {
            Ok(OpenInput::of(Input::from_reader(location, Box::new(file))?).borrowing(memory))
        }
        FileClass::Directory => Err(Error::usage("is a directory, not an image")),
    }
}

/// Returns the length of an open file in bytes; `None` for a file that reports no length but contains bytes,
/// which must be read as a stream. Files of procfs do so, and files of some FUSE file systems.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Unsupported`] if the file contains more than any other length that it reports.
fn measure(file: &File, class: FileClass) -> Result<Option<u64>> {
    let file_len = || os::file_len(file).map_err(|e| Error::io("find the length", e));
    let len = file_len()?;
    // The largest offset: the kernel refuses to read there, and no file contains more.
    const END: u64 = i64::MAX as u64;
    let contains_more = class == FileClass::Regular
        && len < END
        && retry(|| os::read_at(file, &mut [0], len)).map_err(|e| Error::io("read", e).at(len))? > 0;
    if !contains_more {
        return Ok(Some(len));
    }
    match file_len()? {
        // Another process appended to the file between the calls.
        grown if grown > len => Ok(Some(grown)),
        0 => Ok(None),
        _ => Err(Error::unsupported(format!("the file reports {len} bytes but contains more"))
            .at(len)
            .hint("its file system reports a wrong length; copy it with cat and convert the copy")),
    }
}

impl OpenInput {
    /// Wraps an input without any facts about its file, and with a ledger of its own.
    pub fn of(input: Input) -> Self {
        Self {
            input,
            compression: Vec::new(),
            stored_len: None,
            spooled: false,
            identity: None,
            watch: None,
            memory: Memory::default(),
        }
    }

    /// Lets decoders and caches borrow from `memory`.
    #[must_use]
    pub fn borrowing(self, memory: &Memory) -> Self {
        Self { memory: memory.clone(), ..self }
    }

    /// Removes the layers of compression that `opening` says.
    fn opened(self, opening: Opening) -> Result<Self> {
        match opening {
            Opening::ByContent => self.decompressed(),
            Opening::ByName => self.decompressed_by_name(),
            Opening::Plain => Ok(self),
        }
    }

    /// Removes all layers of outer compression that have a known magic number.
    ///
    /// # Errors
    /// If the start of the compressed file is invalid; [`imgtool_core::ErrorKind::LimitExceeded`] for too
    /// many layers.
    pub fn decompressed(self) -> Result<Self> {
        let open = self.without_layers(MAX_LAYERS)?;
        match outer::detect(&open.input.head()?) {
            Some(_) => Err(too_many_layers()),
            None => Ok(open),
        }
    }

    /// Like [`OpenInput::decompressed`], but removes no more layers than the file name names, if it names any: for
    /// images that begin with the bytes of their disk, which may look like any compression.
    ///
    /// # Errors
    /// Same as [`OpenInput::decompressed`].
    pub fn decompressed_to_disk(self) -> Result<Self> {
        match outer::layers_by_name(self.input.location()).len() {
            0 => self.decompressed(),
            named if named > MAX_LAYERS => Err(too_many_layers()),
            named => self.without_layers(named),
        }
    }

    /// Removes the outermost layers of compression, at most `count`.
    ///
    /// # Errors
    /// If the start of the compressed file is invalid.
    pub fn without_layers(mut self, count: usize) -> Result<Self> {
        while self.compression.len() < count
            && let Some(compression) = outer::detect(&self.input.head()?)
        {
            self.input = undo(compression, self.input, &self.memory)?;
            self.compression.push(compression);
        }
        Ok(self)
    }

    /// Removes as many layers of compression as the file name names; see [`Opening::ByName`].
    fn decompressed_by_name(self) -> Result<Self> {
        let named = outer::layers_by_name(self.input.location());
        if named.len() > MAX_LAYERS {
            return Err(too_many_layers());
        }
        let open = self.without_layers(named.len())?;
        match named.get(open.compression.len()) {
            Some(missing) => Err(outer::misnamed(*missing)),
            None => Ok(open),
        }
    }

    /// Makes reads fail once the token is cancelled; see [`Input::cancelled_by`].
    #[must_use]
    pub fn cancelled_by(self, cancel: CancelToken) -> Self {
        Self { input: self.input.cancelled_by(cancel), ..self }
    }

    /// Copies a stream to an unnamed temporary file in TMPDIR, so that it can be read by position. Returns
    /// any other input unchanged.
    pub fn spool(self) -> Result<Self> {
        self.spool_counted(&|_| ())
    }

    /// Like [`OpenInput::spool`]. Calls `copied` after each part.
    pub fn spool_counted(self, copied: &dyn Fn(Copied)) -> Result<Self> {
        self.spool_within(u64::MAX, copied)
    }

    /// Like [`OpenInput::spool`], for a caller that needs only facts about an image: refuses a compressed
    /// file that expands to many times its length.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] for such a file; I/O errors.
    pub fn spool_for_facts(self) -> Result<Self> {
        let limit =
            self.stored_len.map_or(u64::MAX, |len| len.saturating_mul(MAX_EXPANSION).max(ALWAYS_SPOOLED));
        self.spool_within(limit, &|_| ())
    }

    fn spool_within(self, limit: u64, copied: &dyn Fn(Copied)) -> Result<Self> {
        if !self.input.is_stream() {
            return Ok(self);
        }
        let (location, cancel) = (self.input.location().clone(), self.input.cancel_token());
        let file = spool::spool(self.input.into_stream()?, limit, copied)?;
        let len = os::file_len(&file).map_err(|e| Error::io("find the length", e))?;
        let input =
            Input::from_read_at(location, Arc::new(RandomFile::new(Arc::new(file), len, &self.memory)));
        Ok(Self { input: input.cancelled_by(cancel), spooled: true, ..self })
    }
}

fn too_many_layers() -> Error {
    Error::limit(format!("more than {MAX_LAYERS} layers of compression"))
}

fn undo(compression: Compression, input: Input, memory: &Memory) -> Result<Input> {
    let (location, cancel) = (input.location().clone(), input.cancel_token());
    let body = input.into_body();
    if let InputBody::Random(source) = &body
        && let Some(seekable) = outer::open_seekable(compression, source, memory)
    {
        return Ok(Input::from_read_at(location, seekable).cancelled_by(cancel));
    }
    let stream = Input::from_body(&location, body).into_stream()?;
    // Inner layers count bytes of no file.
    let taken = Consumed::default();
    let consumed = if stream.is_decoded() { stream.consumed() } else { taken.clone() };
    let decoder = outer::decoder(compression, Box::new(stream), memory, taken)?;
    let stream = Stream::new(location.clone(), decoder, consumed)?;
    Ok(Input::from_stream(location, stream).cancelled_by(cancel))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn watches_a_file_that_reports_no_length() {
        let file = File::open("/proc/version").expect("open");
        let open = from_file(Location::from("/proc/version"), file, &Memory::default(), Sharing::Refused)
            .expect("a stream");
        assert!(open.input.is_stream());
        assert!(open.watch.is_some_and(|watch| watch.changes().is_empty()));
    }

    #[test]
    fn opens_the_longest_file() {
        let file = tempfile::tempfile_in("/dev/shm").expect("create");
        file.set_len(i64::MAX as u64).expect("a file system in memory allows it");
        let open =
            from_file(Location::from("longest"), file, &Memory::default(), Sharing::Refused).expect("open");
        assert_eq!(open.stored_len, Some(i64::MAX as u64));
    }
}
