//! [`ExternalPolicy`] and [`PolicyOpener`]: an image can open another file only if the user allowed it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use imgtool_core::error::escape_control;
use imgtool_core::external::refusal;
use imgtool_core::sync::lock;
use imgtool_core::{
    Error, ExternalOpener, Externals, ImageSource, Input, Location, OpenOptions, Output, Registry, Result,
};
use imgtool_storage::Identity;
use imgtool_storage::open::{OpenInput, Opening};

/// Maximum depth of a chain of images. Our limit: chains in use stay below 100. QEMU has no limit.
pub const MAX_CHAIN_DEPTH: usize = 256;

/// Maximum depth of containers in containers. Our limit: a tar of disks needs one level, but a hostile
/// archive may contain itself.
const MAX_NESTING: usize = 4;

/// Files that the user allows images to open. The default allows none.
#[derive(Debug, Clone, Default)]
pub struct ExternalPolicy {
    /// True to allow regular files in or below the directory of the image that the user named.
    pub chain: bool,
    /// Further files to allow, in any directory.
    pub paths: Vec<PathBuf>,
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
}

impl SuppliedFile {
    fn open(&self) -> Result<Input> {
        match self {
            Self::Output(output) => output.reopen(),
            Self::Path(path) => Ok(open_plain(path)?.input),
        }
    }
}

fn open_plain(path: &Path) -> Result<OpenInput> {
    imgtool_storage::open::open(&path.into(), Opening::Plain)
}

/// Opens the files that images name, as far as the policy allows.
#[derive(Debug, Clone)]
pub struct PolicyOpener {
    registry: Registry,
    policy: ExternalPolicy,
    /// Canonical path of the image that the user named; `None` in the opener of that image.
    root: Option<PathBuf>,
    /// Canonical paths of the images above this one in the chain. A name that resolves to one of them closes
    /// a loop.
    above: Vec<PathBuf>,
    /// Number of containers around this image.
    nesting: usize,
    /// All files that this opener and its clones have opened.
    opened: Arc<Mutex<Vec<OpenedFile>>>,
    /// Supplied files by name. They apply only to the first image of the chain.
    supplied: BTreeMap<String, SuppliedFile>,
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
            supplied: BTreeMap::new(),
        }
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

    fn open_admitted(&self, path: &Path) -> Result<Input> {
        let open = open_plain(path)?;
        lock(&self.opened).push(OpenedFile { location: path.into(), identity: open.identity });
        Ok(open.input)
    }

    /// Returns the canonical path of `name`, if allowed, and the opener for the names in that file.
    fn admit(&self, role: &str, name: &str, from: &Location) -> Result<(PathBuf, Self)> {
        if !self.policy.chain && self.policy.paths.is_empty() {
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
        let name_path = name.strip_prefix("file:").unwrap_or(name);
        let from_real = canonical(from_path, role)?;
        let directory = from_real.parent().unwrap_or(Path::new("/"));
        let path = std::fs::canonicalize(directory.join(name_path))
            .map_err(|e| Error::io(format!("open {role} '{}'", escape_control(name)), e).path(from))?;
        let root = self.root.clone().unwrap_or_else(|| from_real.clone());
        if !self.admits(&path, &root) {
            return Err(refusal(role, name, from));
        }
        if path == from_real || self.above.contains(&path) {
            return Err(chain_loop(role, name, from));
        }
        if self.above.len() >= MAX_CHAIN_DEPTH {
            return Err(Error::limit(format!("the chain is deeper than {MAX_CHAIN_DEPTH} images")).path(from));
        }
        let mut above = self.above.clone();
        above.push(from_real);
        Ok((path, Self { root: Some(root), above, supplied: BTreeMap::new(), ..self.clone() }))
    }

    fn admits(&self, path: &Path, root: &Path) -> bool {
        let named = self
            .policy
            .paths
            .iter()
            .any(|allowed| std::fs::canonicalize(allowed).is_ok_and(|allowed| allowed == path));
        let in_chain = self.policy.chain
            && root.parent().is_some_and(|directory| path.starts_with(directory))
            && std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
        named || in_chain
    }
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
        let (input, below) = match self.supplied.get(name) {
            Some(supplied) => (supplied.open()?, Self { supplied: BTreeMap::new(), ..self.clone() }),
            None => {
                let (path, below) = self.admit(role, name, from)?;
                (self.open_admitted(&path)?, below)
            }
        };
        let options = OpenOptions { externals: below.externals(), snapshot: None, ..options.clone() };
        open_bare(&self.registry, input, format, &options)
    }

    fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        match self.supplied.get(name) {
            Some(supplied) => supplied.open(),
            None => self.open_admitted(&self.admit(role, name, from)?.0),
        }
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
        let inner = Self { nesting: self.nesting + 1, ..self.clone() };
        let options = OpenOptions { externals: inner.externals(), ..options.clone() };
        open_bare(&self.registry, member, format, &options)
    }

    fn depth(&self) -> usize {
        self.above.len()
    }
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
