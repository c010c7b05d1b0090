//! Interface to the operating system: all platform-specific calls.
//!
//! Modules `unix` and `directory` contain the calls of every Unix, `linux` those of Linux alone. On any other
//! Unix, `other` replaces `linux` and reports each feature as unavailable. The toolkit then reads holes as
//! data and writes zeros.

#[cfg(not(unix))]
compile_error!("imgtool supports Unix only: it reads and writes files by position, as POSIX does");

mod directory;
mod unix;
pub use directory::{DirectoryHandle, NamedInode, Rename};
pub use unix::*;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux as platform;
#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(not(target_os = "linux"))]
use other as platform;
pub use platform::*;

/// Kind of a file, by how it can be read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileClass {
    /// A regular file.
    Regular,
    /// A block device, which has a fixed size and may hold old data.
    BlockDevice,
    /// A pipe, socket or character device, which is read or written in order only.
    Stream,
    /// A directory.
    Directory,
}

/// Identity of a file or block device across names and links.
pub type FileId = (u64, u64);

/// Files below a file on an overlay file system.
#[derive(Debug)]
pub struct OverlayFiles {
    /// Metadata of each file that may store the file, the topmost first, and true if a write to the file
    /// changes it.
    pub files: Vec<(std::fs::Metadata, bool)>,
    /// False if there may be others, which this process can't see. True for a file on any other file system.
    pub is_complete: bool,
}

/// Free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Number of bytes that this user may still write.
    pub free: u64,
    /// True if each byte written takes one byte of `free`. False if the file system may be remote, or may
    /// compress or deduplicate written data.
    pub is_exact: bool,
    /// True if the file system is local and may compress or deduplicate written data.
    pub may_compress: bool,
}
