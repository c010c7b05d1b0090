//! External files: what an image names outside itself is opened only where the user allowed it.
//!
//! A driver never opens a file by name. It asks [`Externals`], which checks the name against the
//! policy, refuses loops and deep chains, and opens what is allowed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::driver::OpenOptions;
use crate::error::{Error, Result, escape_control};
use crate::registry::Registry;
use crate::source::ImageSource;
use crate::storage::{Input, Output};

/// The deepest chain of images that is followed. Ours: QEMU has none; its users stay below 100.
pub const MAX_CHAIN_DEPTH: usize = 256;

/// What the user allowed. By default nothing.
#[derive(Debug, Clone, Default)]
pub struct ExternalPolicy {
    /// Regular files in the directory of the image that was named, and below.
    pub chain: bool,
    /// These files, wherever they are.
    pub paths: Vec<PathBuf>,
}

/// A file that an image may name and that is not looked for by that name.
#[derive(Clone)]
pub enum Given {
    /// An output that has no name of its own yet.
    Output(Output),
    /// The file at this path.
    File(PathBuf),
}

impl Given {
    fn open(&self) -> Result<Input> {
        match self {
            Given::Output(output) => output.reopen(),
            Given::File(path) => Input::open_plain(path),
        }
    }
}

/// Opens the files that an image names, within the policy.
#[derive(Clone, Default)]
pub struct Externals {
    registry: Option<Registry>,
    policy: ExternalPolicy,
    /// The image the user named first, canonical; everything else hangs below it.
    root: Option<PathBuf>,
    /// Canonical paths that are open above this image: a name among them is a loop.
    open: Vec<PathBuf>,
    /// Every file that was opened by these rules, whichever image named it.
    opened: Arc<Mutex<Vec<PathBuf>>>,
    /// What the image itself, none below it, gets for these names whatever the policy says.
    given: BTreeMap<String, Given>,
}

impl std::fmt::Debug for Externals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Externals").field("policy", &self.policy).field("open", &self.open).finish()
    }
}

impl Externals {
    /// Allows what `policy` says, opening images with `registry`.
    pub fn new(registry: Registry, policy: ExternalPolicy) -> Self {
        Self { registry: Some(registry), policy, ..Self::default() }
    }

    /// The same rules for an image that names what the caller has just made or opened for it: for
    /// these names it gets that, and nothing is looked for.
    #[must_use]
    pub fn with_given(mut self, given: BTreeMap<String, Given>) -> Self {
        self.given = given;
        self
    }

    /// Opens the image that `from` calls `name` (relative names are relative to `from`'s
    /// directory), with the driver `format`, or by content when the image does not say.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] when it is not allowed; whatever opening it brings.
    pub fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Path,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Box<dyn ImageSource>> {
        let Some(registry) = &self.registry else { return Err(not_allowed(role, name, from)) };
        let (input, inner) = match self.given.get(name) {
            Some(given) => (given.open()?, Self { given: BTreeMap::new(), ..self.clone() }),
            None => {
                let (path, inner) = self.admit(role, name, from)?;
                let input = Input::open_plain(&path)?;
                self.note_opened(&path);
                (input, inner)
            }
        };
        let path = input.path().to_owned();
        let options = OpenOptions { externals: inner, snapshot: None, ..options.clone() };
        let driver = match format {
            Some(format) => registry.get(format)?,
            None => registry.probe(&input.head()?, input.len())?,
        };
        driver.open(input, &options).map_err(|e| e.path(&path))
    }

    /// Opens the file that `from` calls `name` as plain bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] when it is not allowed; [`crate::ErrorKind::Io`].
    pub fn open_file(&self, role: &str, name: &str, from: &Path) -> Result<Input> {
        if let Some(given) = self.given.get(name) {
            return given.open();
        }
        let (path, _) = self.admit(role, name, from)?;
        self.note_opened(&path);
        Input::open_plain(&path)
    }

    /// Every file that was opened by these rules so far: a target must be none of them.
    pub fn opened(&self) -> Vec<PathBuf> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_opened(&self, path: &Path) {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    }

    /// How many images are open above the one that these rules are for: a driver divides the memory
    /// for its tables by it.
    pub fn depth(&self) -> usize {
        self.open.len()
    }

    /// Whether the policy lets `name` be opened, without opening it.
    pub fn allows(&self, name: &str, from: &Path) -> bool {
        self.admit("file", name, from).is_ok()
    }

    /// The canonical path of an allowed name, and the rules for what that file names in turn.
    fn admit(&self, role: &str, name: &str, from: &Path) -> Result<(PathBuf, Externals)> {
        if !self.policy.chain && self.policy.paths.is_empty() {
            return Err(not_allowed(role, name, from));
        }
        if name.is_empty() || name.contains('\0') || name.starts_with("json:") {
            return Err(Error::unsupported(format!(
                "{role} '{}' is not a plain file name",
                escape_control(name)
            ))
            .path(from)
            .hint("only plain paths are followed; convert a copy whose reference is a path"));
        }
        let name_path = name.strip_prefix("file:").unwrap_or(name);
        let from_real = canonical(from, role)?;
        let directory = from_real.parent().unwrap_or(Path::new("/"));
        let wanted = directory.join(name_path);
        let path = std::fs::canonicalize(&wanted)
            .map_err(|e| Error::io(format!("open {role} '{}'", escape_control(name)), e).path(from))?;
        let root = self.root.clone().unwrap_or_else(|| from_real.clone());
        if !self.policy_admits(&path, &root) {
            return Err(not_allowed(role, name, from));
        }
        if path == from_real || self.open.contains(&path) {
            return Err(leads_back(role, name, from));
        }
        if self.open.len() >= MAX_CHAIN_DEPTH {
            return Err(Error::limit(format!("the chain is deeper than {MAX_CHAIN_DEPTH} images")).path(from));
        }
        let mut open = self.open.clone();
        open.push(from_real);
        Ok((path, Externals { root: Some(root), open, given: BTreeMap::new(), ..self.clone() }))
    }

    fn policy_admits(&self, path: &Path, root: &Path) -> bool {
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

fn canonical(path: &Path, role: &str) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|e| Error::io(format!("find the directory of its {role}"), e).path(path))
}

/// A chain that never ends: `from` calls an image `name` that is above it, or itself.
pub fn leads_back(role: &str, name: &str, from: &Path) -> Error {
    Error::malformed(format!("{role} '{}' leads back to an image of the same chain", escape_control(name)))
        .path(from)
        .hint("the chain has no end: one of its images must name another file")
}

fn not_allowed(role: &str, name: &str, from: &Path) -> Error {
    Error::refused(format!("the image needs its {role} '{}', which is not allowed to be opened", escape_control(name)))
        .path(from)
        .hint("if you trust the image: --allow-external PATH for that file, or --allow-external chain for files in the image's directory")
}
