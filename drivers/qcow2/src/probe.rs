//! Recognising an image by its first bytes.

use imgtool_toolkit::Confidence;

use crate::layout::header::MAGIC;

/// The magic number and a version that some reader knows.
pub fn probe(head: &[u8]) -> Option<Confidence> {
    let version = crate::layout::be32(head, 4)?;
    (head.starts_with(&MAGIC) && (1..=3).contains(&version)).then_some(Confidence::Magic)
}
