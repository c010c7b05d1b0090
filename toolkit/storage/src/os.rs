//! Interface to the operating system: every platform-specific call.
//!
//! `unix` holds the calls that every Unix has, `linux` those that only Linux has. On another Unix, `other`
//! replaces `linux` and reports each feature as not available. The toolkit then does without: it reads holes
//! as data and writes zeros.

#[cfg(not(unix))]
compile_error!("imgtool supports Unix only: it reads and writes files by position, as POSIX does");

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

/// Kind of a file that holds a disk image.
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
    /// Number of bytes that this user may still write.
    pub free: u64,
    /// True if each byte written takes one byte of `free`: the file system is local, and neither
    /// compresses nor shares blocks.
    pub is_exact: bool,
}
