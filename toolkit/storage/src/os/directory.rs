//! An open directory and the names in it. Calls by descriptor reach the directory under whatever path it has
//! by now.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::unix::block_device_identity;
use super::{FileId, platform};

/// An open directory.
#[derive(Debug)]
pub struct DirectoryHandle {
    fd: OwnedFd,
    /// False if the user may use the directory but not read it: it can't be listed or flushed then.
    is_readable: bool,
}

/// Kind of a rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rename {
    /// The file replaces a file that has the name.
    Replace,
    /// The call fails if the name already exists.
    NoReplace,
    /// Two files exchange their names.
    Exchange,
}

/// The file that a name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedInode {
    /// Identity of the file.
    pub id: FileId,
    /// True for a regular file.
    pub is_regular: bool,
    /// Length in bytes.
    pub len: u64,
}

impl AsFd for DirectoryHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl DirectoryHandle {
    /// Opens a directory.
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags | OFlags::RDONLY, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, is_readable: true }),
            Err(Errno::ACCESS) => {
                let fd = rustix::fs::open(path, flags | platform::OPEN_UNREADABLE, Mode::empty())?;
                Ok(Self { fd, is_readable: false })
            }
            Err(e) => Err(e.into()),
        }
    }

    /// True if `path` still leads to this directory.
    pub fn is_at(&self, path: &Path) -> bool {
        let own = rustix::fs::fstat(&self.fd).map(|stat| identity(&stat));
        own.is_ok() && own == rustix::fs::stat(path).map(|stat| identity(&stat))
    }

    /// Returns the file that `name` leads to; does not follow a symbolic link.
    ///
    /// # Errors
    /// `NotFound` if there is no such name; otherwise the error of fstatat(2).
    pub fn look_up(&self, name: &OsStr) -> io::Result<NamedInode> {
        let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(NamedInode {
            id: identity(&stat),
            is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
            len: u64::try_from(stat.st_size).unwrap_or(0),
        })
    }

    /// True if `name` leads to the file with this identity.
    pub fn holds(&self, name: &OsStr, id: FileId) -> bool {
        self.look_up(name).is_ok_and(|found| found.id == id)
    }

    /// Creates a new file with the default permissions, for reading and writing.
    ///
    /// # Errors
    /// The error of open(2); `AlreadyExists` if the name already exists.
    pub fn create_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
        Ok(rustix::fs::openat(&self.fd, name, flags, mode)?.into())
    }

    /// Opens a file for reading; does not follow a symbolic link.
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open_file(&self, name: &OsStr) -> io::Result<File> {
        // A FIFO without a writer would block.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, name, flags, Mode::empty())?.into())
    }

    /// Opens a file below the directory for reading. `path` is relative, without "..", and no part of it may be
    /// a symbolic link: whatever other programs rename meanwhile, the file is below the directory.
    ///
    /// openat2(2) does the same in one call, but Linux before 5.6 lacks it and older sandboxes forbid it.
    ///
    /// # Errors
    /// ELOOP if the last part is a symbolic link, ENOTDIR if another one is; `InvalidInput` if `path` is
    /// absolute or contains ".."; otherwise the error of openat(2).
    pub fn open_beneath(&self, path: &Path) -> io::Result<File> {
        let mut at: Option<OwnedFd> = None;
        let mut parts = path.components().peekable();
        while let Some(Component::Normal(name)) = parts.next() {
            let directory = at.as_ref().unwrap_or(&self.fd);
            if parts.peek().is_none() {
                // A FIFO without a writer would block.
                let flags =
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                return Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?.into());
            }
            let flags = platform::OPEN_UNREADABLE | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            at = Some(rustix::fs::openat(directory, name, flags, Mode::empty())?);
        }
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// Creates a directory.
    ///
    /// # Errors
    /// The error of mkdir(2).
    pub fn create_directory(&self, name: &OsStr) -> io::Result<()> {
        rustix::fs::mkdirat(&self.fd, name, Mode::RWXU | Mode::RWXG | Mode::RWXO).map_err(Into::into)
    }

    /// Renames a file of this directory.
    ///
    /// # Errors
    /// `Unsupported` if the file system or the operating system has no such rename; otherwise the error of
    /// rename(2).
    pub fn rename(&self, from: &OsStr, to: &OsStr, how: Rename) -> io::Result<()> {
        let done = match how {
            Rename::Replace => rustix::fs::renameat(&self.fd, from, &self.fd, to),
            Rename::NoReplace | Rename::Exchange => platform::rename_specially(&self.fd, from, to, how),
        };
        match done {
            // An EINVAL of a plain rename has other causes.
            Err(Errno::INVAL) if how != Rename::Replace => Err(io::ErrorKind::Unsupported.into()),
            Err(Errno::NOSYS | Errno::OPNOTSUPP) => Err(io::ErrorKind::Unsupported.into()),
            done => done.map_err(Into::into),
        }
    }

    /// Gives a file of this directory another name. The old name stays.
    ///
    /// # Errors
    /// `AlreadyExists` if the name already exists; otherwise the error of link(2).
    pub fn link(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        rustix::fs::linkat(&self.fd, from, &self.fd, to, AtFlags::empty()).map_err(Into::into)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// The error of unlink(2).
    pub fn remove_file(&self, name: &OsStr) -> io::Result<()> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()).map_err(Into::into)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// The error of rmdir(2).
    pub fn remove_directory(&self, name: &OsStr) -> io::Result<()> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR).map_err(Into::into)
    }

    /// Returns all names in the directory except `.` and `..`.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = Dir::read_from(&self.fd)?;
        let name = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
            entry.map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned())
        };
        let names: Result<Vec<_>, Errno> = entries.map(name).collect();
        Ok(names?.into_iter().filter(|name| name != "." && name != "..").collect())
    }

    /// Flushes the names of the directory. Does nothing if the directory can't be read.
    ///
    /// # Errors
    /// The error of fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        if self.is_readable { rustix::fs::fsync(&self.fd).map_err(Into::into) } else { Ok(()) }
    }
}

/// Returns the identity of a file: device and inode; for a block device, its device number.
fn identity(stat: &Stat) -> FileId {
    // The types differ between systems.
    #[allow(clippy::unnecessary_cast)]
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => block_device_identity(stat.st_rdev as u64),
        _ => (stat.st_dev as u64, stat.st_ino as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_only_files_beneath_the_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("home/sub")).expect("directories");
        std::fs::write(path("home/sub/file"), b"inside").expect("a file");
        std::fs::write(path("secret"), b"outside").expect("a file");
        for (target, link) in [("../secret", "home/link"), ("sub", "home/way")] {
            std::os::unix::fs::symlink(target, path(link)).expect("a link");
        }
        let home = DirectoryHandle::open(&path("home")).expect("opened");
        let file = home.open_beneath(Path::new("sub/file")).expect("opened");
        assert_eq!(io::read_to_string(file).expect("read"), "inside");
        for name in ["link", "way/file", "sub/file/x"] {
            let error = home.open_beneath(Path::new(name)).expect_err(name);
            assert!(crate::os::is_link_refused(&error), "{name}: {error}");
        }
        let secret = path("secret");
        for name in ["../secret", "sub/../../secret", "", "."].map(Path::new).into_iter().chain([&*secret]) {
            let error = home.open_beneath(name).expect_err("leads outside");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}", name.display());
        }
        // The open directory counts, not what has its path now.
        std::fs::rename(path("home"), path("moved")).expect("renamed");
        assert!(home.open_beneath(Path::new("sub/file")).is_ok());
    }

    #[test]
    fn reaches_names_after_a_move() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::create_dir(&old).expect("mkdir");
        let handle = DirectoryHandle::open(&old).expect("open");
        let file = OsStr::new("file");
        handle.create_file(file).expect("create");
        assert_eq!(handle.create_file(file).expect_err("twice").kind(), io::ErrorKind::AlreadyExists);
        assert!(handle.is_at(&old));
        std::fs::rename(&old, &new).expect("rename");
        std::fs::create_dir(&old).expect("mkdir");
        assert!(!handle.is_at(&old) && handle.is_at(&new));
        assert_eq!(handle.names().expect("names"), ["file"]);
        handle.sync().expect("sync");
        handle.remove_file(file).expect("remove");
        assert_eq!(std::fs::read_dir(&new).expect("read_dir").count(), 0);
    }

    #[test]
    fn renames_keep_exchange_or_replace_names() {
        let dir = tempfile::tempdir().expect("tempdir");
        let handle = DirectoryHandle::open(dir.path()).expect("open");
        let (a, b) = (OsStr::new("a"), OsStr::new("b"));
        for name in [a, b] {
            std::fs::write(dir.path().join(name), name.as_bytes()).expect("write");
        }
        let content = |name| std::fs::read(dir.path().join(name)).expect("read");
        let error = handle.rename(a, b, Rename::NoReplace).expect_err("b exists");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        handle.rename(a, b, Rename::Exchange).expect("exchange");
        assert_eq!((content(a), content(b)), (b"b".to_vec(), b"a".to_vec()));
        handle.rename(a, b, Rename::Replace).expect("replace");
        assert_eq!(content(b), b"b");
        handle.rename(b, a, Rename::NoReplace).expect("rename");
        assert_eq!(handle.names().expect("names"), ["a"]);
    }
}
