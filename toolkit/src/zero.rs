//! Zero detection: which parts of a buffer hold anything.
//!
//! An OR-fold of u64 words with an early exit every 128 bytes. The compiler vectorises it; it runs
//! at memory speed on zeros and leaves at the first word of most data. An `align_to` in unsafe code
//! was measured to be slower.

use std::ops::Range;

/// Zeros are told apart in units of this many bytes: the sub-block of VMA, the page of every cache,
/// and the default sparse granularity of `qemu-img -S`.
pub const ZERO_GRANULARITY: usize = 4096;

/// Bytes looked at between two tests for an early exit; 64..128 measured best.
const FOLD: usize = 128;

/// Whether every byte of `bytes` is zero; an empty slice is.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(FOLD);
    for chunk in &mut chunks {
        let (words, _) = chunk.as_chunks::<8>();
        let folded = words.iter().fold(0u64, |acc, word| acc | u64::from_ne_bytes(*word));
        if folded != 0 {
            return false;
        }
    }
    chunks.remainder().iter().all(|&byte| byte == 0)
}

/// The maximal runs within `within` that are not zero, told apart in units of `granularity` bytes
/// counted from the start of `bytes`.
///
/// Runs are pushed as ranges of `bytes`, ascending and disjoint; their starts are multiples of
/// `granularity` or `within.start`, their ends likewise or `within.end`.
pub fn push_nonzero_runs(
    bytes: &[u8],
    within: Range<usize>,
    granularity: usize,
    runs: &mut Vec<Range<usize>>,
) {
    let mut position = within.start;
    while position < within.end {
        let next = ((position / granularity + 1) * granularity).min(within.end);
        if !is_zero(&bytes[position..next]) {
            match runs.last_mut() {
                Some(last) if last.end == position => last.end = next,
                _ => runs.push(position..next),
            }
        }
        position = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [1, 7, 8, 127, 128, 129, 4096, 4097] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            for position in [0, len / 2, len - 1] {
                bytes[position] = 1;
                assert!(!is_zero(&bytes), "len {len} position {position}");
                bytes[position] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn runs_join_and_keep_ragged_tails() {
        let mut bytes = vec![0u8; 4096 * 5 + 100];
        bytes[4096] = 1;
        bytes[4096 * 3 - 1] = 1;
        bytes[4096 * 5 + 99] = 1;
        let mut runs = Vec::new();
        push_nonzero_runs(&bytes, 0..bytes.len(), 4096, &mut runs);
        assert_eq!(runs, [4096..4096 * 3, 4096 * 5..4096 * 5 + 100]);
    }
}
