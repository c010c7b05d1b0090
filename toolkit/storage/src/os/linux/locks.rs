//! Shared locks on single bytes of a file, which belong to the open file and end with it (open file description
//! locks, fcntl(2)). Locks of POSIX would end when the process closes any other descriptor of the file.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock};

/// Takes a shared lock on the byte at `position`, which `file` holds until it is closed.
///
/// # Errors
/// EAGAIN or EACCES if another open file has an exclusive lock there; other errors where files have no locks.
pub fn lock_byte(file: &File, position: u64) -> io::Result<()> {
    let lock = request(F_RDLCK, position..position + 1)?;
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// True if another open file has a lock on one of these bytes.
///
/// # Errors
/// The error of fcntl(2) where files have no locks.
pub fn is_locked(file: &File, bytes: Range<u64>) -> io::Result<bool> {
    let mut lock = request(F_WRLCK, bytes)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(c_int::from(lock.l_type) != F_UNLCK)
}

/// Returns the description of a lock on `bytes`.
fn request(kind: c_int, bytes: Range<u64>) -> io::Result<flock> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let len = bytes.end.checked_sub(bytes.start).ok_or(io::ErrorKind::InvalidInput)?;
    // The constants have another type than the fields. The process number must be 0 for such locks.
    Ok(flock {
        l_type: kind.try_into().map_err(invalid)?,
        l_whence: SEEK_SET.try_into().map_err(invalid)?,
        l_start: bytes.start.try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        l_len: len.try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        l_pid: 0,
    })
}
