//! Renames that trust the inodes more than the result of the call.
//!
//! A rename can be done although the call reports failure: NFS repeats a request whose answer was lost, and
//! the repetition finds the old name gone; file systems in user space report errors of later steps. After a
//! failure, the functions look which inode has which name. What they report is true of the names.

use std::ffi::{OsStr, OsString};
use std::io;

use crate::folder::{Entry, Naming, Temporary};
use crate::os::{self, Rename};

/// Gives a file the name `to`, which must be free.
///
/// # Errors
/// `AlreadyExists` if the name is not free; `Unsupported` if the file system can't do it in this way. The
/// file has only its old name then.
pub(super) fn to_free_name(file: &Entry, to: &OsStr, naming: Naming) -> io::Result<()> {
    let handle = &file.folder.handle;
    match naming {
        Naming::NoReplace => match handle.rename(&file.name, to, Rename::NoReplace) {
            Ok(()) => Ok(()),
            Err(e) => unless_done(file, to, e),
        },
        Naming::Link => match handle.link(&file.name, to) {
            Ok(()) => remove_old_name(file, to, None),
            Err(e) => unless_done(file, to, e),
        },
        Naming::Reserve => reserve_and_rename(file, to),
    }
}

/// Gives a file the name `to`. It replaces a file that has the name.
fn over(file: &Entry, to: &OsStr) -> io::Result<()> {
    match file.folder.handle.rename(&file.name, to, Rename::Replace) {
        Ok(()) => Ok(()),
        Err(e) => unless_done(file, to, e),
    }
}

/// Returns the error of a rename or link, unless it was done.
fn unless_done(file: &Entry, to: &OsStr, error: io::Error) -> io::Result<()> {
    if file.folder.handle.holds(to, file.id) { remove_old_name(file, to, Some(error)) } else { Err(error) }
}

/// Removes the old name of a file that has its new one. If that fails, removes the new name instead.
fn remove_old_name(file: &Entry, to: &OsStr, error: Option<io::Error>) -> io::Result<()> {
    if file.remove_file() {
        return Ok(());
    }
    Entry { name: to.to_owned(), ..file.clone() }.remove_file();
    Err(error.unwrap_or_else(|| io::Error::other("the file system does not remove the temporary name")))
}

/// Reserves a free name by an empty file, which the file then replaces.
fn reserve_and_rename(file: &Entry, to: &OsStr) -> io::Result<()> {
    let handle = &file.folder.handle;
    // The empty file stays open to the end, so that no other one gets its inode number.
    let empty = handle.create_file(to)?;
    let meta = empty.metadata().inspect_err(|_| {
        // The file was created just now, so it is ours.
        let _ = handle.remove_file(to);
    })?;
    let reserved = Entry { name: to.to_owned(), id: os::file_identity(&meta), ..file.clone() };
    let withdraw = |_: &io::Error| {
        reserved.remove_file();
    };
    let found = handle.look_up(to).inspect_err(withdraw)?;
    if found.id != reserved.id || found.len != 0 {
        // Another program has put its file there, or has written to the empty one.
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    over(file, to).inspect_err(withdraw)
}

/// Finds out how files of the directory can get a name that must be free, by renaming `file` to `spare`,
/// another temporary name.
///
/// # Errors
/// If the file system renames in no way.
pub(super) fn probe(file: &mut Entry, spare: OsString) -> io::Result<Naming> {
    for naming in [Naming::NoReplace, Naming::Link] {
        match to_free_name(file, &spare, naming) {
            Ok(()) => {
                file.name = spare;
                return Ok(naming);
            }
            // Without links, link(2) fails with one of many codes. The next way reports any other cause.
            Err(e) if e.kind() == io::ErrorKind::Unsupported || naming == Naming::Link => {}
            Err(e) => return Err(e),
        }
    }
    reserve_and_rename(file, &spare)?;
    file.name = spare;
    Ok(Naming::Reserve)
}

/// The file that another one has replaced.
#[derive(Debug)]
pub(super) enum Replaced {
    /// It is kept under a temporary name.
    Kept(Temporary),
    /// The file system can't keep it.
    Lost,
}

/// Error of a replacement that was not done, with the place of the old file if it has lost its name.
#[derive(Debug)]
pub(super) struct NotReplaced {
    pub(super) error: io::Error,
    pub(super) old: Option<Entry>,
}

/// Gives a file the name `to` of an existing file, and keeps that file under a temporary name if the file
/// system can exchange names or link. `spare` is another temporary name.
///
/// # Errors
/// The old file has its name then, unless [`NotReplaced`] says where it is.
pub(super) fn replace(file: &Entry, to: &OsStr, spare: OsString) -> Result<Replaced, NotReplaced> {
    let handle = &file.folder.handle;
    let failed = |error| NotReplaced { error, old: None };
    let old = handle.look_up(to).map_err(failed)?;
    if !old.is_regular {
        // Checked when the output was created, but an exchange of names would also move a directory.
        return Err(failed(io::Error::other(
            "the name belongs to a directory or another special file by now",
        )));
    }
    let old_id = old.id;
    match handle.rename(&file.name, to, Rename::Exchange) {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
        Err(e) if !handle.holds(to, file.id) => return Err(failed(e)),
        _ => {
            // The inode may be one that the name got after `old_id` was read.
            let id = handle.look_up(&file.name).map_or(old_id, |found| found.id);
            return Ok(Replaced::Kept(Temporary::new(Entry { id, ..file.clone() })));
        }
    }
    let backup = Entry { name: spare, id: old_id, ..file.clone() };
    // A link that reports failure may have been made. Without one, the file is replaced all the same.
    let _ = handle.link(to, &backup.name);
    let backup = backup.is_there().then(|| Temporary::new(backup));
    match over(file, to) {
        Ok(()) => Ok(backup.map_or(Replaced::Lost, Replaced::Kept)),
        // Dropping the backup removes it.
        Err(error) if handle.holds(to, old_id) => Err(failed(error)),
        Err(error) => Err(NotReplaced { error, old: backup.and_then(Temporary::keep) }),
    }
}

/// Gives a replaced file its name back. It replaces the file that has the name by now.
///
/// # Errors
/// Returns the place of the file if that failed.
pub(super) fn restore(old: Temporary, name: &OsStr) -> Result<(), Option<Entry>> {
    match old.entry().map(|entry| over(entry, name)) {
        Some(Err(_)) => Err(old.keep()),
        _ => Ok(()),
    }
}
