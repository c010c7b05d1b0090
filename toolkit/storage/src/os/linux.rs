//! Calls that only Linux has: holes, zeroing without writing, block sharing, block devices, page cache,
//! renames with flags.

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, AtFlags, FallocateFlags, IFlags, OFlags, RenameFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use imgtool_core::FileRun;

use super::{Rename, Space, file_identity};

mod layers;
mod locks;
mod mounts;
mod overlay;

pub use layers::{file_layers, loop_files};
pub use locks::{is_locked, lock_byte};
pub use mounts::writable_mount_over;
pub use overlay::overlay_files;

/// Returns the length of a block device in bytes. Seeks to its end, since fstat(2) reports 0.
pub(super) fn block_device_len(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Returns a path that leads to the open file, whatever its name is now.
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Returns the name of a loop device over the file or block device that `meta` describes, such as `loop0`;
/// `None` if there is none.
pub(super) fn loop_device_over(meta: &Metadata) -> Option<String> {
    let identity = file_identity(meta);
    let device = std::fs::read_dir("/sys/block").ok()?.flatten().find(|entry| {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file"));
        let meta = backing.and_then(|path| std::fs::metadata(path.trim_end_matches('\n')));
        meta.is_ok_and(|meta| file_identity(&meta) == identity)
    })?;
    Some(device.file_name().to_string_lossy().into_owned())
}

/// Magic numbers (statfs(2), kernel sources) of file systems that other machines or user programs may serve.
const REMOTE: [u64; 8] = [
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x6573_5546, // FUSE
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x0bd0_0bd0, // Lustre
    0x0116_1970, // GFS2
];

/// Magic numbers of file systems whose free space is only an estimate, since they may compress or share
/// written data (btrfs, ZFS, bcachefs, F2FS, NTFS), and of ramfs, which reports no free space.
const ELASTIC: [u64; 6] = [0x9123_683e, 0x2fc1_2fc1, 0xca45_1a4e, 0xf2f5_2010, 0x7366_746e, 0x8584_58f6];

/// Returns the file system's 32-bit magic number. Some architectures sign-extend `f_type`.
fn file_system_magic(fs: &rustix::fs::StatFs) -> u64 {
    (fs.f_type as u64) & 0xffff_ffff
}

/// Returns true if other machines may have access to `directory`.
pub fn is_remote(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|fs| REMOTE.contains(&file_system_magic(&fs)))
}

/// Returns the free space of the file system that contains `directory`.
///
/// # Errors
/// The error of statfs(2); `Unsupported` outside of Linux.
pub fn space(directory: &Path) -> io::Result<Space> {
    let fs = rustix::fs::statfs(directory)?;
    // Only the superuser may use the reserved blocks.
    let blocks = if rustix::process::geteuid().is_root() { fs.f_bfree } else { fs.f_bavail };
    let block_size = u64::try_from(fs.f_bsize).unwrap_or(0);
    let magic = file_system_magic(&fs);
    let is_known = fs.f_blocks > 0 && !REMOTE.contains(&magic);
    let may_compress = is_known && ELASTIC.contains(&magic);
    let is_exact = is_known && !may_compress;
    Ok(Space { free: blocks.saturating_mul(block_size), is_exact, may_compress })
}

/// Returns the run of data or hole that contains `position`, which must be below `len`. Reports everything as
/// data where holes are unknown (block devices, some network file systems, systems other than Linux).
///
/// # Errors
/// `UnexpectedEof` if the file has become shorter than `len`; otherwise the error of lseek(2).
pub fn file_run(file: &File, position: u64, len: u64) -> io::Result<FileRun> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(position)) {
        // If another program truncated and extended the file, its new content counts.
        Ok(data) if data > position => Ok(FileRun { end: data.min(len), is_data: false }),
        Ok(_) => match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(position)) {
            Ok(hole) if hole > position => Ok(FileRun { end: hole.min(len), is_data: true }),
            Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NXIO) => {
                Ok(FileRun { end: len, is_data: true })
            }
            Err(e) => Err(e.into()),
        },
        // ENXIO: no data from `position` to the end, or the file now ends before `position`.
        Err(Errno::NXIO) if file.metadata()?.len() < len => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(Errno::NXIO) => Ok(FileRun { end: len, is_data: false }),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(FileRun { end: len, is_data: true }),
        Err(e) => Err(e.into()),
    }
}

/// Returns true if the file is stored in memory (tmpfs).
///
/// Flushing such a file has no effect. Finding the end of a run takes time proportional to its length (30 ms
/// for 1 GiB), whereas a file system on disk has a list of extents.
pub fn lives_in_memory(file: &File) -> bool {
    // statfs(2): TMPFS_MAGIC.
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type).is_ok_and(|magic| magic == TMPFS))
}

/// Returns the start of the first data at or after `position`, which must be below `len`; `len` if only a
/// hole follows. Returns `position` where holes are unknown.
///
/// # Errors
/// `UnexpectedEof` if the file has become shorter than `len`; otherwise the error of lseek(2).
pub fn next_data(file: &File, position: u64, len: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(position)) {
        Ok(data) => Ok(data.clamp(position, len)),
        Err(Errno::NXIO) if file.metadata()?.len() < len => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(Errno::NXIO) => Ok(len),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(position),
        Err(e) => Err(e.into()),
    }
}

/// Returns true if a file system or a single file is mounted at `path`. Linux before 5.8 can't tell, and then
/// reports an error when the name is changed.
pub fn is_mount_point(path: &Path) -> bool {
    let stat = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::empty());
    stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Opens a block device for reading and writing; with `exclusive`, only if it is not in use.
///
/// # Errors
/// `ResourceBusy` if the device is mounted or otherwise in use; `Unsupported` outside of Linux; otherwise the
/// error of open(2).
pub fn open_block_device(path: &Path, exclusive: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if exclusive {
        // open(2): O_EXCL without O_CREAT fails with EBUSY if the block device is in use.
        let flags = OFlags::EXCL.bits();
        options.custom_flags(i32::try_from(flags).unwrap_or(0));
    }
    options.open(path)
}

/// Zeros a range without sending zeros: punches a hole in a file, or has the kernel zero a block device, like
/// BLKZEROOUT. Returns false if the call is not available; the caller then writes zeros.
///
/// # Errors
/// The error of fallocate(2), if the file or device supports the call.
pub fn zero_range(file: &File, position: u64, len: u64, is_block_device: bool) -> io::Result<bool> {
    let attempts: &[FallocateFlags] = if is_block_device {
        &[FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE)]
    } else {
        &[
            FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE),
            FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE),
        ]
    };
    for flags in attempts {
        match rustix::fs::fallocate(file, *flags, position, len) {
            Ok(()) => return Ok(true),
            // EBUSY: the device is mounted, and the user forced the write.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::BUSY) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

/// Allocates space for a range without writing it. Extends the file if it ends before the range does.
///
/// # Errors
/// `StorageFull` if there is not enough space; `Unsupported` if the file system or the operating system can't
/// allocate; otherwise the error of fallocate(2).
pub fn allocate_range(file: &File, position: u64, len: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), position, len).map_err(Into::into)
}

/// Asks the file system not to copy the blocks of an empty file when they are written again, like `chattr +C`.
/// Returns false if it has no such flag.
pub fn forbid_copy_on_write(file: &File) -> bool {
    let flags = |file| rustix::fs::ioctl_getflags(file);
    let Ok(before) = flags(file) else { return false };
    let set = rustix::fs::ioctl_setflags(file, before | IFlags::NOCOW);
    // Some file systems ignore flags that they don't know.
    set.is_ok() && flags(file).is_ok_and(|after| after.contains(IFlags::NOCOW))
}

/// Magic numbers (statfs(2)) of file systems whose files can share blocks: XFS, btrfs, bcachefs.
const SHARING: [u64; 3] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e];

/// Returns true if both are regular files on one file system whose files can share blocks (reflink).
///
/// On such a file system, [`copy_range`] costs almost nothing. Elsewhere it copies the bytes, zeros included.
pub fn can_share_blocks(from: &File, to: &File) -> bool {
    let same = match (from.metadata(), to.metadata()) {
        (Ok(from), Ok(to)) => from.dev() == to.dev() && from.is_file() && to.is_file(),
        _ => false,
    };
    same && shares_blocks(to)
}

/// Returns true if the file is on a file system whose files can share blocks.
pub fn shares_blocks(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| SHARING.contains(&file_system_magic(&fs)))
}

/// Returns true if `file` and a new file in `directory` could share blocks.
pub fn may_share_blocks(file: &Path, directory: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev());
    let same = device(file).is_ok_and(|one| device(directory).is_ok_and(|other| one == other));
    same && rustix::fs::statfs(directory).is_ok_and(|fs| SHARING.contains(&file_system_magic(&fs)))
}

/// Copies up to `len` bytes within the kernel, as a reflink if the file system supports it. Returns the
/// number of bytes copied; 0 if the call is not available for this pair of files.
///
/// # Errors
/// The error of copy_file_range(2), unless it means that the call is not available for these files.
pub fn copy_range(
    from: &File,
    from_position: u64,
    to: &File,
    to_position: u64,
    len: usize,
) -> io::Result<usize> {
    let (mut from_position, mut to_position) = (from_position, to_position);
    match rustix::fs::copy_file_range(from, Some(&mut from_position), to, Some(&mut to_position), len) {
        Ok(copied) => Ok(copied),
        Err(
            Errno::XDEV
            | Errno::INVAL
            | Errno::OPNOTSUPP
            | Errno::NOSYS
            | Errno::TXTBSY
            | Errno::PERM
            | Errno::BADF,
        ) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// Flags for opening a directory that this user may use but not read: open(2), O_PATH.
pub(super) const OPEN_UNREADABLE: OFlags = OFlags::PATH;

/// Renames within a directory, with a flag of renameat2(2).
pub(super) fn rename_specially(
    directory: &OwnedFd,
    from: &OsStr,
    to: &OsStr,
    how: Rename,
) -> Result<(), Errno> {
    let flags = match how {
        Rename::Replace => RenameFlags::empty(),
        Rename::NoReplace => RenameFlags::NOREPLACE,
        Rename::Exchange => RenameFlags::EXCHANGE,
    };
    rustix::fs::renameat_with(directory, from, directory, to, flags)
}

/// Returns true if the program was started without standard output. The Rust runtime then opens
/// `/dev/null` in its place, for reading and writing, before `main`.
pub fn is_stdout_closed() -> bool {
    let stdout = io::stdout();
    let Ok(stat) = rustix::fs::fstat(&stdout) else { return true };
    // Linux, Documentation/admin-guide/devices.txt: major 1, minor 3 is /dev/null.
    let is_null = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    let mode = rustix::fs::fcntl_getfl(&stdout).map(|flags| flags & OFlags::RWMODE);
    is_null && mode == Ok(OFlags::RDWR)
}

/// Returns another handle to the open file description of this process's descriptor `number`: dup(2) for a number that
/// came from outside.
///
/// # Errors
/// EBADF if it is not open; `Unsupported` outside of Linux; otherwise the error of pidfd_getfd(2), which Linux has
/// since 5.6, and which a container may refuse.
pub fn duplicate(number: u32) -> io::Result<File> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    if number == 0 {
        return Ok(rustix::io::dup(io::stdin())?.into());
    }
    let number = i32::try_from(number).map_err(|_| Errno::BADF)?;
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?.into())
}

/// Returns the size of the machine's memory in bytes; `None` outside of Linux.
pub fn memory_len() -> Option<u64> {
    let info = rustix::system::sysinfo();
    Some((info.totalram as u64).saturating_mul(u64::from(info.mem_unit)))
}

/// Advises the kernel that a range will not be needed again (posix_fadvise(2), POSIX_FADV_DONTNEED).
///
/// Pages that are not on disk yet stay in memory; Linux starts to write them without waiting. A `len` of 0
/// means to the end of the file.
pub fn forget_range(file: &File, position: u64, len: u64) {
    // Only advice, so a failure does not matter.
    let _ = rustix::fs::fadvise(file, position, std::num::NonZero::new(len), Advice::DontNeed);
}
