//! Replacement of `linux` on every other Unix: reports each feature as not available and emulates nothing.
//!
//! The functions are documented in `linux.rs`.

#![allow(clippy::missing_errors_doc)]

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use imgtool_core::FileRun;

use super::{FileId, Space, file_identity};

/// `Unsupported`: the length of a block device needs an ioctl of each system.
pub(super) fn block_device_len(_file: &File) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}

/// No loop devices.
pub(super) fn loop_device_over(_meta: &Metadata) -> Option<String> {
    None
}

/// The file itself and nothing below it.
pub fn file_layers(meta: &Metadata, _file_systems: bool) -> Vec<FileId> {
    vec![file_identity(meta)]
}

/// Always true: any file system may be remote.
pub fn is_remote(_directory: &Path) -> bool {
    true
}

/// `Unsupported`.
pub fn space(_directory: &Path) -> io::Result<Space> {
    Err(io::ErrorKind::Unsupported.into())
}

/// One run of data up to the end.
pub fn file_run(_file: &File, _position: u64, len: u64) -> io::Result<FileRun> {
    Ok(FileRun { end: len, is_data: true })
}

/// Data at `position`.
pub fn next_data(_file: &File, position: u64, _len: u64) -> io::Result<u64> {
    Ok(position)
}

/// Always false.
pub fn lives_in_memory(_file: &File) -> bool {
    false
}

/// `Unsupported`: only Linux tells by O_EXCL whether the device is in use.
pub fn open_block_device(_path: &Path, _exclusive: bool) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// `Ok(false)`: write zeros.
pub fn zero_range(_file: &File, _position: u64, _len: u64, _is_block_device: bool) -> io::Result<bool> {
    Ok(false)
}

/// `Unsupported`.
pub fn allocate_range(_file: &File, _position: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Always false.
pub fn can_share_blocks(_from: &File, _to: &File) -> bool {
    false
}

/// Always false.
pub fn shares_blocks(_file: &File) -> bool {
    false
}

/// Always false.
pub fn may_share_blocks(_file: &Path, _directory: &Path) -> bool {
    false
}

/// `Ok(0)`: copy by reading and writing.
pub fn copy_range(
    _from: &File,
    _from_position: u64,
    _to: &File,
    _to_position: u64,
    _len: usize,
) -> io::Result<usize> {
    Ok(0)
}

/// `Ok(false)`: rename instead.
pub fn exchange_names(_a: &Path, _b: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Always false.
pub fn is_stdout_closed() -> bool {
    false
}

/// Unknown.
pub fn memory_len() -> Option<u64> {
    None
}

/// Does nothing: it is advice only.
pub fn forget_range(_file: &File, _position: u64, _len: u64) {}
