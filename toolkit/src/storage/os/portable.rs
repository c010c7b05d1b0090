//! Systems without sparse-file calls: everything is data, zeros are written.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::{FileClass, FileId, FileRun, Space};

/// See the Linux version.
pub fn classify(meta: &Metadata) -> FileClass {
    if meta.is_dir() {
        FileClass::Directory
    } else if meta.is_file() {
        FileClass::Regular
    } else {
        FileClass::Stream
    }
}

/// See the Linux version.
///
/// # Errors
/// When the file can't be asked.
pub fn file_len(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.len())
}

/// See the Linux version; here the length.
pub fn allocated_len(meta: &Metadata) -> u64 {
    meta.len()
}

/// See the Linux version; here nothing tells, and two files are never the same.
pub fn file_identity(meta: &Metadata) -> FileId {
    (std::ptr::from_ref(meta).addr() as u64, meta.len())
}

/// See the Linux version; here the file alone.
pub fn file_layers(meta: &Metadata, _file_systems: bool) -> Vec<FileId> {
    vec![file_identity(meta)]
}

/// See the Linux version; here every file system may be.
pub fn is_remote(_directory: &Path) -> bool {
    true
}

/// See the Linux version; here nothing tells.
///
/// # Errors
/// Always.
pub fn space(_directory: &Path) -> io::Result<Space> {
    Err(io::ErrorKind::Unsupported.into())
}

/// See the Linux version; here never.
pub fn may_share_blocks(_file: &Path, _directory: &Path) -> bool {
    false
}

/// See the Linux version; here all is data.
///
/// # Errors
/// None.
pub fn file_run(_file: &File, _position: u64, len: u64) -> io::Result<FileRun> {
    Ok(FileRun { end: len, is_data: true })
}

/// See the Linux version; here never.
pub fn lives_in_memory(_file: &File) -> bool {
    false
}

/// See the Linux version; here all is data.
///
/// # Errors
/// None.
pub fn next_data(_file: &File, position: u64, _len: u64) -> io::Result<u64> {
    Ok(position)
}

/// See the Linux version.
///
/// # Errors
/// When it can't be opened.
pub fn open_block_device(path: &Path, _exclusive: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// See the Linux version; here nothing tells.
pub fn used_elsewhere(_file: &File) -> Option<String> {
    None
}

/// See the Linux version; here it waits for a reader.
///
/// # Errors
/// When it can't be opened.
pub fn open_stream(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(path)
}

/// See the Linux version; here never possible.
///
/// # Errors
/// None.
pub fn zero_range(_file: &File, _position: u64, _len: u64, _is_block_device: bool) -> io::Result<bool> {
    Ok(false)
}

/// See the Linux version; here the file is only made long enough.
///
/// # Errors
/// When it can't be.
pub fn allocate_range(file: &File, position: u64, len: u64) -> io::Result<()> {
    let end = position.saturating_add(len);
    if file.metadata()?.len() < end { file.set_len(end) } else { Ok(()) }
}

/// See the Linux version.
///
/// # Errors
/// When the read fails.
pub fn read_at(file: &File, buf: &mut [u8], position: u64) -> io::Result<usize> {
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(position))?;
    file.read(buf)
}

/// See the Linux version.
///
/// # Errors
/// When the write fails.
pub fn write_vectored_at(file: &File, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(position))?;
    file.write_vectored(slices)
}

/// See the Linux version; here never.
pub fn can_share_blocks(_from: &File, _to: &File) -> bool {
    false
}

/// See the Linux version; here never.
pub fn shares_blocks(_file: &File) -> bool {
    false
}

/// See the Linux version; here never possible.
///
/// # Errors
/// None.
pub fn copy_range(
    _from: &File,
    _from_position: u64,
    _to: &File,
    _to_position: u64,
    _len: usize,
) -> io::Result<usize> {
    Ok(0)
}

/// See the Linux version; here nothing tells.
pub fn is_out_of_files(_e: &io::Error) -> bool {
    false
}

/// See the Linux version; here nothing tells.
pub fn is_stdout_closed() -> bool {
    false
}

/// See the Linux version; here nothing tells.
pub fn memory_len() -> Option<u64> {
    None
}

/// See the Linux version; here nothing.
pub fn forget_range(_file: &File, _position: u64, _len: u64) {}

/// See the Linux version; here never possible.
///
/// # Errors
/// None.
pub fn exchange_names(_a: &Path, _b: &Path) -> io::Result<bool> {
    Ok(false)
}
