//! Checks of a target: it must not be a source, another output, or an existing file that the run may not
//! replace.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use imgtool_core::{Error, Location, Remedy, Result};

use super::{Links, OutputRequest, Outputs};
use crate::identity::Identity;
use crate::os::{self, FileClass};

impl Outputs {
    /// Protects a source: later outputs must not be this file or device under any name, nor contain its
    /// bytes. A source that is no file (`None`) needs no protection.
    pub fn protect(&mut self, source: &Location, identity: Option<&Identity>) {
        self.protected.extend(identity.map(|identity| (source.clone(), identity.clone())));
    }

    /// Like [`Outputs::protect`], for a file that is not open, such as a file that an image names, or the
    /// backing image of an output. A file that does not exist needs no protection.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Io`] if stat(2) fails for another reason: no target can be compared with
    /// the source then.
    pub fn protect_path(&mut self, path: &Path) -> Result<()> {
        self.protected.extend(located(path)?);
        Ok(())
    }

    /// Like [`Outputs::protect_path`], for a file that the user allows images to open: it is a source or, under
    /// an image that exists and is written into, a part of the output.
    ///
    /// # Errors
    /// Same as [`Outputs::protect_path`].
    pub fn protect_allowed(&mut self, path: &Path) -> Result<()> {
        self.allowed.extend(located(path)?);
        Ok(())
    }

    /// Refuses the outputs that [`Outputs::create`] or [`Outputs::existing`] would refuse, before any file is
    /// opened or created. Only [`Outputs::existing`] itself checks the kind of its target, and whether it is
    /// in use.
    ///
    /// # Errors
    /// See [`Outputs::create`] and [`Outputs::existing`].
    pub fn check(&mut self, requests: &[OutputRequest]) -> Result<()> {
        let mut names: Vec<PathBuf> = Vec::new();
        let mut doubts = Vec::new();
        let mut claimed = self.claimed.clone();
        for request in requests {
            match request {
                OutputRequest::New { path, overwrite, links } => {
                    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                    let missing = parent.is_some_and(|parent| !parent.exists());
                    // A directory that does not exist yet contains no file to replace.
                    let final_path = if missing { path.clone() } else { final_path(path, *links)? };
                    if names.contains(&final_path) {
                        return Err(Error::usage("two outputs would write this file").path(path));
                    }
                    if let Some(meta) = self.check_target(path, &final_path, *overwrite, &claimed)? {
                        let identity = Identity::of(&meta, &final_path);
                        doubts.extend(self.doubts_about(path, identity.as_ref()));
                        claimed.extend(identity);
                    }
                    names.push(final_path);
                }
                OutputRequest::Existing(path) => {
                    let meta =
                        std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
                    let identity = Identity::of(&meta, path);
                    self.check_free(path, identity.as_ref(), &claimed)?;
                    doubts.extend(self.doubts_about(path, identity.as_ref()));
                    claimed.extend(identity);
                }
                OutputRequest::Stdout => self.check_stdout(&mut claimed)?,
            }
        }
        self.doubts = doubts;
        Ok(())
    }

    /// Returns a sentence for each source that may be the file `target` although the two look different.
    fn doubts_about(&self, path: &Path, target: Option<&Identity>) -> Vec<String> {
        let sources =
            self.protected.iter().filter(|(_, source)| target.is_some_and(|t| t.may_be_same(source)));
        let doubt = |(source, _): &(Location, Identity)| {
            format!(
                "{} could be the source {source}: one of them is on an overlay whose layers can't be seen from \
                 here",
                Location::from(path)
            )
        };
        sources.map(doubt).collect()
    }

    /// Refuses a target that can't or must not be replaced. Returns the metadata of the file to replace;
    /// `None` if there is no file.
    pub(super) fn check_target(
        &self,
        path: &Path,
        final_path: &Path,
        overwrite: bool,
        claimed: &[Identity],
    ) -> Result<Option<Metadata>> {
        let meta = match std::fs::metadata(final_path) {
            Ok(meta) => meta,
            Err(e) if is_missing(&e) => return Ok(None),
            // If stat(2) fails, the target could be a source.
            Err(e) => return Err(Error::io("stat the target", e).path(path)),
        };
        self.check_free(path, Identity::of(&meta, final_path).as_ref(), claimed)?;
        match os::classify(&meta) {
            FileClass::Regular if overwrite || is_vacant(final_path, &meta) => {
                refuse_foreign(final_path, &meta).map_err(|e| e.path(path))?;
                Ok(Some(meta))
            }
            FileClass::Regular => {
                Err(Error::refused("already exists").path(path).remedied_by(Remedy::Overwrite))
            }
            FileClass::Directory => Err(Error::refused("is a directory").path(path)),
            FileClass::BlockDevice => {
                Err(Error::refused("is a block device").path(path).remedied_by(Remedy::WriteIntoDevice))
            }
            FileClass::Stream => {
                Err(Error::refused("is neither a regular file nor a block device").path(path))
            }
        }
    }

    /// Refuses a target that is another output or a source, or that overlaps one.
    pub(super) fn check_free(
        &self,
        path: impl Into<Location>,
        target: Option<&Identity>,
        claimed: &[Identity],
    ) -> Result<()> {
        let Some(target) = target else { return Ok(()) };
        if claimed.iter().any(|other| other.overlaps(target)) {
            return Err(Error::usage("two outputs would write this file").path(path));
        }
        for (source, identity) in self.protected.iter().chain(&self.allowed) {
            if identity.is_same(target) {
                return Err(Error::refused(format!("source and target are the same file ({source})"))
                    .path(path)
                    .hint("give the new image another name"));
            }
            if identity.is_changed_by(target) {
                return Err(Error::refused(format!(
                    "writing to the target would change the source ({source})"
                ))
                .path(path)
                .hint("one of them is stored on the other"));
            }
        }
        Ok(())
    }

    /// Refuses standard output that is redirected into a source or another output. Otherwise adds it to
    /// `claimed`.
    fn check_stdout(&self, claimed: &mut Vec<Identity>) -> Result<()> {
        let Ok(stdout) = os::stdout() else { return Ok(()) };
        if let Some(identity) = Identity::of_file(&stdout) {
            self.check_free(&Location::Stdout, Some(&identity), claimed)?;
            claimed.push(identity);
        }
        Ok(())
    }
}

/// Refuses an existing file that this user can't replace since it is another one's, before its content is made.
fn refuse_foreign(path: &Path, meta: &Metadata) -> Result<()> {
    let directory = path.parent().and_then(|parent| std::fs::metadata(parent).ok());
    match directory.is_none_or(|directory| os::may_replace(&directory, meta)) || os::is_mount_point(path) {
        true => Ok(()),
        false => Err(Error::refused("is the file of another user in a sticky directory")
            .hint("only its owner can replace it: choose another name or directory")),
    }
}

/// True if an output may take the place of an existing file because it is empty, as mktemp(1) creates it. A file
/// can report no length and contain bytes.
fn is_vacant(path: &Path, meta: &Metadata) -> bool {
    let is_empty = || File::open(path).and_then(|file| os::is_empty(&file)).unwrap_or(false);
    meta.len() == 0 && !may_be_planted(path, meta) && is_empty()
}

/// True if another user may have put a file there to get at what a program writes to it.
pub(super) fn may_be_planted(path: &Path, meta: &Metadata) -> bool {
    let directory = path.parent().and_then(|parent| std::fs::metadata(parent).ok());
    directory.is_none_or(|directory| os::may_be_planted(&directory, meta))
}

/// Returns the location and identity of a file that must not be written; `None` if there is no file.
fn located(path: &Path) -> Result<Option<(Location, Identity)>> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(Identity::of(&meta, path).map(|identity| (path.into(), identity))),
        Err(e) if is_missing(&e) => Ok(None),
        Err(e) => Err(Error::io("stat the source", e).path(path)),
    }
}

/// True if stat(2) failed because the file does not exist.
fn is_missing(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Resolves the directory of `path`, and a symbolic link at `path` if `links` allows it, so that different
/// paths to one name become equal.
pub(super) fn final_path(path: &Path, links: Links) -> Result<PathBuf> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
        if links == Links::Refuse {
            return Err(Error::refused(
                "is a symbolic link; refusing to follow it, as the name comes from an image",
            )
            .path(path)
            .remedied_by(Remedy::NameTarget));
        }
        return std::fs::canonicalize(path).map_err(|e| {
            Error::io("follow the link", e)
                .path(path)
                .hint("the link leads nowhere: remove it, or name another file")
        });
    }
    let name = path.file_name().ok_or_else(|| Error::usage("is not a file name").path(path))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let found = std::fs::canonicalize(directory).map_err(|e| {
        let no_directory = e.kind() == io::ErrorKind::NotFound;
        let error = Error::io("create", e).path(path);
        let directory = directory.display();
        if no_directory {
            error.hint(format!("directory {directory} does not exist: create it first"))
        } else {
            error
        }
    })?;
    Ok(found.join(name))
}
