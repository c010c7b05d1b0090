//! Checks of a target: no source, no other output, nothing in the way.

use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};

use super::{Links, Outputs, Wanted};
use crate::error::{Error, Result, escape_control};
use crate::storage::os::{self, FileClass, FileId};

/// Name of standard output in messages: `-` would read as standard input.
const STDOUT: &str = "standard output";

impl Outputs {
    /// Refuses outputs that are the source `source` under any name, or a device below it. `-` is
    /// standard input. A missing file needs no protection.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if stat(2) fails: no target could be compared with the source then.
    pub fn protect(&mut self, source: &Path) -> Result<()> {
        let meta = if source == Path::new("-") { os::stdin_metadata() } else { std::fs::metadata(source) };
        let meta = match meta {
            Ok(meta) => meta,
            Err(e) if is_missing(&e) => return Ok(()),
            Err(e) => return Err(Error::io("stat the source", e).path(source)),
        };
        if matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice) {
            self.protected.push((source.to_owned(), os::file_layers(&meta, true)));
        }
        Ok(())
    }

    /// Refuses, before any file is opened or created, every output of a run that [`Outputs::create`] or
    /// [`Outputs::existing`] would refuse.
    ///
    /// # Errors
    /// See [`Outputs::create`] and [`Outputs::existing`].
    pub fn check(&self, wanted: &[Wanted]) -> Result<()> {
        let mut names: Vec<PathBuf> = Vec::new();
        let mut taken = self.taken.clone();
        for output in wanted {
            match output {
                Wanted::New { path, overwrite, links } => {
                    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                    let missing = parent.is_some_and(|parent| !parent.exists());
                    // A directory that does not exist yet has nothing in the way.
                    let final_path = if missing { path.clone() } else { final_path(path, *links)? };
                    if names.contains(&final_path) {
                        return Err(Error::usage("two outputs would write this file").path(path));
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

    /// Refuses a target that can't or must not be replaced. Returns the metadata of the file to replace.
    pub(super) fn check_target(
        &self,
        path: &Path,
        final_path: &Path,
        overwrite: bool,
        taken: &[Vec<FileId>],
    ) -> Result<Option<Metadata>> {
        let meta = match std::fs::metadata(final_path) {
            Ok(meta) => meta,
            Err(e) if is_missing(&e) => return Ok(None),
            // A target without metadata could be a source.
            Err(e) => return Err(Error::io("stat the target", e).path(path)),
        };
        self.check_free(path, &meta, taken)?;
        match os::classify(&meta) {
            FileClass::Regular if overwrite => Ok(Some(meta)),
            FileClass::Regular => Err(Error::refused("already exists")
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

    /// Refuses a target that is a source or another output.
    pub(super) fn check_free(&self, path: &Path, meta: &Metadata, taken: &[Vec<FileId>]) -> Result<()> {
        let layers = os::file_layers(meta, false);
        if taken.iter().any(|other| os::same_bytes(other, &layers)) {
            return Err(Error::usage("two outputs would write this file").path(path));
        }
        for (source, source_layers) in &self.protected {
            let source_name = escape_control(&source.to_string_lossy());
            if source_layers[0] == layers[0] {
                let text = format!("source and target are the same file ({source_name})");
                return Err(Error::refused(text).path(path).hint("give the new image another name"));
            }
            if os::same_bytes(source_layers, &layers) {
                let text = format!("writing to the target would change the source ({source_name})");
                return Err(Error::refused(text)
                    .path(path)
                    .hint("one of them is a device on top of the other, or holds it"));
            }
        }
        Ok(())
    }

    /// Refuses standard output that is redirected into a source or another output.
    fn check_stdout(&self, taken: &mut Vec<Vec<FileId>>) -> Result<()> {
        let Ok(meta) = os::stdout_metadata() else { return Ok(()) };
        if matches!(os::classify(&meta), FileClass::Regular | FileClass::BlockDevice) {
            self.check_free(Path::new(STDOUT), &meta, taken)?;
            taken.push(os::file_layers(&meta, false));
        }
        Ok(())
    }
}

/// True if stat(2) failed because the file does not exist.
fn is_missing(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Resolves the directory of `path`, and a symbolic link at `path` if `links` allows it, so that every
/// name of a file gives the same path.
pub(super) fn final_path(path: &Path, links: Links) -> Result<PathBuf> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
        if links == Links::Refuse {
            return Err(Error::refused(
                "is a symbolic link; refusing to follow it, as the name comes from an image",
            )
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
