//! An in-memory file system, mounted through FUSE, that injects faults: chosen reads or writes fail, are
//! served in part, or are slow. A real disk cannot do this on demand. It can also have the
//! habits of odd file systems.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use imgtool_testing::oracles;

use super::devices::may_administer;

/// A fault to inject into a read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call fails: EIO for reads, ENOSPC for writes.
    Fails,
    /// About half of the bytes are served, rounded to an odd number.
    Short,
    /// At most 4 KiB are served, an odd number of bytes.
    VeryShort,
    /// The call is delayed by 20 ms.
    Slow,
}

/// Selects the calls that are hit, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// This call alone.
    Nth(u64),
    /// This call and all that follow.
    From(u64),
    /// All calls.
    Always,
}

impl When {
    fn hits(self, count: u64) -> bool {
        match self {
            When::Nth(nth) => count == nth,
            When::From(nth) => count >= nth,
            When::Always => true,
        }
    }
}

/// A habit of an odd file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// Renames can't replace or exchange names on request (exFAT, vboxsf, s3fs, rclone).
    NoRenameFlags,
    /// A file has only one name.
    NoLinks,
    /// No file can be renamed.
    NoRenames,
    /// These renames are done, but report EIO.
    RenameReportsFailure(When),
    /// These renames fail with EIO and are not done.
    RenameFails(When),
    /// Links are made, but report EIO.
    LinkReportsFailure,
    /// These reads of a file's attributes fail with EIO.
    AttributesFail(When),
    /// The first flush of a file fails with EIO, after half a second.
    FirstFlushFails,
    /// The first flush of a directory fails with EIO.
    FirstDirectoryFlushFails,
    /// Names that differ only in case are equal.
    IgnoresCase,
    /// Each read returns another byte in its middle.
    UnstableReads,
    /// Files report a length that is larger by 4 KiB.
    LongLengths,
}

/// Plan and counters of the reads or of the writes.
#[derive(Default)]
struct Calls {
    plan: Option<(Fault, When)>,
    count: u64,
    hits: u64,
}

impl Calls {
    fn strike(&mut self) -> Option<Fault> {
        self.count += 1;
        let (fault, when) = self.plan?;
        let is_hit = when.hits(self.count);
        self.hits += u64::from(is_hit);
        is_hit.then_some(fault)
    }
}

#[derive(Default)]
struct State {
    /// Content by inode number.
    files: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<String, u64>,
    /// Lengths that files report instead of their own, by inode number.
    reported: BTreeMap<u64, u64>,
    last: u64,
    reads: Calls,
    writes: Calls,
    habits: Vec<Habit>,
    renames: u64,
    attributes: u64,
    flushes: u64,
    directory_flushes: u64,
}

impl State {
    fn has(&self, habit: Habit) -> bool {
        self.habits.contains(&habit)
    }

    /// True if the current rename is hit by a habit that `when` selects.
    fn hits_rename(&self, when: impl Fn(&Habit) -> Option<When>) -> bool {
        self.habits.iter().filter_map(when).any(|when| when.hits(self.renames))
    }

    /// Returns a name as the file system stores it.
    fn key(&self, name: &OsStr) -> String {
        let name = name.to_str().unwrap_or("?");
        if self.has(Habit::IgnoresCase) { name.to_lowercase() } else { name.to_owned() }
    }

    /// Removes a name, and the file if it has no other name.
    fn unlink(&mut self, name: &str) -> bool {
        let Some(number) = self.names.remove(name) else { return false };
        self.forget(number);
        true
    }

    /// Removes a file that has no name.
    fn forget(&mut self, number: u64) {
        if !self.names.values().any(|known| *known == number) {
            self.files.remove(&number);
        }
    }

    fn make(&mut self, name: &str, bytes: Vec<u8>) -> u64 {
        // Inode 1 is the directory.
        self.last += 1;
        let number = self.last + 1;
        self.files.insert(number, bytes);
        self.names.insert(name.to_owned(), number);
        number
    }

    fn attributes(&self, number: u64) -> Option<FileAttr> {
        let bytes = if number == INodeNo::ROOT.0 { None } else { Some(self.files.get(&number)?) };
        let len = bytes.map_or(0, |bytes| bytes.len() as u64);
        let more = if bytes.is_some() && self.has(Habit::LongLengths) { 4096 } else { 0 };
        let size = self.reported.get(&number).copied().unwrap_or(len + more);
        let time = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if bytes.is_some() { FileType::RegularFile } else { FileType::Directory },
            perm: if bytes.is_some() { 0o644 } else { 0o755 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

/// Returns the number of bytes that a call for `len` bytes serves.
fn served(fault: Option<Fault>, len: usize) -> usize {
    match fault {
        Some(Fault::Short) if len > 1 => (len / 2) | 1,
        Some(Fault::VeryShort) if len > 1 => ((len / 2).clamp(1, 4096) - 1) | 1,
        _ => len,
    }
}

/// Time for which the kernel may cache entries and attributes: none.
const TTL: Duration = Duration::ZERO;

/// A mounted file system with a single directory.
pub struct Shaky {
    state: Arc<Mutex<State>>,
    directory: tempfile::TempDir,
    session: Option<BackgroundSession>,
}

impl Shaky {
    /// Mounts an empty file system. Returns `None` if mounting fails, for example because the user lacks
    /// permission.
    pub fn mount() -> Option<Self> {
        let directory = imgtool_testing::tempdir();
        let state = Arc::new(Mutex::new(State::default()));
        let served = Served(Arc::clone(&state));
        match fuser::spawn_mount(served, directory.path(), &Config::default()) {
            Ok(session) => Some(Self { state, directory, session: Some(session) }),
            Err(e) => {
                let must_work = may_administer() && Path::new("/dev/fuse").exists();
                oracles::unable(
                    &format!("this user may not mount a file system of its own (FUSE): {e}"),
                    must_work,
                );
                None
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns the path of a name in the file system.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Adds a file.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        self.state().make(name, bytes);
    }

    /// Makes a file report another length than it has.
    pub fn report(&self, name: &str, len: u64) {
        let mut state = self.state();
        let number = state.names[name];
        state.reported.insert(number, len);
    }

    /// Removes a file and returns its content; `None` if it does not exist.
    pub fn take(&self, name: &str) -> Option<Vec<u8>> {
        let mut state = self.state();
        let number = state.names.remove(name)?;
        state.files.remove(&number)
    }

    /// Returns the names of all files.
    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// Sets the faults of later reads and writes, and counts calls from 1 again.
    pub fn plan(&self, reads: Option<(Fault, When)>, writes: Option<(Fault, When)>) {
        let mut state = self.state();
        state.reads = Calls { plan: reads, ..Calls::default() };
        state.writes = Calls { plan: writes, ..Calls::default() };
    }

    /// Sets the habits of the file system, and counts renames and flushes from 1 again.
    pub fn adopt(&self, habits: &[Habit]) {
        let mut state = self.state();
        state.habits = habits.to_vec();
        (state.renames, state.attributes, state.flushes, state.directory_flushes) = (0, 0, 0, 0);
    }

    /// Returns the number of writes since the last call of [`Self::plan`].
    pub fn writes(&self) -> u64 {
        self.state().writes.count
    }

    /// Returns the number of renames since the last call of [`Self::adopt`].
    pub fn renames(&self) -> u64 {
        self.state().renames
    }

    /// Returns how often the attributes of files were read since the last call of [`Self::adopt`].
    pub fn attributes(&self) -> u64 {
        self.state().attributes
    }

    /// Returns the content of a file; `None` if it does not exist.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        state.files.get(state.names.get(name)?).cloned()
    }

    /// Returns the number of reads and writes that were hit.
    pub fn hits(&self) -> u64 {
        let state = self.state();
        state.reads.hits + state.writes.hits
    }
}

impl Drop for Shaky {
    fn drop(&mut self) {
        // Unmounts the file system before its directory is removed.
        let _ = self.session.take().map(BackgroundSession::umount_and_join);
    }
}

/// Handler of the kernel's requests.
struct Served(Arc<Mutex<State>>);

impl Served {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        match state.names.get(&state.key(name)).and_then(|number| state.attributes(*number)) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let mut state = self.state();
        if inode != INodeNo::ROOT {
            state.attributes += 1;
            let count = state.attributes;
            let fails = |habit: &Habit| matches!(habit, Habit::AttributesFail(when) if when.hits(count));
            if state.habits.iter().any(fails) {
                return reply.error(Errno::EIO);
            }
        }
        match state.attributes(inode.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let (Some(size), Some(bytes)) = (size, state.files.get_mut(&inode.0)) {
            bytes.resize(size as usize, 0);
        }
        match state.attributes(inode.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.state();
        let key = state.key(name);
        let number = state.make(&key, Vec::new());
        let attributes = state.attributes(number).expect("it was just made");
        reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // With direct I/O, the program sees exactly the bytes that a call serves.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let fault = self.state().reads.strike();
        match fault {
            Some(Fault::Fails) => return reply.error(Errno::EIO),
            Some(Fault::Slow) => std::thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
        let state = self.state();
        let Some(bytes) = state.files.get(&inode.0) else { return reply.error(Errno::ENOENT) };
        let rest = &bytes[(offset as usize).min(bytes.len())..];
        let len = rest.len().min(size as usize);
        let mut bytes = rest[..served(fault, len)].to_vec();
        if state.has(Habit::UnstableReads) && !bytes.is_empty() {
            let middle = bytes.len() / 2;
            bytes[middle] ^= (state.reads.count % 255 + 1) as u8;
        }
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let fault = self.state().writes.strike();
        match fault {
            Some(Fault::Fails) => return reply.error(Errno::ENOSPC),
            Some(Fault::Slow) => std::thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
        let data = &data[..served(fault, data.len())];
        let mut state = self.state();
        let Some(bytes) = state.files.get_mut(&inode.0) else { return reply.error(Errno::ENOENT) };
        let start = offset as usize;
        bytes.resize(bytes.len().max(start + data.len()), 0);
        bytes[start..start + data.len()].copy_from_slice(data);
        reply.written(data.len() as u32);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        from: &OsStr,
        _: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        if state.has(Habit::NoRenames) {
            return reply.error(Errno::ENOSYS);
        }
        if !flags.is_empty() && state.has(Habit::NoRenameFlags) {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = (state.key(from), state.key(to));
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && state.names.contains_key(&to) {
            return reply.error(Errno::EEXIST);
        }
        state.renames += 1;
        let fails = |habit: &Habit| if let Habit::RenameFails(when) = habit { Some(*when) } else { None };
        if state.hits_rename(fails) {
            return reply.error(Errno::EIO);
        }
        let Some(number) = state.names.get(&from).copied() else { return reply.error(Errno::ENOENT) };
        let is_exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        if is_exchange && !state.names.contains_key(&to) {
            return reply.error(Errno::ENOENT);
        }
        state.names.remove(&from);
        match state.names.insert(to, number) {
            Some(other) if is_exchange => _ = state.names.insert(from, other),
            Some(replaced) => state.forget(replaced),
            None => {}
        }
        let reports =
            |habit: &Habit| if let Habit::RenameReportsFailure(when) = habit { Some(*when) } else { None };
        if state.hits_rename(reports) { reply.error(Errno::EIO) } else { reply.ok() }
    }

    fn link(&self, _: &Request, inode: INodeNo, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        if state.has(Habit::NoLinks) {
            return reply.error(Errno::EPERM);
        }
        let key = state.key(name);
        let Some(attributes) = state.attributes(inode.0) else { return reply.error(Errno::ENOENT) };
        if state.names.contains_key(&key) {
            return reply.error(Errno::EEXIST);
        }
        state.names.insert(key, inode.0);
        if state.has(Habit::LinkReportsFailure) {
            return reply.error(Errno::EIO);
        }
        reply.entry(&TTL, &attributes, Generation(0));
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.state();
        let key = state.key(name);
        if state.unlink(&key) { reply.ok() } else { reply.error(Errno::ENOENT) }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.state();
        for (place, (name, number)) in state.names.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*number), place as u64 + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        state.flushes += 1;
        let fails = state.has(Habit::FirstFlushFails) && state.flushes == 1;
        drop(state);
        if fails {
            std::thread::sleep(Duration::from_millis(500));
            return reply.error(Errno::EIO);
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        state.directory_flushes += 1;
        if state.has(Habit::FirstDirectoryFlushFails) && state.directory_flushes == 1 {
            return reply.error(Errno::EIO);
        }
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
