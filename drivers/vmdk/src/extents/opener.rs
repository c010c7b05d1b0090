//! [`Opener`], which opens the files of extents.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, ErrorKind, Lease, OpenOptions, RandomInput, Remedy, Result};

use super::{head_len, se_sparse, settings};
use crate::descriptor::{Access, ExtentLine, Kind};
use crate::grains::{FileSettings, GrainFile, TableCache};
use crate::image::Content;
use crate::layout::{SECTOR_SIZE, cowd, hosted, sesparse};

/// Role of an extent's file in messages.
const ROLE: &str = "extent";

/// Maximum number of faults in the facts of an image. Our limit, for the length of the output.
const MAX_FAULTS: usize = 20;

/// Fact about an image with more faults or files than that.
const UNSEEN: &str = "the files of further extents were not looked at";

/// Maximum number of extents whose files are opened for the facts of an image. Our limit: a crafted descriptor
/// has tens of thousands.
const MAX_INSPECTED: usize = 1024;

/// Memory in bytes for an extent besides its file. Measured: 0.5 KiB.
const EXTENT_BYTES: u64 = 1 << 10;
/// Memory in bytes for an open file. Measured: 1.8 KiB.
const FILE_BYTES: u64 = 4 << 10;

/// Opens the files of extents, each once.
pub(super) struct Opener<'a> {
    own: &'a RandomInput,
    /// True if the descriptor names a parent.
    is_child: bool,
    options: &'a OpenOptions,
    tables: &'a Arc<TableCache>,
    files: Vec<RandomInput>,
    /// Numbers of the files by name: several extents may be in one.
    known: HashMap<String, usize>,
    /// Memory for the descriptor, the extents and the files.
    lease: Lease,
    /// Faults of the files that stay closed.
    faults: Vec<String>,
    /// Numbers of the sparse files that belong to an extent.
    sparse: HashSet<usize>,
    /// Files that were opened for their faults, by name, and true for flat ones.
    seen: HashMap<(String, bool), Seen>,
}

/// A file that was opened for its faults.
#[derive(Clone)]
enum Seen {
    /// A file of this length in bytes with the guest's bytes.
    Flat(u64),
    /// A sparse file of this capacity in bytes: the size of a grain, and true if grains are compressed.
    Sparse { capacity: u64, shape: (u64, bool) },
    /// Its fault, if it has one: one that needs a permission, or that a machine uses, has none.
    Closed(Option<String>),
}

impl<'a> Opener<'a> {
    /// Creates an opener of the extents of the image in the file `own`. `lease` is the memory for its descriptor, and
    /// `is_child` says that this names a parent.
    pub(super) fn new(
        own: &'a RandomInput,
        is_child: bool,
        options: &'a OpenOptions,
        tables: &'a Arc<TableCache>,
        lease: Lease,
    ) -> Self {
        Self {
            own,
            is_child,
            options,
            tables,
            files: vec![own.clone()],
            known: HashMap::new(),
            lease,
            faults: Vec::new(),
            sparse: HashSet::new(),
            seen: HashMap::new(),
        }
    }

    /// Returns the open files, the image's own first, the memory for everything, and the faults of files that
    /// stayed closed.
    pub(super) fn finish(self) -> (Vec<RandomInput>, Lease, Vec<String>) {
        (self.files, self.lease, self.faults)
    }

    /// Opens the extent of a line. In a salvage, one whose file is missing or damaged is lost, and the others are
    /// not.
    pub(super) fn open(&mut self, line: &ExtentLine) -> Result<Content> {
        self.borrow(EXTENT_BYTES)?;
        let opened = match (line.access, line.kind) {
            (Access::None, _) => return Ok(Content::NoAccess),
            (_, Kind::Zero) => return Ok(Content::Zero),
            _ if self.options.info_only => {
                return Ok(Content::Closed(self.inspect(line)));
            }
            (_, Kind::Flat) => self.open_flat(line),
            (_, kind) => self.open_sparse(line, kind),
        };
        match opened {
            Err(error) if self.options.salvage && is_loss(&error) => {
                Ok(Content::Lost { reason: format!("extent '{}': {error}", escape_control(&line.name)) })
            }
            opened => opened,
        }
    }

    /// Looks whether the file of an extent is there, and as long as its line says. Keeps nothing open: a disk may
    /// have more files than a process. Returns the size of a grain of a sparse file, and true if grains are compressed.
    fn inspect(&mut self, line: &ExtentLine) -> Option<(u64, bool)> {
        if self.faults.len() >= MAX_FAULTS {
            return None;
        }
        let name = escape_control(&line.name);
        let key = (line.name.clone(), line.kind == Kind::Flat);
        let (seen, is_second) = match self.seen.get(&key) {
            Some(seen) => (seen.clone(), true),
            None if self.seen.len() == MAX_INSPECTED => {
                self.faults.push(UNSEEN.to_owned());
                return None;
            }
            None => {
                let seen = self.look_at(line);
                self.seen.insert(key, seen.clone());
                (seen, false)
            }
        };
        let needed = line.offset.saturating_add(line.sectors).saturating_mul(SECTOR_SIZE);
        let (fault, shape) = match seen {
            Seen::Flat(len) => {
                let fault =
                    format!("extent '{name}' is cut: it needs {needed} bytes, but its file ends at {len}");
                ((needed > len).then_some(fault), None)
            }
            Seen::Sparse { shape, .. } if is_second => (Some(belongs_to_several(&name)), Some(shape)),
            Seen::Sparse { capacity, shape } => {
                let fault = check_capacity(line, capacity).err();
                (fault.map(|error| format!("extent '{name}' is damaged: {error}")), Some(shape))
            }
            Seen::Closed(fault) => (fault.filter(|_| !is_second), None),
        };
        self.faults.extend(fault);
        if self.faults.len() == MAX_FAULTS {
            self.faults.push(UNSEEN.to_owned());
        }
        shape
    }

    /// Opens the file of an extent for its facts, and closes it again.
    fn look_at(&self, line: &ExtentLine) -> Seen {
        let name = escape_control(&line.name);
        let part = self.options.externals.open_part(ROLE, &line.name, self.own.location());
        let file = match part.and_then(imgtool_core::Input::into_random) {
            Err(error) if is_missing(&error) => {
                return Seen::Closed(Some(format!("extent '{name}' is missing")));
            }
            Err(_) => return Seen::Closed(None),
            Ok(file) => file,
        };
        if line.kind == Kind::Flat {
            return Seen::Flat(file.len());
        }
        match open_grains(&file, line.kind, self.is_child, settings(self.tables, 0, self.options)) {
            Ok(grains) => {
                let compressed = grains.hosted.as_ref().is_some_and(|header| header.compressed);
                Seen::Sparse { capacity: grains.capacity, shape: (grains.grain_size, compressed) }
            }
            Err(error) => {
                let fault = is_loss(&error).then(|| format!("extent '{name}' is damaged: {error}"));
                Seen::Closed(fault)
            }
        }
    }

    fn borrow(&mut self, more: u64) -> Result<()> {
        let bytes = self.lease.bytes() + more;
        self.lease.raise(bytes, "the extents of a VMDK image")
    }

    fn file(&mut self, name: &str) -> Result<usize> {
        if let Some(index) = self.known.get(name) {
            return Ok(*index);
        }
        self.borrow(FILE_BYTES)?;
        let part = self.options.externals.open_part(ROLE, name, self.own.location());
        let input =
            part.and_then(imgtool_core::Input::into_random).map_err(|error| match is_missing(&error) {
                true => error.remedied_by(Remedy::Salvage("put the file beside the descriptor".into())),
                false => error,
            })?;
        self.files.push(input);
        let index = self.files.len() - 1;
        self.known.insert(name.to_owned(), index);
        Ok(index)
    }

    fn open_flat(&mut self, line: &ExtentLine) -> Result<Content> {
        let index = self.file(&line.name)?;
        let file = &self.files[index];
        // The parser bounds both numbers to 2^54 sectors.
        let end = (line.offset + line.sectors) * SECTOR_SIZE;
        // A salvage loses what is behind the end of the file alone.
        if end > file.len() && !self.options.salvage {
            return Err(Error::corrupt(format!(
                "the extent needs {} bytes at {}, but the file ends at {}",
                line.sectors * SECTOR_SIZE,
                line.offset * SECTOR_SIZE,
                file.len()
            ))
            .path(file.location())
            .at(file.len())
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())));
        }
        Ok(Content::Flat { file: index, file_offset: line.offset * SECTOR_SIZE })
    }

    fn open_sparse(&mut self, line: &ExtentLine, kind: Kind) -> Result<Content> {
        if line.offset != 0 {
            return Err(Error::unsupported(format!(
                "the sparse extent '{}' begins at sector {} of its file",
                escape_control(&line.name),
                line.offset
            )));
        }
        let index = self.file(&line.name)?;
        if !self.sparse.insert(index) {
            return Err(Error::malformed(belongs_to_several(&escape_control(&line.name)))
                .remedied_by(Remedy::Salvage("no program makes such an image".into())));
        }
        let input = &self.files[index];
        let settings = settings(self.tables, index, self.options);
        let opened = open_grains(input, kind, self.is_child, settings).and_then(|file| {
            if !self.options.salvage {
                check_capacity(line, file.capacity)?;
            }
            Ok(file)
        });
        let file = opened.map_err(|error| error.path(input.location()))?;
        Ok(Content::Grains { file: Box::new(file), index })
    }
}

/// Says that several extents are in one sparse file: each would have all of its content.
fn belongs_to_several(name: &str) -> String {
    format!("the sparse file '{name}' belongs to more than one extent")
}

/// Refuses a sparse file of `capacity` bytes, which is shorter than its line says.
fn check_capacity(line: &ExtentLine, capacity: u64) -> Result<()> {
    if capacity >= line.sectors * SECTOR_SIZE {
        return Ok(());
    }
    Err(Error::malformed(format!(
        "the descriptor says that the extent has {} sectors, but the file has {}",
        line.sectors,
        capacity / SECTOR_SIZE
    ))
    .remedied_by(Remedy::Salvage("the files may be of different disks: use a backup".into())))
}

/// True if a file could not be opened because there is none.
fn is_missing(error: &Error) -> bool {
    error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::NotFound)
}

/// True if the file of an extent is missing or damaged. Other errors are the user's to resolve: a permission, or
/// the limit of open files.
fn is_loss(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) || is_missing(error)
}

/// Opens the sparse file of an extent, which must be of the kind that the descriptor states. `is_child` is true if the
/// descriptor names a parent.
fn open_grains(
    input: &RandomInput,
    kind: Kind,
    is_child: bool,
    settings: FileSettings<'_>,
) -> Result<GrainFile> {
    let head = input.read_vec(0, head_len(input, cowd::HEADER_LEN))?;
    let (magic, name): (&[u8], _) = match kind {
        Kind::VmfsSparse => (cowd::MAGIC, "COWD"),
        Kind::SeSparse => (&sesparse::MAGIC, "SE sparse"),
        Kind::Flat | Kind::Zero | Kind::Sparse => (hosted::MAGIC, "hosted sparse"),
    };
    if !head.starts_with(magic) {
        return Err(Error::malformed(format!("the extent is not a {name} file, as its descriptor says")));
    }
    match kind {
        Kind::VmfsSparse => {
            let header = cowd::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
            let contradiction = Some(&header.parent_name).filter(|name| !is_child && !name.is_empty());
            let contradiction = contradiction.map(|name| contradicting_parent(name));
            match contradiction {
                Some(error) if !settings.salvage => Err(error),
                contradiction => {
                    let doubt = contradiction.map(|error| format!("unverified: {}", error.message()));
                    Ok(GrainFile::cowd(input, &header, settings)?.doubted(doubt))
                }
            }
        }
        Kind::SeSparse => se_sparse(input, &head, settings),
        Kind::Flat | Kind::Zero | Kind::Sparse => {
            let header = hosted::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
            if header.is_wrapper() {
                return Err(Error::malformed("the extent is a descriptor, not a sparse file"));
            }
            GrainFile::hosted(input, &header, settings)
        }
    }
}

/// Returns the error for a redo log over the disk `name`, whose descriptor says that there is none below it.
fn contradicting_parent(name: &str) -> Error {
    Error::malformed(format!(
        "the extent is a redo log over '{}', but the descriptor says that the disk has no parent",
        escape_control(name)
    ))
    .remedied_by(Remedy::Salvage(
        "restore parentCID and parentFileNameHint in a copy of the descriptor".into(),
    ))
}
