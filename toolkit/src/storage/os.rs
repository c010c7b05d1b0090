//! The seam to the operating system: every platform-specific call of the toolkit.
//!
//! `unix` holds the calls that every Unix offers, `linux` those of Linux alone. On another Unix,
//! `other` answers for `linux` that the feature is not available, and the toolkit does without it:
//! it reads holes as data and writes zeros.

#[cfg(not(unix))]
compile_error!("imgtool-toolkit supports Unix only: it reads and writes files by position, as POSIX does");

mod unix;
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

/// A run of data, or a hole, as the file system reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRun {
    /// One past the last byte, from the start of the file.
    pub end: u64,
    /// True if the file system stores bytes for the run; a hole reads as zeros.
    pub is_data: bool,
}

/// The kind of a file, for reading or writing disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileClass {
    /// A regular file.
    Regular,
    /// A block device: fixed size, may hold old data.
    BlockDevice,
    /// A pipe, socket or character device: read or written in order only.
    Stream,
    /// A directory.
    Directory,
}

/// Identity of a file or block device across names and links.
pub type FileId = (u64, u64);

/// Returns true if writing to one file would change the other.
///
/// Both arguments are lists of [`file_layers`]. Two files that share a lower layer are separate: two
/// partitions of a disk have no byte in common.
pub fn same_bytes(one: &[FileId], other: &[FileId]) -> bool {
    let holds = |layers: &[FileId], file: &[FileId]| file.first().is_some_and(|own| layers.contains(own));
    holds(one, other) || holds(other, one)
}

/// Free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this user may still write.
    pub free: u64,
    /// True if each byte written takes one byte of `free`: the file system is local, and neither
    /// compresses nor shares blocks.
    pub is_exact: bool,
}
