//! How finished files get their final names, and how names are taken back.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::Output;
use crate::error::{Error, Result, escape_control};
use crate::storage::os::{self, FileId};

/// A file in the making.
pub(super) struct PendingFile {
    pub(super) output: Output,
    /// Where it will be: the directory resolved, so that one file has one such path.
    pub(super) final_path: PathBuf,
    pub(super) temporary: TempPath,
    pub(super) overwrite: bool,
}

impl PendingFile {
    /// Renames the finished file to its final name.
    pub(super) fn give_name(self) -> Result<Named> {
        let path = self.final_path;
        let failed = |e| naming_failed(e, &path);
        let id =
            self.output.file().and_then(|file| file.metadata().ok()).map(|meta| os::file_identity(&meta));
        // What is going to be renamed is what was written.
        match std::fs::symlink_metadata(&self.temporary) {
            Ok(meta) if id.is_none_or(|id| id == os::file_identity(&meta)) => {}
            Ok(_) => {
                // It is not ours to remove.
                let other = self.temporary.keep().map(|other| shown(&other)).unwrap_or_default();
                return Err(Error::refused("another file took the place of the unfinished output")
                    .path(&path)
                    .hint(format!("look at {other}, and convert again")));
            }
            Err(e) => return Err(failed(e)),
        }
        if self.overwrite && path.exists() {
            // The old file keeps a name until every output has its own.
            if os::exchange_names(&self.temporary, &path).map_err(failed)? {
                return Ok(Named { path, id, old: Some(self.temporary) });
            }
            self.temporary.persist(&path).map_err(|e| failed(e.error))?;
        } else {
            self.temporary.persist_noclobber(&path).map_err(|e| failed(e.error))?;
        }
        Ok(Named { path, id, old: None })
    }
}

/// Why the name could not be given, and what to do about it.
fn naming_failed(e: io::Error, path: &Path) -> Error {
    use io::ErrorKind::{AlreadyExists, NotFound, PermissionDenied, ResourceBusy};
    let hint = match e.kind() {
        AlreadyExists => Some("it was made by somebody else meanwhile; --force overwrites it"),
        NotFound => Some("the directory, or the unfinished output in it, was moved or removed meanwhile"),
        PermissionDenied => Some(
            "the old file or the directory may not be changed (lsattr shows 'i' or 'a'; a sticky directory)",
        ),
        ResourceBusy => Some("something is mounted there: unmount it, or write into it with -n"),
        _ => None,
    };
    let error = Error::io("give the finished output its name", e).path(path);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// An output that has its final name; `old` is the file that had it before, removed when dropped.
pub(super) struct Named {
    pub(super) path: PathBuf,
    pub(super) id: Option<FileId>,
    pub(super) old: Option<TempPath>,
}

impl Named {
    /// Takes the final name back; the path, when that fails.
    pub(super) fn undo(self) -> Option<PathBuf> {
        let ours = std::fs::symlink_metadata(&self.path).ok().map(|meta| os::file_identity(&meta)) == self.id;
        if !ours {
            // Somebody has put another file there: it is not ours to remove.
            return None;
        }
        let undone = match &self.old {
            Some(old) => os::exchange_names(old, &self.path).map(|_| ()),
            None => std::fs::remove_file(&self.path),
        };
        undone.is_err().then_some(self.path)
    }
}

/// Takes the names back that were given; the error then, with what could not be taken back.
pub(super) fn taken_back(named: Vec<Named>, error: Error) -> Error {
    let stuck: Vec<String> =
        named.into_iter().rev().filter_map(Named::undo).map(|path| shown(&path)).collect();
    if stuck.is_empty() {
        return error;
    }
    error.hint(format!(
        "finished, but without the others, and its name could not be taken back: {}",
        stuck.join(", ")
    ))
}

fn shown(path: &Path) -> String {
    escape_control(&path.to_string_lossy())
}

/// Makes new names durable. Where a directory can't be flushed at all that is no error: the files
/// themselves are flushed already.
pub(super) fn sync_directories(mut directories: Vec<&Path>) -> Result<()> {
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        match File::open(directory).and_then(|file| file.sync_all()) {
            Err(e) if is_failure(&e) => {
                return Err(Error::io("flush the directory", e).path(directory));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether flushing a directory failed, rather than not being offered.
fn is_failure(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotFound, PermissionDenied, Unsupported};
    !matches!(e.kind(), InvalidInput | IsADirectory | NotFound | PermissionDenied | Unsupported)
}
