//! Calls that every Unix has: reads and writes by position, metadata, locks, streams.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{FileClass, FileId, platform};

/// Returns the kind of the file that `meta` describes.
pub fn classify(meta: &Metadata) -> FileClass {
    let kind = meta.file_type();
    if kind.is_dir() {
        FileClass::Directory
    } else if kind.is_block_device() {
        FileClass::BlockDevice
    } else if kind.is_file() {
        FileClass::Regular
    } else {
        FileClass::Stream
    }
}

/// Returns the length of a file or block device in bytes.
///
/// # Errors
/// The error of fstat(2) or lseek(2); `Unsupported` for a block device outside of Linux.
pub fn file_len(file: &File) -> io::Result<u64> {
    let meta = file.metadata()?;
    match classify(&meta) {
        FileClass::BlockDevice => platform::block_device_len(file),
        _ => Ok(meta.len()),
    }
}

/// Gives a file the owner and group of another one. Without the right to give files away, only the group changes, if
/// the user is in it.
pub fn copy_owner(file: &File, like: &Metadata) {
    if fchown(file, Some(like.uid()), Some(like.gid())).is_err() {
        // The file then belongs to the user who made it.
        let _ = fchown(file, None, Some(like.gid()));
    }
}

/// Returns the number of bytes that a file occupies on disk.
pub fn allocated_len(meta: &Metadata) -> u64 {
    // stat(2): st_blocks counts units of 512 bytes, regardless of the file system's block size.
    meta.blocks().saturating_mul(512)
}

/// Returns the identity of a file across names and links: device and inode; for a block device, its device
/// number.
pub fn file_identity(meta: &Metadata) -> FileId {
    if meta.file_type().is_block_device() {
        block_device_identity(meta.rdev())
    } else {
        (meta.dev(), meta.ino())
    }
}

/// Returns the identity of the block device with the number `rdev`. No file system has the device number
/// `u64::MAX`.
pub(super) fn block_device_identity(rdev: u64) -> FileId {
    (u64::MAX, rdev)
}

/// Returns true if `e` says that [`super::DirectoryHandle::open_beneath`] met a symbolic link.
pub fn is_link_refused(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::LOOP | Errno::NOTDIR))
}

/// Returns standard output as a file.
///
/// # Errors
/// The error of dup(2).
pub fn stdout() -> io::Result<File> {
    Ok(io::stdout().as_fd().try_clone_to_owned()?.into())
}

/// Reads up to `buf.len()` bytes at `position` and returns their number, 0 at the end of the file. The file's
/// cursor does not move, so threads may share the file.
///
/// # Errors
/// The error of pread(2), `Interrupted` included.
pub fn read_at(file: &File, buf: &mut [u8], position: u64) -> io::Result<usize> {
    file.read_at(buf, position)
}

/// Writes `slices` at `position` with one call and returns the number of bytes written, possibly less than
/// all. The file's cursor does not move.
///
/// # Errors
/// The error of pwritev(2), `Interrupted` included.
pub fn write_vectored_at(file: &File, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
    rustix::io::pwritev(file, slices, position).map_err(Into::into)
}

/// Describes, for the user, another use of a file or block device that did not prevent opening it: a record
/// lock, or a loop device over the file. Returns `None` if there is no other use.
pub fn used_elsewhere(file: &File) -> Option<String> {
    // Errors come from file systems without locks (some network file systems).
    if platform::is_locked(file, 0..i64::MAX.unsigned_abs()).unwrap_or(false) {
        return Some("another program has locked it".to_owned());
    }
    let device = platform::loop_device_over(&file.metadata().ok()?)?;
    Some(format!("loop device /dev/{device} uses it"))
}

/// Time that [`open_stream`] waits for the reader of a FIFO. Our limit: scripts start both ends within
/// milliseconds, and a missing reader must not block the program forever.
const FIFO_PATIENCE: Duration = Duration::from_secs(2);

/// Opens a FIFO or another stream for writing. Waits up to `FIFO_PATIENCE` for the reader of a FIFO.
///
/// # Errors
/// ENXIO if no reader opens the FIFO in time; otherwise the error of open(2).
pub fn open_stream(path: &Path) -> io::Result<File> {
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let began = Instant::now();
    loop {
        match OpenOptions::new().write(true).custom_flags(nonblock).open(path) {
            Ok(file) => {
                let flags = rustix::fs::fcntl_getfl(&file)?;
                rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
                return Ok(file);
            }
            Err(e) if e.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
                if began.elapsed() > FIFO_PATIENCE {
                    return Err(e);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(e),
        }
    }
}

/// Returns true if `e` says that this program, or the system, has too many open files.
pub fn is_out_of_files(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::MFILE | Errno::NFILE))
}

/// Raises the number of files that this process may have open to the most that the system allows it: a split
/// disk of terabytes has thousands of extents. Does nothing if that fails.
pub fn allow_most_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Returns the device number of the file system that contains `directory`; `None` if stat(2) fails.
pub fn file_system(directory: &Path) -> Option<u64> {
    std::fs::metadata(directory).ok().map(|meta| std::os::unix::fs::MetadataExt::dev(&meta))
}
