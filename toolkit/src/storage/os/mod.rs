//! What needs more of the operating system than positional reads and writes. Linux has it all;
//! `portable` is the fallback: a port to another system is a file in this folder.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub use linux::*;

#[cfg(not(target_os = "linux"))]
mod portable;
#[cfg(not(target_os = "linux"))]
pub use portable::*;

/// A run of a file, as the file system sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRun {
    /// One past the last byte.
    pub end: u64,
    /// Whether anything is stored there; if not, it reads as zeros.
    pub is_data: bool,
}

/// What a file is, for reading or writing disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileClass {
    /// A regular file.
    Regular,
    /// A block device: fixed size, may hold old data.
    BlockDevice,
    /// Anything that can only be read or written in order: pipes, sockets, terminals.
    Stream,
    /// A directory.
    Directory,
}

/// Identifies a file or block device across names and links.
pub type FileId = (u64, u64);

/// Whether two files, told by what [`file_layers`] says of them, are one, or one holds the other's
/// bytes: writing to one would change the other. What both rest on does not make them one: two
/// partitions of a disk share nothing.
pub fn same_bytes(one: &[FileId], other: &[FileId]) -> bool {
    let holds = |layers: &[FileId], file: &[FileId]| file.first().is_some_and(|own| layers.contains(own));
    holds(one, other) || holds(other, one)
}

/// Space on a file system, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What this user may still write.
    pub free: u64,
    /// A byte written takes a byte of it: the file system neither compresses nor shares, and it is
    /// this machine's own.
    pub is_exact: bool,
}
