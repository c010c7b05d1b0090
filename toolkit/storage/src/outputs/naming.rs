//! Renames finished files to their final names, and undoes the renames if one of them fails.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Output, Remedy, Result};

use crate::os::{self, FileId};

/// A file that has a temporary name until it is finished.
#[derive(Debug)]
pub(super) struct PendingFile {
    pub(super) output: Output,
    /// Path after the rename. Its directory is resolved, so a file has only one such path.
    pub(super) final_path: PathBuf,
    pub(super) temporary: TempPath,
    pub(super) overwrite: bool,
}

impl PendingFile {
    /// Renames the finished file to its final name.
    pub(super) fn rename(self) -> Result<NamedFile> {
        let path = self.final_path;
        let failed = |e| rename_error(e, &path);
        let id =
            self.output.file().and_then(|file| file.metadata().ok()).map(|meta| os::file_identity(&meta));
        // The temporary name must still belong to the file that was written.
        match std::fs::symlink_metadata(&self.temporary) {
            Ok(meta) if id.is_none_or(|id| id == os::file_identity(&meta)) => {}
            Ok(_) => {
                // The file belongs to another program: keep it.
                let other = self.temporary.keep().map(|other| display(&other)).unwrap_or_default();
                return Err(Error::refused("another file has replaced the unfinished output")
                    .path(&path)
                    .hint(format!("inspect {other}, and convert again")));
            }
            Err(e) => return Err(failed(e)),
        }
        if self.overwrite && path.exists() {
            // An exchange keeps the old file until every output has its final name.
            if os::exchange_names(&self.temporary, &path).map_err(failed)? {
                return Ok(NamedFile { path, id, old: Some(self.temporary) });
            }
            self.temporary.persist(&path).map_err(|e| failed(e.error))?;
        } else {
            self.temporary.persist_noclobber(&path).map_err(|e| failed(e.error))?;
        }
        Ok(NamedFile { path, id, old: None })
    }
}

/// Returns the error for a rename that failed, with a hint if there is a remedy.
fn rename_error(e: io::Error, path: &Path) -> Error {
    use io::ErrorKind::{AlreadyExists, NotFound, PermissionDenied, ResourceBusy};
    let hint = match e.kind() {
        AlreadyExists => {
            return Error::io("give the finished output its name", e)
                .path(path)
                .remedied_by(Remedy::Overwrite);
        }
        NotFound => Some("the directory, or the unfinished output in it, was moved or removed meanwhile"),
        PermissionDenied => Some(
            "the old file or the directory is write-protected (lsattr shows 'i' or 'a', or the directory is sticky)",
        ),
        ResourceBusy => Some("it is a mount point: unmount it, or write into it in place"),
        _ => None,
    };
    let error = Error::io("rename the finished output", e).path(path);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// An output that has its final name.
pub(super) struct NamedFile {
    pub(super) path: PathBuf,
    pub(super) id: Option<FileId>,
    /// The replaced file under a temporary name. Dropping it removes the file.
    pub(super) old: Option<TempPath>,
}

impl NamedFile {
    /// Undoes the rename, unless another program has replaced the file. Returns the path if that fails.
    pub(super) fn undo(self) -> Option<PathBuf> {
        let ours = std::fs::symlink_metadata(&self.path).ok().map(|meta| os::file_identity(&meta)) == self.id;
        if !ours {
            // Another program has put a file there: keep it.
            return None;
        }
        let undone = match &self.old {
            Some(old) => os::exchange_names(old, &self.path).map(|_| ()),
            None => std::fs::remove_file(&self.path),
        };
        undone.is_err().then_some(self.path)
    }
}

/// Undoes all renames, last first. Returns `error` with a hint that names the files whose rename could
/// not be undone.
pub(super) fn roll_back(named: Vec<NamedFile>, error: Error) -> Error {
    let stuck: Vec<String> =
        named.into_iter().rev().filter_map(NamedFile::undo).map(|path| display(&path)).collect();
    if stuck.is_empty() {
        return error;
    }
    error.hint(format!(
        "finished without the other outputs, and its name could not be taken back: {}",
        stuck.join(", ")
    ))
}

fn display(path: &Path) -> String {
    escape_control(&path.to_string_lossy())
}

/// Flushes directories, so that new names survive a crash. Ignores a directory that can't be opened or
/// flushed, since the files themselves are flushed already.
pub(super) fn sync_directories(mut directories: Vec<&Path>) -> Result<()> {
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        match File::open(directory).and_then(|file| file.sync_all()) {
            Err(e) if is_sync_failure(&e) => {
                return Err(Error::io("flush the directory", e).path(directory));
            }
            _ => {}
        }
    }
    Ok(())
}

/// True if a flush failed; false if the directory can't be opened or does not support flushing.
fn is_sync_failure(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotFound, PermissionDenied, Unsupported};
    !matches!(e.kind(), InvalidInput | IsADirectory | NotFound | PermissionDenied | Unsupported)
}
