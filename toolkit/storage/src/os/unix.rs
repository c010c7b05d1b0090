//! Calls that every Unix has: reads and writes by position, metadata, locks, streams.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::time::{Duration, Instant};

use imgtool_core::input::retry;
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

/// Returns true if the file contains no byte, whatever length it reports.
///
/// # Errors
/// The error of fstat(2) or pread(2).
pub fn is_empty(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.len() == 0 && retry(|| file.read_at(&mut [0], 0))? == 0)
}

/// Returns true if another user may have put the file into the directory to get at what is written to it: it
/// belongs neither to this user nor to the owner of the directory, which is sticky and in which others may
/// create files. The rule of Linux for opening such files, fs.protected_regular, proc(5).
pub fn may_be_planted(directory: &Metadata, file: &Metadata) -> bool {
    const STICKY: u32 = 0o1000;
    const OTHERS_WRITE: u32 = 0o022;
    let is_shared = directory.mode() & STICKY != 0 && directory.mode() & OTHERS_WRITE != 0;
    let own = rustix::process::geteuid().as_raw();
    is_shared && file.uid() != own && file.uid() != directory.uid()
}

/// Returns true if this user may create and remove names in the directory.
pub fn may_change_directory(directory: &Path) -> bool {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::accessat(rustix::fs::CWD, directory, access, rustix::fs::AtFlags::EACCESS).is_ok()
}

/// Returns true if this user may replace a file by a rename, as far as owners tell: in a sticky directory only the
/// owners of the file and of the directory, and the superuser, unlink(2).
pub fn may_replace(directory: &Metadata, file: &Metadata) -> bool {
    const STICKY: u32 = 0o1000;
    let own = rustix::process::geteuid();
    directory.mode() & STICKY == 0 || own.is_root() || [file.uid(), directory.uid()].contains(&own.as_raw())
}

/// Gives `file` the owner and group of the file that `meta` describes. Returns false if this user may not.
///
/// # Errors
/// The error of fchown(2), other than a lack of permission.
pub fn give_owner_of(file: &File, meta: &Metadata) -> io::Result<bool> {
    let is_same = |now: &Metadata| (now.uid(), now.gid()) == (meta.uid(), meta.gid());
    if is_same(&file.metadata()?) {
        return Ok(true);
    }
    let denied = |e: &io::Error| {
        let kinds =
            [io::ErrorKind::PermissionDenied, io::ErrorKind::Unsupported, io::ErrorKind::InvalidInput];
        kinds.contains(&e.kind())
    };
    match fchown(file, Some(meta.uid()), Some(meta.gid())) {
        // A user may still choose one of the user's groups.
        Err(e) if denied(&e) => {
            let _ = fchown(file, None, Some(meta.gid()));
            Ok(is_same(&file.metadata()?))
        }
        done => done.map(|()| true),
    }
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
