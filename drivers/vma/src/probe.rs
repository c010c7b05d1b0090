//! Knowing an archive by its first bytes.

use imgtool_toolkit::Confidence;

use crate::layout::MAGIC;

pub(crate) fn probe(head: &[u8]) -> Option<Confidence> {
    head.starts_with(&MAGIC).then_some(Confidence::Magic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_magic_number_decides() {
        assert_eq!(probe(b"VMA\0\0\0\0\x01"), Some(Confidence::Magic));
        for other in [&b"VMA"[..], b"VMAE\0\0", b"QFI\xfb", b""] {
            assert_eq!(probe(other), None);
        }
    }
}
