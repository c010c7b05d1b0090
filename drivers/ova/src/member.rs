//! [`MemberStream`], a raw disk in a tar archive that is read in one pass, such as the `disk.raw` of Google
//! Compute Engine from a pipe or a `.tar.gz`.

use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Error, ImageInfo, ImageSource, Input, OpenOptions, Piece, Result,
    StreamAccess,
};

use crate::disk_archive::DISK_NAME;
use crate::disks;
use crate::source::{PackageSource, add_formats, describe_archive};
use crate::stream::Tape;
use crate::tar::{Entry, Run, Walker};

/// Length in bytes of a piece.
const PIECE: u64 = 1 << 20;

/// Maximum length in bytes of a piece of zeros.
const ZEROS: u64 = 1 << 30;

/// Maximum number of names that are kept for a message. Our limit: a person reads no more.
const MAX_NAMES: usize = 16;

/// Opens the member of this name in a stream, and reads the archive to its end with it. Only a raw disk is
/// read in one pass; another image is copied to temporary storage, without the rest of the archive.
///
/// # Errors
/// `Usage` if there is no such member; any error of opening it.
pub(crate) fn open(input: Input, wanted: &str, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let location = input.location().clone();
    let mut walker = Walker::new(Tape::passing(input.into_stream()?));
    let mut names = Vec::new();
    let entry = loop {
        let Some(entry) = walker.next()? else { return Err(disks::no_member(wanted, &names)) };
        if entry.kind.is_file() && is_meant(&entry.name, wanted) {
            break entry;
        }
        if entry.kind.is_file() && names.len() < MAX_NAMES {
            names.push(entry.name);
        }
    };
    let name = entry.name.clone();
    let info = ImageInfo { format: crate::TAR, ..ImageInfo::default() };
    let (info, pass) = Pass::new(walker, entry, Conflict::SameName(wanted.to_owned()), info);
    if disks::is_raw_name(&name) {
        return Ok(Arc::new(MemberStream { info, pass: Mutex::new(pass) }));
    }
    let pass = Arc::new(Mutex::new(pass));
    let reader = Reader { pass: Arc::clone(&pass), piece: None, pool: BufferPool::new() };
    let saved = options.externals.saved(Input::from_reader(location, Box::new(reader))?)?;
    Ok(Arc::new(PackageSource::of_member(saved, &name, options)?))
}

/// True if `head` begins an archive whose first file is a disk for Google Compute Engine.
pub(crate) fn begins_with_disk(head: &[u8]) -> bool {
    let first = Walker::new(head).next().ok().flatten();
    first.is_some_and(|entry| entry.kind.is_file() && entry.name == DISK_NAME)
}

/// Opens an archive in a stream that holds one disk. One that begins otherwise is copied to temporary storage,
/// as is a damaged one.
///
/// # Errors
/// If the archive can't be opened, or can't be copied where that is necessary.
pub(crate) fn open_only(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    if options.salvage || !begins_with_disk(&input.head()?) {
        let input = options.externals.saved(input)?;
        return Ok(Arc::new(PackageSource::open(crate::TAR, input, options)?));
    }
    let mut walker = Walker::new(Tape::passing(input.into_stream()?));
    let entry = walker.next()?.ok_or_else(|| Error::corrupt("the archive is empty"))?;
    let mut info = ImageInfo { format: crate::TAR, ..ImageInfo::default() };
    describe_archive(&mut info, Some(entry.form), std::iter::once(&*entry.name));
    add_formats(&mut info, &["raw"]);
    let (info, pass) = Pass::new(walker, entry, Conflict::OtherDisk, info);
    Ok(Arc::new(MemberStream { info, pass: Mutex::new(pass) }))
}

/// A file behind the member that contradicts the pass.
enum Conflict {
    /// Another member of the name that the user chose.
    SameName(String),
    /// Another disk, where the archive has to hold one.
    OtherDisk,
}

impl Conflict {
    fn check(&self, entry: &Entry) -> Result<()> {
        match self {
            Self::SameName(wanted) if is_meant(&entry.name, wanted) => {
                Err(Error::malformed(format!("two members are called '{wanted}'"))
                    .at(entry.start)
                    .hint("save the archive to a file first, and choose the member with its directories"))
            }
            Self::OtherDisk if disks::is_disk_name(&entry.name) => Err(Error::unsupported(format!(
                "the archive holds another disk, '{}', and can't be read in one pass",
                entry.name
            ))
            .hint("save it to a file without compression first")),
            _ => Ok(()),
        }
    }
}

/// True if a member has the name that the user chose, with or without its directories.
fn is_meant(name: &str, wanted: &str) -> bool {
    name == wanted || name.rsplit('/').next() == Some(wanted)
}

/// A raw disk that is read in one pass.
struct MemberStream {
    info: ImageInfo,
    pass: Mutex<Pass>,
}

impl fmt::Debug for MemberStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemberStream").field("info", &self.info).finish_non_exhaustive()
    }
}

/// The one pass over a member, and then over the rest of the archive.
struct Pass {
    walker: Walker<Tape>,
    conflict: Conflict,
    /// Runs of data, ascending.
    runs: Vec<Run>,
    /// Index of the run that has the position, or is behind it.
    next_run: usize,
    position: u64,
    /// Length of the file in bytes.
    size: u64,
    ended: bool,
}

impl Pass {
    /// Creates the pass over the member that the walker has just met, and adds its device to the facts.
    fn new(walker: Walker<Tape>, entry: Entry, conflict: Conflict, mut info: ImageInfo) -> (ImageInfo, Self) {
        info.devices.push(Device::disk(0, disks::stem(&entry.name), entry.size));
        let runs = match entry.kind {
            crate::tar::Kind::Sparse => entry.runs,
            _ => vec![Run { start: 0, len: entry.size }],
        };
        let size = entry.size;
        (info, Self { walker, conflict, runs, next_run: 0, position: 0, size, ended: false })
    }

    /// Reads the rest of the archive: damage behind the member, or a file that contradicts the pass, is an error.
    fn end(&mut self) -> Result<()> {
        self.ended = true;
        while let Some(entry) = self.walker.next()? {
            if entry.kind.is_file() {
                self.conflict.check(&entry)?;
            }
        }
        Ok(())
    }

    /// Returns the run with the position, or the next one.
    fn run(&mut self) -> Option<Run> {
        while let Some(run) = self.runs.get(self.next_run) {
            // The sum was checked when the map was read.
            if run.start + run.len > self.position {
                return Some(*run);
            }
            self.next_run += 1;
        }
        None
    }
}

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.ended {
            return Err(second_pass());
        }
        let start = self.position;
        if start >= self.size {
            return self.end().map(|()| None);
        }
        let piece = match self.run() {
            Some(run) if run.start <= start => {
                // At most 1 MiB, so it fits.
                let len = (run.start + run.len - start).min(PIECE) as usize;
                let mut buffer = pool.take(len);
                // The walker knows the length of the member, which is that of all runs.
                if self.walker.read_content(&mut buffer)? < len {
                    return Err(Error::malformed("the map of a sparse file is longer than its data"));
                }
                Piece::data(DeviceId(0), start, buffer)
            }
            run => {
                let end = run.map_or(self.size, |run| run.start).min(self.size);
                Piece::zero(DeviceId(0), start, (end - start).min(ZEROS))
            }
        };
        self.position += piece.len;
        Ok(Some(piece))
    }

    fn in_order(&self) -> bool {
        true
    }
}

impl ImageSource for MemberStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }

    fn notes(&self) -> Vec<String> {
        lock(&self.pass).walker.notes().to_vec()
    }
}

/// Reads the bytes of a member.
struct Reader {
    pass: Arc<Mutex<Pass>>,
    /// The current piece, and the number of its bytes that were read.
    piece: Option<(Piece, u64)>,
    pool: BufferPool,
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.piece.as_ref().is_none_or(|(piece, taken)| *taken >= piece.len) {
            let mut pass = lock(&self.pass);
            if pass.ended {
                return Ok(0);
            }
            self.piece = pass.next_piece(&self.pool).map_err(io::Error::other)?.map(|piece| (piece, 0));
        }
        let Some((piece, taken)) = &mut self.piece else { return Ok(0) };
        let len = usize::try_from(piece.len - *taken).unwrap_or(usize::MAX).min(buf.len());
        match &piece.data {
            Some(data) => {
                // The data are in memory.
                let start = usize::try_from(*taken).map_err(io::Error::other)?;
                buf[..len].copy_from_slice(&data[start..start + len]);
            }
            None => buf[..len].fill(0),
        }
        *taken += len as u64;
        Ok(len)
    }
}
