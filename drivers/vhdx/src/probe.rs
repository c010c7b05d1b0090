//! Telling whether a file is a VHDX image.

use imgtool_toolkit::Confidence;

use crate::layout::header::FILE_SIGNATURE;

/// By the signature of the file type identifier (section 2.2.1).
pub(crate) fn probe(head: &[u8]) -> Option<Confidence> {
    head.starts_with(FILE_SIGNATURE).then_some(Confidence::Magic)
}
