//! Recognising an image by its first bytes.

use imgtool_toolkit::Confidence;

use crate::layout::header::MAGIC;

/// The magic number; a version that is not known is refused by name when the image is opened.
pub fn probe(head: &[u8]) -> Option<Confidence> {
    head.starts_with(&MAGIC).then_some(Confidence::Magic)
}
