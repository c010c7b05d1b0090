//! Replacement for `linux` on every other Unix: reports each feature as unavailable and emulates nothing.
//!
//! The functions are documented in `linux.rs`.

#![allow(clippy::missing_errors_doc)]

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use imgtool_core::FileRun;

use super::{FileId, OverlayFiles, Rename, Space, file_identity};

/// Fails with `Unsupported`: every system has its own ioctl for the length of a block device.
pub(super) fn block_device_len(_file: &File) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns `None`: loop devices exist only on Linux.
pub(super) fn loop_device_over(_meta: &Metadata) -> Option<String> {
    None
}

/// Returns `None`: every other Unix lists its mounts in another way.
pub fn writable_mount_over(_meta: &Metadata) -> Option<String> {
    None
}

/// Fails with `Unsupported`: locks that belong to an open file are not in POSIX.
pub fn lock_byte(_file: &File, _position: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Fails with `Unsupported`.
pub fn is_locked(_file: &File, _bytes: std::ops::Range<u64>) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns only the file itself.
pub fn file_layers(meta: &Metadata, _file_systems: bool) -> Vec<FileId> {
    vec![file_identity(meta)]
}

/// Returns no files: loop devices exist only on Linux.
pub fn loop_files(_meta: &Metadata, _file_systems: bool) -> Vec<PathBuf> {
    Vec::new()
}

/// Returns no files: no other Unix has overlayfs.
pub fn overlay_files(_meta: &Metadata, _path: &Path) -> OverlayFiles {
    OverlayFiles { files: Vec::new(), is_complete: true }
}

/// Fails with `Unsupported`: no other Unix can duplicate a descriptor by its number without unsafe code.
pub fn duplicate(_number: u32) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns false: only Linux mounts single files.
pub fn is_mount_point(_path: &Path) -> bool {
    false
}

/// Returns an empty path, which leads nowhere: not every Unix has a path to an open file.
pub fn path_of(_file: &File) -> PathBuf {
    PathBuf::new()
}

/// Returns true: any file system may be remote.
pub fn is_remote(_directory: &Path) -> bool {
    true
}

/// Fails with `Unsupported`.
pub fn space(_directory: &Path) -> io::Result<Space> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns one run of data up to `len`.
pub fn file_run(_file: &File, _position: u64, len: u64) -> io::Result<FileRun> {
    Ok(FileRun { end: len, is_data: true })
}

/// Returns `position`: everything counts as data.
pub fn next_data(_file: &File, position: u64, _len: u64) -> io::Result<u64> {
    Ok(position)
}

/// Returns false.
pub fn lives_in_memory(_file: &File) -> bool {
    false
}

/// Fails with `Unsupported`: only on Linux does O_EXCL refuse a device in use.
pub fn open_block_device(_path: &Path, _exclusive: bool) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns false: the caller writes zeros.
pub fn zero_range(_file: &File, _position: u64, _len: u64, _is_block_device: bool) -> io::Result<bool> {
    Ok(false)
}

/// Fails with `Unsupported`.
pub fn allocate_range(_file: &File, _position: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns false.
pub fn forbid_copy_on_write(_file: &File) -> bool {
    false
}

/// Returns false.
pub fn can_share_blocks(_from: &File, _to: &File) -> bool {
    false
}

/// Returns false.
pub fn shares_blocks(_file: &File) -> bool {
    false
}

/// Returns false.
pub fn may_share_blocks(_file: &Path, _directory: &Path) -> bool {
    false
}

/// Returns 0: the caller reads and writes instead.
pub fn copy_range(
    _from: &File,
    _from_position: u64,
    _to: &File,
    _to_position: u64,
    _len: usize,
) -> io::Result<usize> {
    Ok(0)
}

/// Flags for opening a directory that this user may not read: no other ones.
pub(super) const OPEN_UNREADABLE: OFlags = OFlags::RDONLY;

/// Fails with ENOSYS: the caller makes links instead.
pub(super) fn rename_specially(
    _directory: &OwnedFd,
    _from: &OsStr,
    _to: &OsStr,
    _how: Rename,
) -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

/// Returns false.
pub fn is_stdout_closed() -> bool {
    false
}

/// Returns `None`.
pub fn memory_len() -> Option<u64> {
    None
}

/// Does nothing, since the call is only advice.
pub fn forget_range(_file: &File, _position: u64, _len: u64) {}
