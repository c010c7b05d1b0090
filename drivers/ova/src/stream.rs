//! [`PackageStream`], a package read in one pass from a pipe: descriptor and manifest are in front, and the
//! disks follow in the order of the descriptor.
//!
//! A pipe with anything else is copied to temporary storage, with what was read of it until that was known.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Cursor, Read};
use std::sync::{Arc, Mutex};

use imgtool_core::external::is_plain_name;
use imgtool_core::source::second_pass;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Error, ErrorKind, ImageInfo, ImageSource, Input, Location,
    OpenOptions, Piece, Result, ResultExt, Stream, StreamAccess,
};
use imgtool_machine::ovf::{self, Descriptor};

use crate::archive::MAX_MEMBERS;
use crate::disks;
use crate::manifest::{self, Hasher, Manifest};
use crate::source::{
    MAX_DESCRIPTOR, PackageSource, add_formats, describe, is_descriptor_name, needless_files, note_absent,
    with_extension,
};
use crate::tar::{Blocks, Entry, Kind, Walker};

/// Maximum number of bytes that are kept until it is known whether one pass suffices. Our limit: a
/// descriptor, a manifest, and the tables in front of a disk of 512 GiB.
const MAX_KEPT: usize = 8 << 20;

/// Opens a package in a pipe.
///
/// # Errors
/// If the package can't be opened, or can't be copied where that is necessary.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let (location, cancel) = (input.location().clone(), input.cancel_token());
    let lease = options.memory.lease(MAX_KEPT as u64, "the beginning of a package")?;
    let tape = Tape::new(input.into_stream()?);
    let attempt = if options.salvage || options.member.is_some() {
        Ok(None)
    } else {
        PackageStream::open(&tape, &location, options)
    };
    let kept = lock(&tape.0).kept.take();
    drop(lease);
    match (attempt, kept) {
        (Ok(Some(stream)), _) => Ok(Arc::new(stream)),
        // Nothing that follows mends these.
        (Err(error), _) if is_final(&error) => Err(error),
        (_, Some(kept)) => {
            let rewound = Box::new(Cursor::new(kept).chain(tape));
            let input = Input::from_reader(location, rewound)?.cancelled_by(cancel);
            let input = options.externals.saved(input)?;
            Ok(Arc::new(PackageSource::open(crate::OVA, input, options)?))
        }
        (attempt, None) => Err(attempt.err().unwrap_or_else(|| {
            Error::unsupported("the package can't be read in one pass").hint("save it to a file first")
        })),
    }
}

/// True for an error that a reader by position has as well: it need not wait for the whole pipe.
fn is_final(error: &Error) -> bool {
    use ErrorKind::{Cancelled, Corrupt, Io, Refused, Unavailable};
    matches!(error.kind(), Corrupt | Refused | Io | Unavailable | Cancelled)
}

/// A stream whose first bytes are kept. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Tape(Arc<Mutex<Reel>>);

#[derive(Debug)]
struct Reel {
    stream: Stream,
    /// Every byte read so far; `None` if there were too many, or if they are not needed any more.
    kept: Option<Vec<u8>>,
}

impl Tape {
    /// Wraps a stream without keeping its bytes.
    pub(crate) fn passing(stream: Stream) -> Self {
        Self(Arc::new(Mutex::new(Reel { stream, kept: None })))
    }

    fn new(stream: Stream) -> Self {
        Self(Arc::new(Mutex::new(Reel { stream, kept: Some(Vec::new()) })))
    }
}

impl Reel {
    fn keep(&mut self, bytes: &[u8]) {
        if let Some(kept) = &mut self.kept {
            match kept.len().saturating_add(bytes.len()) <= MAX_KEPT {
                true => kept.extend_from_slice(bytes),
                false => self.kept = None,
            }
        }
    }
}

impl Read for Tape {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut reel = lock(&self.0);
        let count = reel.stream.read(buf)?;
        reel.keep(&buf[..count]);
        Ok(count)
    }
}

impl Blocks for Tape {
    fn read_full(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut reel = lock(&self.0);
        let count = reel.stream.read_full(buf)?;
        reel.keep(&buf[..count]);
        Ok(count)
    }

    fn skip(&mut self, len: u64) -> Result<u64> {
        let mut buf = vec![0; 64 << 10];
        let mut left = len;
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let count = self.read_full(&mut buf[..part])?;
            left -= count as u64;
            if count < part {
                break;
            }
        }
        Ok(len - left)
    }

    fn position(&self) -> u64 {
        lock(&self.0).stream.position()
    }

    fn left(&self) -> Option<u64> {
        None
    }
}

/// The members of the stream, read one at a time.
type Members = Arc<Mutex<Walker<Tape>>>;

/// Reads the current member, and digests it.
#[derive(Clone)]
struct MemberReader {
    members: Members,
    hasher: Arc<Mutex<Option<Hasher>>>,
}

impl Read for MemberReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = lock(&self.members).read_content(buf)?;
        if let Some(hasher) = &mut *lock(&self.hasher) {
            hasher.update(&buf[..count]);
        }
        Ok(count)
    }
}

/// A disk that the descriptor lists.
struct Expected {
    name: String,
    /// Name of its file.
    file: String,
    size: u64,
}

/// The disk that is being read.
struct Current {
    image: Arc<dyn ImageSource>,
    /// Device of the image.
    device: DeviceId,
    reader: MemberReader,
}

/// The one pass over a package.
struct Pass {
    members: Members,
    location: Location,
    options: OpenOptions,
    manifest: Manifest,
    expected: Vec<Expected>,
    /// Names of the files that the descriptor lists and no disk needs.
    needless: Vec<String>,
    /// First names of members that are no disks.
    unlisted: Vec<String>,
    /// Number of disks that are complete.
    complete: usize,
    current: Option<Current>,
    /// Names of the members so far.
    seen: HashSet<String>,
    in_order: bool,
    ended: bool,
    notes: Arc<Mutex<Vec<String>>>,
}

/// A package that is read in one pass.
pub(crate) struct PackageStream {
    info: ImageInfo,
    pass: Mutex<Pass>,
    notes: Arc<Mutex<Vec<String>>>,
}

impl fmt::Debug for PackageStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackageStream").field("devices", &self.info.devices).finish_non_exhaustive()
    }
}

impl PackageStream {
    /// Reads descriptor and manifest, and opens the first disk. Returns `None` if one pass does not suffice.
    fn open(tape: &Tape, location: &Location, options: &OpenOptions) -> Result<Option<Self>> {
        let mut walker = Walker::new(tape.clone());
        let mut seen = HashSet::new();
        let Some((name, text)) = small_member(&mut walker, &mut seen, MAX_DESCRIPTOR)? else {
            return Ok(None);
        };
        if !is_descriptor_name(&name) {
            return Ok(None);
        }
        let Some((manifest_name, sums)) = small_member(&mut walker, &mut seen, manifest::MAX_LEN)? else {
            return Ok(None);
        };
        if manifest_name != with_extension(&name, "mf") {
            return Ok(None);
        }
        let manifest = Manifest::parse(&sums)?;
        let descriptor = ovf::parse(&text, None)?;
        let Some(expected) = expected_disks(&descriptor) else { return Ok(None) };
        let needless = needless_files(&descriptor).map(|file| file.href.clone()).collect();
        let info = ImageInfo { format: crate::OVA, ..ImageInfo::default() };
        let mut info = describe(info, &name, text, descriptor, Some(&manifest))?;
        info.notes.extend(manifest.note_unlisted(expected.iter().map(|disk| disk.file.as_str())));
        let notes = Arc::default();
        let mut pass = Pass {
            members: Arc::new(Mutex::new(walker)),
            location: location.clone(),
            options: disks::member_options(options, 1),
            manifest,
            expected,
            needless,
            unlisted: Vec::new(),
            complete: 0,
            current: None,
            seen,
            in_order: true,
            ended: false,
            notes: Arc::clone(&notes),
        };
        pass.begin_disk()?;
        let Some(first) = &pass.current else { return Ok(None) };
        pass.in_order = matches!(first.image.access(), Access::Stream(stream) if lock(stream).in_order());
        let device = |(id, disk): (u32, &Expected)| Device::disk(id, disk.name.as_str(), disk.size);
        info.devices = (0..).zip(&pass.expected).map(device).collect();
        let format = first.image.info().format;
        let formats = vec![format; info.devices.len()];
        add_formats(&mut info, &formats);
        Ok(Some(Self { info, pass: Mutex::new(pass), notes }))
    }
}

/// Returns the name and content of the next file; `None` if it is longer than `most` bytes, or if there is
/// none.
fn small_member(
    walker: &mut Walker<Tape>,
    seen: &mut HashSet<String>,
    most: u64,
) -> Result<Option<(String, Vec<u8>)>> {
    while let Some(entry) = walker.next()? {
        if entry.kind == crate::tar::Kind::Directory {
            continue;
        }
        if entry.kind != crate::tar::Kind::File || entry.stored > most {
            return Ok(None);
        }
        // At most a few MiB, so it fits.
        let mut content = vec![0; entry.stored as usize];
        walker.read_content(&mut content)?;
        seen.insert(entry.name.clone());
        return Ok(Some((entry.name, content)));
    }
    Ok(None)
}

/// Returns the disks of a descriptor; `None` unless each is in a VMDK file of its own, whose size is stated.
fn expected_disks(descriptor: &Descriptor) -> Option<Vec<Expected>> {
    if descriptor.disks.is_empty() || descriptor.disks.len() > disks::MAX_DISKS as usize {
        return None;
    }
    let mut files = HashSet::new();
    let disk = |disk: &ovf::DiskRef| {
        let file = descriptor.files.get(disk.file?)?;
        // A percent sign may be that of a URI, or of the name.
        let is_name = is_plain_name(&file.href) && !file.href.contains('%');
        let is_vmdk = is_name && file.href.to_ascii_lowercase().ends_with(".vmdk");
        let is_usual = is_vmdk && !file.gzip && file.chunk_size.is_none() && files.insert(&file.href);
        let size = disk.capacity.filter(|_| is_usual)?;
        Some(Expected { name: disk.device.clone(), file: file.href.clone(), size })
    };
    descriptor.disks.iter().map(disk).collect()
}

impl Pass {
    /// Finds and opens the next disk. Returns false after the last, at the end of the archive.
    fn begin_disk(&mut self) -> Result<bool> {
        loop {
            let next = lock(&self.members).next()?;
            let Some(entry) = next else { return self.end_archive().map(|()| false) };
            if !entry.kind.is_file() {
                crate::archive::note_other(&entry.name, entry.kind, &mut lock(&self.notes));
                continue;
            }
            if self.seen.len() >= MAX_MEMBERS {
                return Err(Error::limit(format!("the archive has more than {MAX_MEMBERS} members")));
            }
            if !self.seen.insert(entry.name.clone()) {
                return Err(
                    Error::malformed(format!("two members are called '{}'", entry.name)).at(entry.start)
                );
            }
            let index = self.expected.iter().position(|disk| disk.file == entry.name);
            match index {
                // The digest is of the whole file, and its holes are not in the archive.
                Some(_) if entry.kind == Kind::Sparse => {
                    return Err(Error::out_of_order(format!("'{}' is stored as a sparse file", entry.name))
                        .hint("save the package to a file first"));
                }
                Some(index) if index == self.complete => return self.open_disk(&entry).map(|()| true),
                Some(_) => {
                    return Err(Error::out_of_order("the disks are not in the order of the descriptor")
                        .hint("save the package to a file first"));
                }
                None => self.note_unlisted(entry.name),
            }
        }
    }

    /// Keeps the name of a member that is no disk, for a note.
    fn note_unlisted(&mut self, name: String) {
        let is_certificate = name.to_ascii_lowercase().ends_with(".cert");
        if !is_certificate && self.unlisted.len() <= manifest::MAX_LISTED {
            self.unlisted.push(name);
        }
    }

    fn open_disk(&mut self, entry: &Entry) -> Result<()> {
        let Some(expected) = self.expected.get_mut(self.complete) else { return Ok(()) };
        let hasher = self.manifest.line(&entry.name).map(|line| line.algorithm.hasher());
        let reader =
            MemberReader { members: Arc::clone(&self.members), hasher: Arc::new(Mutex::new(hasher)) };
        let input = Input::from_reader(&self.location, Box::new(reader.clone()));
        let opened =
            input.and_then(|input| self.options.externals.open_member(input, Some("vmdk"), &self.options));
        let image = opened.on_device(&expected.name)?;
        let device = image.info().single("a disk of a package").on_device(&expected.name)?;
        let (size, device) = (device.size, device.id);
        if size != expected.size {
            return Err(Error::unsupported(format!(
                "the descriptor says {} bytes, the disk has {size}",
                expected.size
            ))
            .device(&*expected.name)
            .hint("save the package to a file first"));
        }
        self.current = Some(Current { image, device, reader });
        Ok(())
    }

    /// Reads what is left of the current disk's file, and compares its digest.
    fn end_disk(&mut self, mut current: Current) -> Result<()> {
        let mut rest = vec![0; 64 << 10];
        while current.reader.read(&mut rest).map_err(|e| Error::io("read", e))? > 0 {}
        let expected = &self.expected[self.complete];
        let hasher = lock(&current.reader.hasher).take();
        if let (Some(line), Some(hasher)) = (self.manifest.line(&expected.file), hasher) {
            line.check(&hasher.finish()).on_device(&expected.name)?;
        }
        let notes = current.image.notes().into_iter().chain(current.image.info().notes.clone());
        lock(&self.notes).extend(notes.map(|note| format!("{}: {note}", expected.name)));
        self.complete += 1;
        Ok(())
    }

    /// Checks at the end of the archive that nothing is missing.
    fn end_archive(&mut self) -> Result<()> {
        let listed = self.manifest.lines.iter().map(|line| &line.name);
        let mut needed = self.expected.iter().map(|disk| &disk.file).chain(listed);
        if let Some(missing) = needed.find(|name| !self.seen.contains(*name)) {
            return Err(crate::files::missing(missing));
        }
        let absent = self.needless.iter().map(String::as_str).filter(|name| !self.seen.contains(*name));
        lock(&self.notes).extend(note_absent(absent));
        if let Some(names) = manifest::first_names(self.unlisted.iter().map(String::as_str)) {
            lock(&self.notes).push(format!("no disk, and left out: {names}"));
        }
        lock(&self.notes).extend(lock(&self.members).take_notes());
        Ok(())
    }
}

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.ended {
            return Err(second_pass());
        }
        loop {
            let Some(current) = &self.current else {
                if self.begin_disk()? {
                    continue;
                }
                self.ended = true;
                return Ok(None);
            };
            let name = &self.expected[self.complete].name;
            let Access::Stream(stream) = current.image.access() else {
                return Err(Error::unsupported("the disk can't be read in one pass")
                    .device(name.as_str())
                    .hint("save the package to a file first"));
            };
            let piece = lock(stream).next_piece(pool).on_device(name)?;
            if let Some(piece) = piece.filter(|piece| piece.device == current.device) {
                // At most 254 disks.
                let device = DeviceId(u32::try_from(self.complete).unwrap_or(u32::MAX));
                return Ok(Some(piece.routed(device)));
            }
            if let Some(current) = self.current.take() {
                self.end_disk(current)?;
            }
        }
    }

    fn in_order(&self) -> bool {
        self.in_order
    }
}

impl ImageSource for PackageStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }

    fn notes(&self) -> Vec<String> {
        lock(&self.notes).clone()
    }
}
