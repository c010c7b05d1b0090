//! [`ExternalPolicy`] and [`PolicyOpener`]: an image can open another file only if the user allowed it.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use imgtool_core::error::escape_control;
use imgtool_core::external::{is_plain_name, refusal};
use imgtool_core::sync::lock;
use imgtool_core::zero::is_zero;
use imgtool_core::{
    Confidence, Error, ExternalOpener, Externals, ImageSource, Input, Location, Memory, OpenOptions, Output,
    Registry, Result,
};
use imgtool_storage::open::{OpenInput, Opening};
use imgtool_storage::os::{self, DirectoryHandle, FileId};
use imgtool_storage::{FileWatch, Identity, Sharing};

use crate::contents;

/// Maximum depth of a chain of images. Our limit: chains in use stay below 100. QEMU has no limit.
pub const MAX_CHAIN_DEPTH: usize = 256;

/// Maximum depth of containers in containers. Our limit: a tar of disks needs one level, but a hostile
/// archive may contain itself.
const MAX_NESTING: usize = 4;

/// Maximum number of files of a directory that are candidates for an image without a name. Our limit: a
/// driver opens each of them.
const MAX_CANDIDATES: usize = 1000;

/// Files that the user allows images to open. The default allows none.
#[derive(Debug, Clone, Default)]
pub struct ExternalPolicy {
    /// True to allow regular files in or below the directory of the image that the user named.
    pub chain: bool,
    /// Further files to allow, in any directory.
    pub paths: Vec<PathBuf>,
    /// Directories in or below which regular files are allowed. One that does not exist allows nothing.
    pub directories: Vec<PathBuf>,
}

impl ExternalPolicy {
    /// True if no image may open any file.
    pub fn is_closed(&self) -> bool {
        !self.chain && self.paths.is_empty() && self.directories.is_empty()
    }
}

/// File that the caller supplies for a name in an image. The policy does not apply to it.
#[derive(Debug, Clone)]
pub enum SuppliedFile {
    /// An output, which may not have its final name yet.
    Output(Output),
    /// The file at this path.
    Path(PathBuf),
}

/// File that was opened because an image names it.
#[derive(Debug, Clone)]
pub struct OpenedFile {
    /// Location.
    pub location: Location,
    /// Identity, if it is a regular file or block device.
    pub identity: Option<Identity>,
    /// Watch over the file, if it is a regular file.
    pub watch: Option<FileWatch>,
}

/// Directory that [`ExternalPolicy::chain`] allows.
#[derive(Debug, Clone)]
struct ChainDirectory {
    /// Canonical path.
    path: PathBuf,
    /// The open directory: its path may lead to another one later.
    handle: Arc<DirectoryHandle>,
}

/// File that the policy allows, and how to open it.
enum Allowed {
    /// By this path, which the user allowed.
    Named(PathBuf),
    /// By this path below a directory.
    Beneath(ChainDirectory, PathBuf),
}

/// External file that may be opened.
struct Admission {
    /// Canonical path.
    path: PathBuf,
    allowed: Allowed,
    /// Opener for the names in that file.
    below: PolicyOpener,
}

impl SuppliedFile {
    fn open(&self, memory: &Memory) -> Result<Input> {
        match self {
            Self::Output(output) => output.reopen(memory),
            Self::Path(path) => Ok(open_plain(path, memory, Sharing::Refused)?.input),
        }
    }
}

fn open_plain(path: &Path, memory: &Memory, sharing: Sharing) -> Result<OpenInput> {
    imgtool_storage::open::open_shared(&path.into(), Opening::Plain, memory, sharing)
}

/// Opens the files that images name, as far as the policy allows.
#[derive(Debug, Clone)]
pub struct PolicyOpener {
    registry: Registry,
    policy: ExternalPolicy,
    /// Directory of the image that the user named; `None` in the opener of that image.
    root: Option<ChainDirectory>,
    /// Canonical paths of the images above this one in the chain. A name that resolves to one of them closes
    /// a loop.
    above: Vec<PathBuf>,
    /// Number of containers around this image.
    nesting: usize,
    /// All files that this opener and its clones have opened.
    opened: Arc<Mutex<Vec<OpenedFile>>>,
    /// Locations and identities of all images opened so far.
    images: Arc<Mutex<Vec<(Location, FileId)>>>,
    /// Supplied files by name. They apply only to the first image of the chain.
    supplied: BTreeMap<String, SuppliedFile>,
    /// Ledger from which the opened files borrow.
    memory: Memory,
    /// Treatment of files that other programs may write.
    sharing: Sharing,
}

impl PolicyOpener {
    /// Creates an opener that applies `policy` and opens images with the drivers of `registry`.
    pub fn new(registry: Registry, policy: ExternalPolicy) -> Self {
        Self {
            registry,
            policy,
            root: None,
            above: Vec::new(),
            nesting: 0,
            opened: Arc::default(),
            images: Arc::default(),
            supplied: BTreeMap::new(),
            memory: Memory::default(),
            sharing: Sharing::Refused,
        }
    }

    /// Sets the treatment of files that other programs may write.
    #[must_use]
    pub fn sharing(self, sharing: Sharing) -> Self {
        Self { sharing, ..self }
    }

    /// Lets the opened files borrow from `memory`.
    #[must_use]
    pub fn borrowing(&self, memory: &Memory) -> Self {
        Self { memory: memory.clone(), ..self.clone() }
    }

    /// Returns an opener with the same policy that opens `supplied` files for the names in an image.
    #[must_use]
    pub fn supplying(&self, supplied: BTreeMap<String, SuppliedFile>) -> Self {
        Self { supplied, ..self.clone() }
    }

    /// Returns the opener for [`OpenOptions::externals`].
    pub fn externals(&self) -> Externals {
        Externals::new(Arc::new(self.clone()))
    }

    /// Returns all files opened so far. No output may overwrite one of them.
    pub fn opened(&self) -> Vec<OpenedFile> {
        lock(&self.opened).clone()
    }

    /// Returns the file supplied for a name, which an image may store with a leading "./".
    fn supplied(&self, name: &str) -> Option<&SuppliedFile> {
        let path = |name: &str| without_dot(plain_name(name)).to_owned();
        let mut supplied = self.supplied.iter();
        supplied.find(|(known, _)| path(known) == path(name)).map(|(_, file)| file)
    }

    /// Opens the file that the image at `from` refers to as `name`, if allowed. Returns it with the opener for
    /// the names in it.
    fn open_allowed(&self, role: &str, name: &str, from: &Location) -> Result<(Input, Self)> {
        let Admission { path, allowed, below } = self.admit(role, name, from)?;
        let open = match allowed {
            Allowed::Named(named) => open_plain(&named, &self.memory, self.sharing)?,
            Allowed::Beneath(directory, relative) => {
                let opened = directory.handle.open_beneath(&relative);
                let file = opened.map_err(|e| moved(role, name, from, e))?;
                if !file.metadata().is_ok_and(|meta| meta.is_file()) {
                    return Err(refusal(role, name, from));
                }
                imgtool_storage::open::from_file(Location::from(&path), file, &self.memory, self.sharing)?
            }
        };
        if let Some(id) = open.identity.as_ref().and_then(Identity::id) {
            // An image may be named by its canonical path, and by that in the image above it.
            self.image_opened(&Location::from(&path), id);
            if let Some(beside) = from.beside(plain_name(name)) {
                self.image_opened(&beside, id);
            }
        }
        let opened = OpenedFile { location: path.into(), identity: open.identity, watch: open.watch };
        lock(&self.opened).push(opened);
        Ok((open.input, below))
    }

    /// Returns the path of the file that the image at `from` refers to as `name`, and its identity, if the image
    /// may change that file.
    pub(crate) fn writable(&self, role: &str, name: &str, from: &Location) -> Result<(PathBuf, Identity)> {
        let Admission { path, allowed, .. } = self.admit(role, name, from)?;
        // Nothing is read, so that the lock of the writer does not meet that of a reader.
        let found = match allowed {
            Allowed::Named(named) => std::fs::metadata(named),
            Allowed::Beneath(directory, relative) => {
                directory.handle.open_beneath(&relative).and_then(|file| file.metadata())
            }
        };
        let found = found.map_err(|e| moved(role, name, from, e))?;
        let identity = Identity::of(&found, &path).filter(|_| !found.is_dir());
        Ok((path, identity.ok_or_else(|| refusal(role, name, from))?))
    }

    /// Decides whether the image at `from` may open `name`, without opening it.
    fn admit(&self, role: &str, name: &str, from: &Location) -> Result<Admission> {
        self.refuse_within_container(role, name, from)?;
        if self.policy.is_closed() {
            return Err(refusal(role, name, from));
        }
        let Some(from_path) = from.path() else {
            return Err(Error::unsupported(format!(
                "an image without a path has no directory for its {role}"
            ))
            .path(from)
            .hint("name the image by its path"));
        };
        if name.is_empty() || name.contains('\0') || name.starts_with("json:") {
            return Err(Error::unsupported(format!(
                "{role} '{}' is not a plain file name",
                escape_control(name)
            ))
            .path(from)
            .hint("only plain paths are followed; convert a copy whose reference is a path"));
        }
        let from_real = canonical(from_path, role)?;
        let directory = from_real.parent().unwrap_or(Path::new("/"));
        let path = match std::fs::canonicalize(directory.join(plain_name(name))) {
            Ok(path) => path,
            Err(e) => self
                .moved_parent(role, name)
                .ok_or_else(|| Error::io(format!("open {role} '{}'", escape_control(name)), e).path(from))?,
        };
        let root = match &self.root {
            Some(root) => root.clone(),
            None => self.chain_directory(from, &from_real)?,
        };
        let Some(allowed) = self.allows(&path, &root) else {
            return Err(refusal(role, name, from));
        };
        if path == from_real || self.above.contains(&path) {
            return Err(chain_loop(role, name, from));
        }
        if self.above.len() >= MAX_CHAIN_DEPTH {
            return Err(Error::limit(format!("the chain is deeper than {MAX_CHAIN_DEPTH} images")).path(from));
        }
        let mut above = self.above.clone();
        above.push(from_real);
        let below = Self { root: Some(root), above, supplied: BTreeMap::new(), ..self.clone() };
        Ok(Admission { path, allowed, below })
    }

    /// Refuses every file that an image in a container names, whatever the user allows.
    fn refuse_within_container(&self, role: &str, name: &str, from: &Location) -> Result<()> {
        if self.nesting == 0 {
            return Ok(());
        }
        Err(Error::refused(format!(
            "an image in a container names the {role} '{}', and nothing outside of it is opened",
            escape_control(name)
        ))
        .path(from)
        .hint("if you trust it, unpack the container, and convert the image from there"))
    }

    /// Opens the directory of the image that the user named, at the canonical path `real`. Refuses it if
    /// another file has taken the image's place since the image was opened: the directory would be that of
    /// the other file.
    fn chain_directory(&self, image: &Location, real: &Path) -> Result<ChainDirectory> {
        let (Some(path), Some(name)) = (real.parent(), real.file_name()) else {
            return Err(Error::usage("is a directory, not an image").path(image));
        };
        let failed = |e| Error::io("open the directory of the image", e).path(image);
        let handle = DirectoryHandle::open(path).map_err(failed)?;
        let found = handle.look_up(name).map_err(failed)?.id;
        let images = lock(&self.images);
        let mut known = images.iter().filter(|(location, _)| location == image).peekable();
        if known.peek().is_some() && !known.any(|(_, id)| *id == found) {
            return Err(Error::refused("leads to another file since it was opened")
                .path(image)
                .hint("another program renames files there: try again when it has finished"));
        }
        Ok(ChainDirectory { path: path.to_owned(), handle: Arc::new(handle) })
    }

    /// Opens the file `name` in the directory of the image at `from`, unless that file is the image itself or
    /// one above it. Returns `None` if it is no regular file, or if the image has no directory of its own: it
    /// is in a container, or not a file.
    fn open_beside(&self, role: &str, name: &str, from: &Location) -> Result<Option<Input>> {
        let Some(from_path) = from.path().filter(|_| self.nesting == 0 && is_plain_name(name)) else {
            return Ok(None);
        };
        let from_real = canonical(from_path, role)?;
        let directory = self.chain_directory(from, &from_real)?;
        let path = directory.path.join(name);
        if path == from_real || self.above.contains(&path) {
            return Err(chain_loop(role, name, from));
        }
        // To open a FIFO or a device has effects of its own.
        if directory.handle.look_up(name.as_ref()).is_ok_and(|found| !found.is_regular) {
            return Ok(None);
        }
        let file = match directory.handle.open_beneath(Path::new(name)) {
            Ok(file) => file,
            // A link needs a permission for the file that it leads to.
            Err(e) if os::is_link_refused(&e) => return Ok(None),
            Err(e) if os::is_out_of_files(&e) => {
                return Err(Error::io(format!("open {role} '{name}'"), e)
                    .path(from)
                    .hint("allow more open files (ulimit -n)"));
            }
            Err(e) => return Err(Error::io(format!("open {role} '{name}'"), e).path(from)),
        };
        if !file.metadata().is_ok_and(|meta| meta.is_file()) {
            return Ok(None);
        }
        let open = imgtool_storage::open::from_file(Location::from(&path), file, &self.memory, self.sharing)?;
        let opened = OpenedFile { location: path.into(), identity: open.identity, watch: open.watch };
        lock(&self.opened).push(opened);
        Ok(Some(open.input))
    }

    /// Returns the canonical path of a file that the user allowed by path and that has the file name of a parent
    /// which is not where the image says. The driver compares the identifier of a parent, unlike that of a
    /// backing file, which has none.
    fn moved_parent(&self, role: &str, name: &str) -> Option<PathBuf> {
        let wanted = Path::new(plain_name(name)).file_name().filter(|_| role == "parent")?;
        let named = self.policy.paths.iter().find(|path| path.file_name() == Some(wanted))?;
        std::fs::canonicalize(named).ok()
    }

    /// Returns the canonical path of a candidate, or its name if there is none.
    fn real_path(&self, name: &str, directory: Option<&Path>) -> PathBuf {
        let path = match self.supplied.get(name) {
            Some(SuppliedFile::Path(path)) => path.clone(),
            Some(SuppliedFile::Output(_)) => return name.into(),
            None => directory.unwrap_or(Path::new("")).join(name),
        };
        std::fs::canonicalize(path).unwrap_or_else(|_| name.into())
    }

    fn allows(&self, path: &Path, root: &ChainDirectory) -> Option<Allowed> {
        let mut named = self.policy.paths.iter();
        if let Some(named) = named.find(|named| std::fs::canonicalize(named).is_ok_and(|real| real == path)) {
            return Some(Allowed::Named(named.clone()));
        }
        if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()) {
            return None;
        }
        match path.strip_prefix(&root.path).ok().filter(|_| self.policy.chain) {
            Some(relative) => Some(Allowed::Beneath(root.clone(), relative.to_owned())),
            None => self.policy.directories.iter().find_map(|directory| beneath(directory, path)),
        }
    }
}

/// Allows a file below a directory that the user allowed; `path` is canonical.
fn beneath(directory: &Path, path: &Path) -> Option<Allowed> {
    let directory = std::fs::canonicalize(directory).ok()?;
    let relative = path.strip_prefix(&directory).ok()?.to_owned();
    let handle = Arc::new(DirectoryHandle::open(&directory).ok()?);
    Some(Allowed::Beneath(ChainDirectory { path: directory, handle }, relative))
}

impl ExternalOpener for PolicyOpener {
    fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        let (input, below) = match self.supplied(name) {
            Some(supplied) => {
                (supplied.open(&self.memory)?, Self { supplied: BTreeMap::new(), ..self.clone() })
            }
            None => self.open_allowed(role, name, from)?,
        };
        let options = OpenOptions {
            externals: below.externals(),
            snapshot: None,
            // Those of a backing image are not those of the image.
            bitmaps: false,
            ..options.clone()
        };
        open_bare(&self.registry, input, format, &options)
    }

    fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        match self.supplied(name) {
            Some(supplied) => supplied.open(&self.memory),
            None => Ok(self.open_allowed(role, name, from)?.0),
        }
    }

    fn open_part(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        if let Some(supplied) = self.supplied(name) {
            return supplied.open(&self.memory);
        }
        match self.open_beside(role, name, from)? {
            Some(input) => Ok(input),
            None => self.open_file(role, name, from),
        }
    }

    fn candidates(
        &self,
        role: &str,
        identity: &str,
        from: &Location,
        extension: &str,
    ) -> Result<Vec<String>> {
        self.refuse_within_container(role, identity, from)?;
        if self.policy.is_closed() && self.supplied.is_empty() {
            return Err(refusal(role, identity, from));
        }
        let mut names: Vec<String> = self.supplied.keys().cloned().collect();
        names.extend(
            self.policy
                .paths
                .iter()
                .filter_map(|path| std::path::absolute(path).ok())
                .filter_map(|path| path.to_str().map(str::to_owned)),
        );
        // The caller supplies all files of an output that is verified, which does not have its name yet.
        if let Some(path) = from.path().filter(|_| self.policy.chain && self.supplied.is_empty()) {
            names.extend(files_beside(&canonical(path, role)?, extension)?);
        }
        // A file may have several of these names.
        let directory = from.path().and_then(|path| Some(canonical(path, role).ok()?.parent()?.to_owned()));
        let mut known = HashSet::new();
        names.retain(|name| known.insert(self.real_path(name, directory.as_deref())));
        Ok(names)
    }

    fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        if self.nesting >= MAX_NESTING {
            let message = format!("containers are nested more than {MAX_NESTING} deep");
            return Err(Error::limit(message).path(member.location()));
        }
        // The user named the container, and may not know what the images in it name.
        let (policy, supplied) = (ExternalPolicy::default(), BTreeMap::new());
        let inner = Self { nesting: self.nesting + 1, policy, supplied, ..self.clone() };
        let options = OpenOptions { externals: inner.externals(), ..options.clone() };
        let member = if format.is_none() { refuse_no_disk(&self.registry, member)? } else { member };
        open_bare(&self.registry, member, format, &options)
    }

    fn decompressed(&self, member: Input, compression: &str) -> Result<Input> {
        let (location, cancel) = (member.location().clone(), member.cancel_token());
        let open = OpenInput::of(member).borrowing(&self.memory).without_layers(1)?;
        if !open.compression.iter().any(|found| found.name() == compression) {
            return Err(Error::wrong_format(format!(
                "is stated to be compressed with {compression}, but is not"
            ))
            .path(location));
        }
        Ok(open.cancelled_by(cancel).spool()?.input)
    }

    fn saved(&self, stream: Input) -> Result<Input> {
        Ok(OpenInput::of(stream).borrowing(&self.memory).spool()?.input)
    }

    fn image_opened(&self, image: &Location, id: FileId) {
        lock(&self.images).push((image.clone(), id));
    }

    fn changes(&self) -> Vec<String> {
        self.opened().iter().filter_map(|file| file.watch.as_ref()).flat_map(FileWatch::changes).collect()
    }

    fn depth(&self) -> usize {
        self.above.len()
    }
}

/// Returns the path in a name that may begin with the scheme "file:".
fn plain_name(name: &str) -> &str {
    name.strip_prefix("file:").unwrap_or(name)
}

/// Returns a name without the "./" with which a relative path may begin.
fn without_dot(name: &str) -> &str {
    name.strip_prefix("./").unwrap_or(name)
}

/// Returns the error for an allowed file that could not be opened.
fn moved(role: &str, name: &str, from: &Location, e: io::Error) -> Error {
    if os::is_link_refused(&e) {
        return Error::refused(format!(
            "{role} '{}' became a link while it was opened",
            escape_control(name)
        ))
        .path(from)
        .hint("another program renames files there: try again when it has finished");
    }
    Error::io(format!("open {role} '{}'", escape_control(name)), e).path(from)
}

/// Returns the names of the files in the directory of `image` that have this extension, in upper or lower
/// case, in alphabetical order.
fn files_beside(image: &Path, extension: &str) -> Result<Vec<String>> {
    let directory = image.parent().unwrap_or(Path::new("/"));
    let entries = std::fs::read_dir(directory).map_err(|e| Error::io("list", e).path(directory))?;
    let has_extension =
        |name: &str| name.rsplit_once('.').is_some_and(|(_, found)| found.eq_ignore_ascii_case(extension));
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| has_extension(name)).take(MAX_CANDIDATES).collect();
    names.sort_unstable();
    Ok(names)
}

fn canonical(path: &Path, role: &str) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|e| Error::io(format!("find the directory of its {role}"), e).path(path))
}

/// Returns the error for a loop in the chain: `name` in the image at `from` leads to that image or to an
/// image above it.
pub fn chain_loop(role: &str, name: &str, from: &Location) -> Error {
    Error::malformed(format!("{role} '{}' leads back to an image of the same chain", escape_control(name)))
        .path(from)
        .hint("the chain has no end: one of its images must name another file")
}

/// Refuses a member of a container whose content is neither that of an image nor that of a disk.
fn refuse_no_disk(registry: &Registry, member: Input) -> Result<Input> {
    let head = member.head()?;
    if member.is_stream() || registry.probe(&head, member.len())?.1 != Confidence::Fallback {
        return Ok(member);
    }
    let bytes = member.into_random()?;
    let may_be_disk = is_zero(&head) || contents::is_disk(&head, Some(&bytes));
    if may_be_disk && contents::no_disk_by_head(&head).is_none() {
        return Ok(bytes.into());
    }
    Err(Error::wrong_format("is neither a known image nor a disk")
        .path(bytes.location())
        .hint("unpack the container, and convert the file with its format stated"))
}

/// Opens an external file or a container's member with the driver called `format`, if stated, otherwise with
/// the driver that recognises it. Does not compare the content with the file extension.
fn open_bare(
    registry: &Registry,
    input: Input,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Arc<dyn ImageSource>> {
    let location = input.location().clone();
    let driver = match format {
        Some(format) => registry.get(format),
        None => input.head().and_then(|head| registry.probe(&head, input.len()).map(|(driver, _)| driver)),
    };
    driver.and_then(|driver| driver.open(input, options)).map_err(|e| e.path(location))
}
