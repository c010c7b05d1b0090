//! The words of the reference program.
//!
//! The core of every error message of this crate about an archive is the reference program's own
//! phrase ("short vma extent (87200 < 1192448)"), so that people find it where they look for it;
//! place and hint come beside it. One word is spelled differently there.

use imgtool_toolkit::Error;

/// What the reference program says in place of `error`: without place and hint, letter for letter.
pub fn message(error: &Error) -> String {
    match error.message() {
        "wrong vma header checksum" => "wrong vma header chechsum".to_owned(),
        "wrong vma extent header checksum" => "wrong vma extent header chechsum".to_owned(),
        other => other.to_owned(),
    }
}
