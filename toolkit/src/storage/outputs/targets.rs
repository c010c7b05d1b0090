//! What an output may be: no source, no other output, nothing that is in the way.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use super::{Links, Outputs, Wanted};
use crate::error::{Error, Result, escape_control};
use crate::storage::os::{self, FileClass, FileId};

/// What standard output is called in messages: `-` would be taken for standard input.
const STDOUT: &str = "standard output";

impl Outputs {
    /// Refuses outputs that are this file under any name, or a device that it lies on: it is a
    /// source. `-` is standard input. What is not there needs no protection.
    ///
    /// # Errors
    /// When the source can't be looked at: it could not be told from a target then.
    pub fn protect(&mut self, source: &Path) -> Result<()> {
        let meta = if source == Path::new("-") { stdin_metadata() } else { std::fs::metadata(source) };
        let meta = match meta {
            Ok(meta) => meta,
            Err(e) if is_nothing(&e) => return Ok(()),
            Err(e) => return Err(Error::io("look at the source", e).path(source)),
        };
        if matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice) {
            self.protected.push((source.to_owned(), os::file_layers(&meta, true)));
        }
        Ok(())
    }

    /// Refuses what [`Outputs::create`] and the others would refuse, for all outputs of a run, before
    /// anything is opened or made.
    ///
    /// # Errors
    /// Those of [`Outputs::create`] and [`Outputs::existing`].
    pub fn check(&self, wanted: &[Wanted]) -> Result<()> {
        let mut names: Vec<PathBuf> = Vec::new();
        let mut taken = self.taken.clone();
        for output in wanted {
            match output {
                Wanted::New { path, overwrite, links } => {
                    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                    let missing = parent.is_some_and(|parent| !parent.exists());
                    // In a directory that is not there yet nothing is in the way.
                    let final_path = if missing { path.clone() } else { final_path(path, *links)? };
                    if names.contains(&final_path) {
                        return Err(Error::usage("two outputs would be this file").path(path));
                    }
                    if let Some(meta) = self.check_target(path, &final_path, *overwrite, &taken)? {
                        taken.push(os::file_layers(&meta, false));
                    }
                    names.push(final_path);
                }
                Wanted::Existing(path) => {
                    let meta =
                        std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
                    self.check_free(path, &meta, &taken)?;
                    taken.push(os::file_layers(&meta, false));
                }
                Wanted::Stdout => self.check_stdout(&mut taken)?,
            }
        }
        Ok(())
    }

    /// Refuses a target that can't be, or may not be, replaced; what is there now.
    pub(super) fn check_target(
        &self,
        path: &Path,
        final_path: &Path,
        overwrite: bool,
        taken: &[Vec<FileId>],
    ) -> Result<Option<Metadata>> {
        let meta = match std::fs::metadata(final_path) {
            Ok(meta) => meta,
            Err(e) if is_nothing(&e) => return Ok(None),
            // What can't be looked at may be a source.
            Err(e) => return Err(Error::io("look at the target", e).path(path)),
        };
        self.check_free(path, &meta, taken)?;
        match os::classify(&meta) {
            FileClass::Regular if overwrite => Ok(Some(meta)),
            FileClass::Regular => Err(Error::refused("exists")
                .path(path)
                .hint("--force overwrites it; -n writes one disk into it")),
            FileClass::Directory => Err(Error::refused("is a directory").path(path)),
            FileClass::BlockDevice => Err(Error::refused("is a block device")
                .path(path)
                .hint("write into it with -n, or with --target NAME=PATH")),
            FileClass::Stream => {
                Err(Error::refused("is neither a regular file nor a block device").path(path))
            }
        }
    }

    /// Refuses what is a source, or another output.
    pub(super) fn check_free(&self, path: &Path, meta: &Metadata, taken: &[Vec<FileId>]) -> Result<()> {
        let layers = os::file_layers(meta, false);
        if taken.iter().any(|other| os::same_bytes(other, &layers)) {
            return Err(Error::usage("two outputs would be this file").path(path));
        }
        for (source, beneath) in &self.protected {
            let source_name = escape_control(&source.to_string_lossy());
            if beneath[0] == layers[0] {
                let text = format!("source and target are the same file ({source_name})");
                return Err(Error::refused(text).path(path).hint("give the new image another name"));
            }
            if os::same_bytes(beneath, &layers) {
                let text = format!("writing to the target would change the source ({source_name})");
                return Err(Error::refused(text)
                    .path(path)
                    .hint("one of them is a device on top of the other, or holds it"));
            }
        }
        Ok(())
    }

    /// Refuses standard output when it leads into a source or into another output.
    fn check_stdout(&self, taken: &mut Vec<Vec<FileId>>) -> Result<()> {
        let Ok(meta) = stdout_metadata() else { return Ok(()) };
        if matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice) {
            self.check_free(Path::new(STDOUT), &meta, taken)?;
            taken.push(os::file_layers(&meta, false));
        }
        Ok(())
    }
}

/// Whether a question failed since nothing is there, or nobody could tell on this system.
fn is_nothing(e: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, Unsupported};
    matches!(e.kind(), NotFound | NotADirectory | Unsupported)
}

/// Where a file called `path` will be: the directory is resolved, and a link if it is to be followed.
pub(super) fn final_path(path: &Path, links: Links) -> Result<PathBuf> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
        if links == Links::Refuse {
            return Err(Error::refused("is a symbolic link, and names that an image gives are not followed")
                .path(path)
                .hint("remove the link, or send the disk where it leads with --target NAME=PATH"));
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
        let is_missing = e.kind() == io::ErrorKind::NotFound;
        let error = Error::io("create", e).path(path);
        let directory = directory.display();
        if is_missing {
            error.hint(format!("there is no directory {directory}: make it first"))
        } else {
            error
        }
    })?;
    Ok(found.join(name))
}

#[cfg(unix)]
fn stdin_metadata() -> io::Result<Metadata> {
    use std::os::fd::AsFd;
    File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata()
}

#[cfg(unix)]
fn stdout_metadata() -> io::Result<Metadata> {
    use std::os::fd::AsFd;
    File::from(io::stdout().as_fd().try_clone_to_owned()?).metadata()
}

#[cfg(not(unix))]
fn stdin_metadata() -> io::Result<Metadata> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(unix))]
fn stdout_metadata() -> io::Result<Metadata> {
    Err(io::ErrorKind::Unsupported.into())
}
