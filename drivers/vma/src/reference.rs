//! Error messages of the reference program.
//!
//! Every error about an archive begins with the reference program's own phrase ("short vma extent
//! (87200 < 1192448)"), so that a search for it finds existing explanations. Place and hint follow
//! separately. Phrases used in more than one file are defined here.

use imgtool_toolkit::Error;

/// The file ends within the fixed part of the archive header.
pub(crate) const HEADER_EOF: &str = "can't read vma header - got EOF";
/// The MD5 of the archive header is wrong. [`message`] has the reference program's spelling.
pub(crate) const HEADER_CHECKSUM: &str = "wrong vma header checksum";
/// The MD5 of an extent header is wrong. [`message`] has the reference program's spelling.
pub(crate) const EXTENT_CHECKSUM: &str = "wrong vma extent header checksum";
/// The masks of an extent mark more sub-blocks than its `block_count`.
pub(crate) const TOO_MANY_BLOCKS: &str = "short vma extent - too many blocks";
/// The masks of an extent mark fewer sub-blocks than its `block_count`.
pub(crate) const MISSING_BLOCKS: &str = "vma extent error - missing blocks";

/// The file ends `got` bytes into an extent header.
pub(crate) fn short_header(got: usize) -> String {
    format!("read short extent ({got} bytes)")
}

/// The file holds only `available` of the `needed` bytes of an extent, header included.
pub(crate) fn short_extent(available: u64, needed: u64) -> String {
    format!("short vma extent ({available} < {needed})")
}

/// Returns the reference program's message for `error`, letter for letter, without place and hint.
pub fn message(error: &Error) -> String {
    match error.message() {
        HEADER_CHECKSUM => "wrong vma header chechsum".to_owned(),
        EXTENT_CHECKSUM => "wrong vma extent header chechsum".to_owned(),
        other => other.to_owned(),
    }
}
