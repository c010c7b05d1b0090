//! Linux: sparse files, zeroing without writing, block devices, vectored positional writes.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::{FileClass, FileRun, Space};

mod layers;

pub use layers::{file_identity, file_layers};

/// What kind of file `meta` describes.
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

/// The length of a file or block device in bytes.
///
/// # Errors
/// When the file can't be asked.
pub fn file_len(file: &File) -> io::Result<u64> {
    let meta = file.metadata()?;
    match classify(&meta) {
        FileClass::BlockDevice => (&*file).seek(SeekFrom::End(0)),
        _ => Ok(meta.len()),
    }
}

/// Bytes that a file occupies on disk.
pub fn allocated_len(meta: &Metadata) -> u64 {
    meta.blocks().saturating_mul(512)
}

/// statfs(2), magic(5): file systems of other machines, or of programs of which nothing is known.
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

/// File systems that may compress or share what is written to them, so that free space tells little:
/// btrfs, ZFS, bcachefs, F2FS, NTFS, ramfs (which reports none).
const ELASTIC: [u64; 6] = [0x9123_683e, 0x2fc1_2fc1, 0xca45_1a4e, 0xf2f5_2010, 0x7366_746e, 0x8584_58f6];

fn file_system_kind(fs: &rustix::fs::StatFs) -> u64 {
    // A 32-bit number, sign extended on some machines.
    (fs.f_type as u64) & 0xffff_ffff
}

/// Whether a directory may be in use by other machines too.
pub fn is_remote(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|fs| REMOTE.contains(&file_system_kind(&fs)))
}

/// The space of the file system that a directory is on.
///
/// # Errors
/// When it can't be asked.
pub fn space(directory: &Path) -> io::Result<Space> {
    let fs = rustix::fs::statfs(directory)?;
    // The reserve is for the superuser.
    let blocks = if rustix::process::geteuid().is_root() { fs.f_bfree } else { fs.f_bavail };
    let block_size = u64::try_from(fs.f_bsize).unwrap_or(0);
    let kind = file_system_kind(&fs);
    let is_exact = fs.f_blocks > 0 && !REMOTE.contains(&kind) && !ELASTIC.contains(&kind);
    Ok(Space { free: blocks.saturating_mul(block_size), is_exact })
}

/// The run of data or hole that `position` (< `len`) lies in. All data where the file system does
/// not tell (block devices, some network file systems).
///
/// # Errors
/// When the file can't be asked.
pub fn file_run(file: &File, position: u64, len: u64) -> io::Result<FileRun> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(position)) {
        // A file that was cut and grew again meanwhile reads as what it is now.
        Ok(data) if data > position => Ok(FileRun { end: data.min(len), is_data: false }),
        Ok(_) => match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(position)) {
            Ok(hole) if hole > position => Ok(FileRun { end: hole.min(len), is_data: true }),
            Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NXIO) => {
                Ok(FileRun { end: len, is_data: true })
            }
            Err(e) => Err(e.into()),
        },
        // No data from here to the end, or nothing at all: the file has been cut meanwhile.
        Err(Errno::NXIO) if file.metadata()?.len() < len => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(Errno::NXIO) => Ok(FileRun { end: len, is_data: false }),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(FileRun { end: len, is_data: true }),
        Err(e) => Err(e.into()),
    }
}

/// Whether the file lies in memory (tmpfs). Flushing it does nothing, and finding the end of a run
/// costs time in proportion to the run: 30 ms for 1 GiB, where a disk's file system has a list of
/// extents.
pub fn lives_in_memory(file: &File) -> bool {
    // statfs(2): TMPFS_MAGIC.
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type).is_ok_and(|kind| kind == TMPFS))
}

/// Where the first data from `position` (< `len`) on begins; `len` when there is none.
///
/// # Errors
/// When the file can't be asked.
pub fn next_data(file: &File, position: u64, len: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(position)) {
        Ok(data) => Ok(data.clamp(position, len)),
        Err(Errno::NXIO) if file.metadata()?.len() < len => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(Errno::NXIO) => Ok(len),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(position),
        Err(e) => Err(e.into()),
    }
}

/// Opens a block device for writing; fails with `ResourceBusy` when it is mounted or otherwise held.
///
/// # Errors
/// When it can't be opened.
pub fn open_block_device(path: &Path, exclusive: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if exclusive {
        // O_EXCL without O_CREAT on a block device: open(2), "fails with EBUSY if in use".
        let flags = rustix::fs::OFlags::EXCL.bits();
        options.custom_flags(i32::try_from(flags).unwrap_or(0));
    }
    options.open(path)
}

/// How somebody else uses a file or block device that the kernel lets be opened all the same: under
/// a record lock, as running virtual machines do, or as the backing of a loop device. For a person.
/// If nobody has locked it, it is locked for us until it is closed.
pub fn used_elsewhere(file: &File) -> Option<String> {
    let lock = rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive);
    // What can't be locked at all (some network file systems) is not locked.
    if matches!(lock, Err(Errno::AGAIN | Errno::ACCESS)) {
        return Some("another program, perhaps a virtual machine, has locked it".to_owned());
    }
    let identity = file_identity(&file.metadata().ok()?);
    let device = std::fs::read_dir("/sys/block").ok()?.flatten().find(|entry| {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file"));
        let meta = backing.and_then(|path| std::fs::metadata(path.trim_end_matches('\n')));
        meta.is_ok_and(|meta| file_identity(&meta) == identity)
    })?;
    Some(format!("/dev/{} is made of it", device.file_name().to_string_lossy()))
}

/// How long the reader of a FIFO may come later than its writer. Ours.
const FIFO_PATIENCE: Duration = Duration::from_secs(2);

/// Opens a FIFO or another stream for writing; fails when nobody opens a FIFO for reading within two
/// seconds, instead of waiting for ever.
///
/// # Errors
/// ENXIO when there is no reader; when it can't be opened.
pub fn open_stream(path: &Path) -> io::Result<File> {
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let began = Instant::now();
    loop {
        match OpenOptions::new().write(true).custom_flags(nonblock).open(path) {
            Ok(file) => {
                let flags = rustix::fs::fcntl_getfl(&file)?;
                rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
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

/// Zeros a range without sending zeros: on a file a hole, on a block device what BLKZEROOUT does
/// (the kernel's fallocate for block devices). `Ok(false)`: not possible here, write zeros.
///
/// # Errors
/// When the system has the call and it fails.
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
            // BUSY: the device is mounted, and written all the same.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::BUSY) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

/// Allocates space for a range without writing it.
///
/// # Errors
/// When there is no space, or the file system can't.
pub fn allocate_range(file: &File, position: u64, len: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), position, len).map_err(Into::into)
}

/// Reads some bytes at `position`; 0 at the end.
///
/// # Errors
/// When the read fails.
pub fn read_at(file: &File, buf: &mut [u8], position: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, position)
}

/// Writes some of `slices` at `position`, in one call; the number of bytes written.
///
/// # Errors
/// When the write fails.
pub fn write_vectored_at(file: &File, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
    rustix::io::pwritev(file, slices, position).map_err(Into::into)
}

/// statfs(2): XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, BCACHEFS_SUPER_MAGIC.
const SHARING: [u64; 3] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e];

/// Whether the two files lie on one file system that can share blocks between files (reflink):
/// then [`copy_range`] costs next to nothing. Elsewhere it copies, and zeros would go unnoticed.
pub fn can_share_blocks(from: &File, to: &File) -> bool {
    let same = match (from.metadata(), to.metadata()) {
        (Ok(from), Ok(to)) => from.dev() == to.dev() && from.is_file() && to.is_file(),
        _ => false,
    };
    same && shares_blocks(to)
}

/// Whether the file lies on a file system whose files can share blocks.
pub fn shares_blocks(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| SHARING.contains(&file_system_kind(&fs)))
}

/// Whether `file` and a new file in `directory` could share blocks.
pub fn may_share_blocks(file: &Path, directory: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev());
    let same = device(file).is_ok_and(|one| device(directory).is_ok_and(|other| one == other));
    same && rustix::fs::statfs(directory).is_ok_and(|fs| SHARING.contains(&file_system_kind(&fs)))
}

/// Copies within the kernel (a reflink where the file system has it); bytes copied, 0 when
/// this pair of files can't.
///
/// # Errors
/// When the copy fails for a reason that a plain copy would meet too.
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

/// Swaps two names of one directory's file system, so that neither is ever missing. `Ok(false)`: the
/// file system can't.
///
/// # Errors
/// When the system has the call and it fails.
pub fn exchange_names(a: &Path, b: &Path) -> io::Result<bool> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, a, cwd, b, rustix::fs::RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether a file could not be opened since this program, or the system, has too many open.
pub fn is_out_of_files(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::MFILE | Errno::NFILE))
}

/// Whether standard output is nothing that anybody asked for: a program that is started with it closed
/// gets `/dev/null` in its place, for reading and writing, before its first line.
pub fn is_stdout_closed() -> bool {
    let stdout = io::stdout();
    let Ok(stat) = rustix::fs::fstat(&stdout) else { return true };
    // Documentation/admin-guide/devices.txt: memory device 3.
    let is_null = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    let mode = rustix::fs::fcntl_getfl(&stdout).map(|flags| flags & rustix::fs::OFlags::RWMODE);
    is_null && mode == Ok(rustix::fs::OFlags::RDWR)
}

/// Bytes of memory that the machine has, if it tells.
pub fn memory_len() -> Option<u64> {
    let info = rustix::system::sysinfo();
    Some((info.totalram as u64).saturating_mul(u64::from(info.mem_unit)))
}

/// Tells the kernel that a range will not be needed again (posix_fadvise(2), `POSIX_FADV_DONTNEED`).
/// What of it is not on disk yet stays in memory, and is on its way: Linux starts to write it and does
/// not wait. A length of 0 means to the end.
pub fn forget_range(file: &File, position: u64, len: u64) {
    // Advice only: nothing depends on it.
    let _ = rustix::fs::fadvise(file, position, std::num::NonZero::new(len), Advice::DontNeed);
}
