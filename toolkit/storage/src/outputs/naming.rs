//! Gives finished files their final names, and takes the names back if one of them fails.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Output, Remedy, Result};

use super::rename::{self, NotReplaced, Replaced};
use crate::folder::{Entry, Folder, Naming, Temporary};
use crate::os;
use crate::partial;

/// A file that has a temporary name until it is finished.
#[derive(Debug)]
pub(super) struct PendingFile {
    pub(super) output: Output,
    /// Path after the rename. Its directory is resolved, so a file has only one such path.
    pub(super) final_path: PathBuf,
    pub(super) final_name: OsString,
    pub(super) temporary: Temporary,
    pub(super) replaces: Replaces,
}

/// Existing file that an output may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaces {
    /// None: the name must be free.
    Nothing,
    /// A file that is still empty.
    Empty,
    /// Any file.
    Anything,
}

impl PendingFile {
    /// Renames the finished file to its final name.
    pub(super) fn rename(self) -> Result<NamedFile> {
        let path = self.final_path.clone();
        let file = self.current()?;
        let folder = &file.folder;
        let found = folder.handle.look_up(&self.final_name).ok();
        if self.replaces == Replaces::Empty && found.is_some_and(|found| found.len > 0) {
            return Err(filled_error(&path));
        }
        let old = if self.replaces != Replaces::Nothing && found.is_some() {
            let spare = partial::new_name(&self.final_name.to_string_lossy());
            let old = rename::replace(&file, &self.final_name, spare).map_err(|e| replace_error(e, &path))?;
            Some(self.check_vacant(old)?)
        } else {
            // The creation of the first file has set the way.
            let naming = folder.naming.get().copied().unwrap_or(Naming::NoReplace);
            rename::to_free_name(&file, &self.final_name, naming).map_err(|e| rename_error(e, &path))?;
            None
        };
        let named = Entry { name: self.final_name.clone(), ..file.clone() };
        Ok(NamedFile { path, output: self.output.clone(), named, old })
    }

    /// Gives the replaced file its name back if it should have been empty and is not any more: another program
    /// has filled it.
    fn check_vacant(&self, old: Replaced) -> Result<Replaced> {
        let is_filled = |old: &Temporary| {
            let found = old.entry().and_then(|entry| entry.folder.handle.look_up(&entry.name).ok());
            found.is_some_and(|found| found.len > 0)
        };
        match old {
            Replaced::Kept(old) if self.replaces == Replaces::Empty && is_filled(&old) => {
                let error = filled_error(&self.final_path);
                Err(match rename::restore(old, &self.final_name) {
                    Err(Some(old)) => error.hint(format!("it is {} by now", display(&old.path()))),
                    _ => error,
                })
            }
            old => Ok(old),
        }
    }

    /// Returns the temporary name with the current inode of the written file, to which the name must still
    /// belong.
    fn current(&self) -> Result<Entry> {
        let path = &self.final_path;
        let Some(known) = self.temporary.entry() else {
            return Err(rename_error(io::ErrorKind::NotFound.into(), path));
        };
        let found = known.folder.handle.look_up(&known.name).map_err(|e| rename_error(e, path))?;
        if found.id == current_id(&self.output, known.id) {
            return Ok(Entry { id: found.id, ..known.clone() });
        }
        // The file belongs to another program: keep it.
        let other = display(&known.path());
        Err(Error::refused("another file has replaced the unfinished output")
            .path(path)
            .hint(format!("inspect {other}, and convert again")))
    }
}

/// Returns the inode of an output. Some file systems change it with the name, so `before` may be old.
fn current_id(output: &Output, before: os::FileId) -> os::FileId {
    output.file().and_then(|file| file.metadata().ok()).map_or(before, |meta| os::file_identity(&meta))
}

/// Fails if the directory of an output was moved, removed or replaced: the output would not get the name that
/// the user has chosen.
pub(super) fn check_in_place(files: &[PendingFile]) -> Result<()> {
    for file in files {
        if file.temporary.entry().is_some_and(|entry| !entry.folder.is_in_place()) {
            return Err(Error::refused("the directory was moved or removed while the output was written")
                .path(&file.final_path)
                .hint("no output was kept, also not in the moved directory: convert again"));
        }
    }
    Ok(())
}

/// Returns the error for an empty file that another program has filled meanwhile.
fn filled_error(path: &Path) -> Error {
    Error::refused("was empty, but another program has written to it meanwhile")
        .path(path)
        .hint("its content was kept: choose another name, or convert again")
}

/// Returns the error for a file that was not replaced, and says where the old one is.
fn replace_error(failed: NotReplaced, path: &Path) -> Error {
    let error = rename_error(failed.error, path);
    match failed.old {
        Some(old) => error.hint(format!("the old file is {}", display(&old.path()))),
        None => error,
    }
}

/// Returns the error for a rename that failed, with a hint if there is a remedy.
pub(super) fn rename_error(e: io::Error, path: &Path) -> Error {
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
#[derive(Debug)]
pub(super) struct NamedFile {
    pub(super) path: PathBuf,
    pub(super) output: Output,
    /// The final name and the inode at the time of the rename.
    pub(super) named: Entry,
    /// The file that had the name before. Dropping it removes the file.
    pub(super) old: Option<Replaced>,
}

impl NamedFile {
    /// Undoes the rename, unless another program has replaced the file. If that fails, returns what is left,
    /// for the user.
    pub(super) fn undo(self) -> Option<String> {
        let named = Entry { id: current_id(&self.output, self.named.id), ..self.named };
        let found = named.folder.handle.look_up(&named.name);
        let is_missing = found.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        let is_ours = found.is_ok_and(|found| found.id == named.id);
        let path = display(&self.path);
        match self.old {
            Some(Replaced::Kept(old)) if is_ours || is_missing => {
                let place = rename::restore(old, &named.name).err()?;
                let place = place.map_or_else(String::new, |old| display(&old.path()));
                Some(format!("{path} (the old file is {place})"))
            }
            Some(Replaced::Lost) if is_ours => {
                Some(format!("{path} (the file system could not keep the old file)"))
            }
            // Another program has put a file there: keep it.
            _ if !is_ours => None,
            _ => (!named.remove_file()).then_some(path),
        }
    }
}

/// Undoes all renames, last first. Returns `error` with a hint that names the files whose rename could
/// not be undone.
pub(super) fn roll_back(named: Vec<NamedFile>, error: Error) -> Error {
    let stuck: Vec<String> = named.into_iter().rev().filter_map(NamedFile::undo).collect();
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

/// Flushes directories, so that new names survive a crash. Ignores a directory that does not support
/// flushing, since the files themselves are flushed already.
pub(super) fn sync_directories(mut folders: Vec<&Arc<Folder>>) -> Result<()> {
    folders.sort_unstable_by_key(|folder| Arc::as_ptr(folder));
    folders.dedup_by_key(|folder| Arc::as_ptr(folder));
    for folder in folders {
        match folder.handle.sync() {
            Err(e) if is_sync_failure(&e) => {
                return Err(Error::io("flush the directory", e).path(&folder.path));
            }
            _ => {}
        }
    }
    Ok(())
}

/// True if a flush failed; false if the directory does not support flushing.
fn is_sync_failure(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotFound, PermissionDenied, Unsupported};
    !matches!(e.kind(), InvalidInput | IsADirectory | NotFound | PermissionDenied | Unsupported)
}
