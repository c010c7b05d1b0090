//! Error messages of the reference program.
//!
//! If the reference program has a phrase for an error ("short vma extent (87200 < 1192448)"), the driver uses
//! it as the message, so that a search for it finds existing explanations. Place and hint are separate fields
//! of the error. Phrases used in more than one file are defined here.
//!
//! The reference program misspells two of these phrases. This crate's errors spell them correctly and have a
//! [`ChecksumMismatch`] as their cause, from which [`message`] restores the reference program's spelling.

use std::error::Error as StdError;
use std::fmt;

use imgtool_core::Error;

/// Message for a file that ends within the fixed part of the archive header.
pub(crate) const HEADER_EOF: &str = "can't read vma header - got EOF";
/// Message for an extent whose masks mark more sub-blocks than its `block_count`.
pub(crate) const TOO_MANY_BLOCKS: &str = "short vma extent - too many blocks";
/// Message for an extent whose masks mark fewer sub-blocks than its `block_count`.
pub(crate) const MISSING_BLOCKS: &str = "vma extent error - missing blocks";

/// Returns the message for a file that ends `got` bytes into an extent header.
pub(crate) fn short_header(got: usize) -> String {
    format!("read short extent ({got} bytes)")
}

/// Returns the message for a file that contains only `available` of the `needed` bytes of an extent, header
/// included.
pub(crate) fn short_extent(available: u64, needed: u64) -> String {
    format!("short vma extent ({available} < {needed})")
}

/// Kind of header whose MD5 is wrong. It is the cause ([`StdError::source`]) of the error about the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumMismatch {
    /// The archive header.
    ArchiveHeader,
    /// An extent header.
    ExtentHeader,
}

impl ChecksumMismatch {
    /// Returns an error that has this mismatch as its cause.
    pub(crate) fn error(self) -> Error {
        let message = match self {
            Self::ArchiveHeader => "wrong vma header checksum",
            Self::ExtentHeader => "wrong vma extent header checksum",
        };
        Error::corrupt(message).because(self)
    }

    /// Returns the message in the reference program's spelling.
    fn reference_message(self) -> &'static str {
        match self {
            Self::ArchiveHeader => "wrong vma header chechsum",
            Self::ExtentHeader => "wrong vma extent header chechsum",
        }
    }
}

impl fmt::Display for ChecksumMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("its MD5 does not match its content")
    }
}

impl StdError for ChecksumMismatch {}

/// Returns the reference program's message for `error`, letter for letter, without place and hint.
pub fn message(error: &Error) -> String {
    let mismatch = error.source().and_then(|cause| cause.downcast_ref::<ChecksumMismatch>());
    mismatch.map_or_else(|| error.message(), |mismatch| mismatch.reference_message()).to_owned()
}
