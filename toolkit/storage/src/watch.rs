//! [`FileWatch`], which notices that a source changes while it is read.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use imgtool_core::{Location, Result};

use crate::image_lock::{self, ImageLock, Sharing};
use crate::os::{self, FileClass, FileId};

/// Watch over a regular file or block device that is read as a source.
///
/// It examines the open file, not its name: a rename, a replaced file and a link to another file do not hide
/// a change. The name is examined as well, since its user may expect the file that it leads to now.
#[derive(Debug, Clone)]
pub struct FileWatch {
    location: Location,
    file: Arc<File>,
    /// State of a regular file. A block device has none.
    before: Option<FileState>,
    lock: ImageLock,
    /// Where a file system on it was mounted for writing when it was opened.
    mount: Option<String>,
}

/// State of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileState {
    len: u64,
    /// Time of the last write, in seconds and nanoseconds. Programs can set it.
    modified: (i64, i64),
    /// Time of the last change of content or attributes. Only the kernel sets it.
    changed: (i64, i64),
}

impl FileState {
    fn of(meta: &Metadata) -> Self {
        Self {
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl FileWatch {
    /// Locks the open file `file`, which `location` named, against other programs that write it, and starts to
    /// watch it; `None` if it is neither a regular file nor a block device.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if another program may write it.
    pub(crate) fn start(location: &Location, file: &Arc<File>, sharing: Sharing) -> Result<Option<Self>> {
        let Ok(meta) = file.metadata() else { return Ok(None) };
        let before = match os::classify(&meta) {
            FileClass::Regular => Some(FileState::of(&meta)),
            FileClass::BlockDevice => None,
            FileClass::Stream | FileClass::Directory => return Ok(None),
        };
        let lock = image_lock::for_reading(file, sharing).map_err(|e| e.path(location))?;
        let mount = os::writable_mount_over(&meta);
        Ok(Some(Self { location: location.clone(), file: Arc::clone(file), before, lock, mount }))
    }

    /// Describes, in a sentence each, why the result may mix two states: another program or a file system may write
    /// the file, or it has changed since it was opened (its content, its attributes, or the file that its name leads to).
    pub fn changes(&self) -> Vec<String> {
        let location = &self.location;
        let mut changes = Vec::new();
        match self.lock {
            ImageLock::Safe => {}
            ImageLock::Written => changes.push(format!(
                "{location} was in use by another program that may write it: the result may mix two states"
            )),
            ImageLock::Unavailable => changes.push(format!(
                "{location} can't be locked on its file system: a program that writes it may go unnoticed"
            )),
        }
        if let Some(point) = &self.mount {
            changes.push(format!(
                "{location} is mounted for writing at {point}: the result may mix two states, unmount it first"
            ));
        }
        self.add_changes(&mut changes);
        changes
    }

    /// Adds a sentence for each change since the file was opened.
    fn add_changes(&self, changes: &mut Vec<String>) {
        // A file whose state can't be read any more fails to be read as well.
        let (Ok(meta), Some(before)) = (self.file.metadata(), self.before) else { return };
        let now = FileState::of(&meta);
        let location = &self.location;
        if (now.len, now.modified) != (before.len, before.modified) {
            changes.push(format!(
                "{location} was written to while it was read: the result may mix two states, run it again"
            ));
        } else if now.changed != before.changed {
            // A write whose modification time was set back looks the same as a chmod or rename.
            changes.push(format!(
                "the attributes of {location} changed while it was read: if its content changed too, the \
                 result may mix two states"
            ));
        }
        if location.path().is_some_and(|path| !leads_to(path, os::file_identity(&meta))) {
            changes.push(format!(
                "the name {location} no longer leads to the file that was read: it was renamed, removed or \
                 replaced"
            ));
        }
    }
}

/// True if `path` leads to the file `id`.
fn leads_to(path: &Path, id: FileId) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| os::file_identity(&meta) == id)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::FileTimes;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Watches a file through a symbolic link while `meanwhile` changes something. Returns the changes.
    fn watched(meanwhile: impl FnOnce(&Path)) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"content").unwrap();
        std::fs::write(dir.path().join("other"), b"another").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let path = dir.path().join("link");
        let file = Arc::new(File::open(&path).unwrap());
        let watch = FileWatch::start(&Location::from(&path), &file, Sharing::Refused).unwrap().unwrap();
        // Times have the granularity of the kernel's clock tick: 10 ms at most.
        std::thread::sleep(std::time::Duration::from_millis(30));
        meanwhile(dir.path());
        watch.changes()
    }

    fn write(path: &Path) {
        File::options().write(true).open(path).unwrap().write_all(b"changed").unwrap();
    }

    #[track_caller]
    fn says(changes: &[String], words: &[&str]) {
        assert_eq!(changes.len(), words.len(), "{changes:?}");
        for (change, word) in changes.iter().zip(words) {
            assert!(change.contains(word), "'{word}' is not in {changes:?}");
        }
    }

    #[test]
    fn reading_is_no_change() {
        says(&watched(|dir| drop(std::fs::read(dir.join("file")).unwrap())), &[]);
        says(&watched(|dir| write(&dir.join("other"))), &[]);
    }

    #[test]
    fn writes_are_seen_whatever_hides_them() {
        says(&watched(|dir| write(&dir.join("file"))), &["was written to"]);
        let set_back = |dir: &Path| {
            let before = std::fs::metadata(dir.join("file")).unwrap().modified().unwrap();
            write(&dir.join("file"));
            let file = File::options().write(true).open(dir.join("file")).unwrap();
            file.set_times(FileTimes::new().set_modified(before)).unwrap();
        };
        says(&watched(set_back), &["attributes of"]);
        let renamed = |dir: &Path| {
            std::fs::rename(dir.join("file"), dir.join("new")).unwrap();
            write(&dir.join("new"));
        };
        says(&watched(renamed), &["was written to", "no longer leads"]);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_seen() {
        let repoint = |dir: &Path| {
            std::fs::remove_file(dir.join("link")).unwrap();
            symlink("other", dir.join("link")).unwrap();
        };
        says(&watched(repoint), &["no longer leads"]);
        let replace = |dir: &Path| std::fs::rename(dir.join("other"), dir.join("file")).unwrap();
        says(&watched(replace), &["attributes of", "no longer leads"]);
        says(&watched(|dir| std::fs::remove_file(dir.join("link")).unwrap()), &["no longer leads"]);
    }
}
