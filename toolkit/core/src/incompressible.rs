//! Recognition of data that deflate can't shorten: packages, pictures, encrypted files.
//!
//! Deflate saves bytes in two ways: frequent byte values get short codes, and repeated strings become references.
//! The test looks for both and takes a fifth of the time of the fastest deflate level. It errs towards
//! compressing: a wrong `true` costs space, a wrong `false` only time.

/// Minimum length in bytes of data to judge. In shorter data the frequencies of random bytes differ too much.
const MIN_LEN: usize = 16 << 10;
/// Maximum length in bytes of data to judge: the sums of squares stay far below 2^64.
const MAX_LEN: usize = 64 << 20;

/// Length in bytes of a line of the first sample, and the distance between two lines: 4 KiB of 64.
const LINE: usize = 64;
const LINE_DISTANCE: usize = 1024;

/// Unevenness of the frequencies up to which codes save less than 0.2 %, in 1/1000 of the square of the length:
/// the entropy is then within 0.015 bits of 8.
const MAX_UNEVENNESS: u64 = 20;

/// One position of this number is compared, chosen by its content, so that a string of some hundred bytes meets its
/// repetition at whatever distance.
const SAMPLING_BITS: u32 = 5;

/// Number of 8-byte words to remember, as a power of two: 32 KiB of memory.
const TABLE_BITS: u32 = 12;

/// Reports whether deflate would hardly shorten `data`: all byte values are about equally frequent, and no longer
/// string repeats. Always false below 16 KiB and above 64 MiB.
pub fn looks_incompressible(data: &[u8]) -> bool {
    if !(MIN_LEN..=MAX_LEN).contains(&data.len()) {
        return false;
    }
    let sample = data.chunks(LINE_DISTANCE).filter_map(|chunk| chunk.get(..LINE));
    has_even_frequencies(sample) && has_even_frequencies(std::iter::once(data)) && !has_repetitions(data)
}

/// Reports whether all byte values are about equally frequent in the parts.
fn has_even_frequencies<'a>(parts: impl Iterator<Item = &'a [u8]>) -> bool {
    // Two tables, since two increments of one counter would wait for each other.
    let mut counts = [[0u64; 256]; 2];
    let mut len = 0u64;
    for part in parts {
        let (pairs, rest) = part.as_chunks::<2>();
        for [even, odd] in pairs {
            counts[0][usize::from(*even)] += 1;
            counts[1][usize::from(*odd)] += 1;
        }
        for byte in rest {
            counts[0][usize::from(*byte)] += 1;
        }
        len += part.len() as u64;
    }
    let [even, odd] = counts;
    let squares: u64 = even.iter().zip(odd).map(|(even, odd)| (even + odd) * (even + odd)).sum();
    // Pearson's statistic, times the expected count: on average 1 per byte for random bytes, and less than 1.5 but
    // for one of some million buffers.
    let excess = (squares * 256).saturating_sub(len * len);
    excess <= len * len * MAX_UNEVENNESS / 1000 + len * 256 * 3 / 2
}

/// Reports whether an 8-byte word that is sampled occurs twice.
fn has_repetitions(data: &[u8]) -> bool {
    let mut table = [0u64; 1 << TABLE_BITS];
    data.windows(8).enumerate().any(|(index, window)| {
        let word = window.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let hash = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Data with a short period may have no chosen word, so positions at a fixed distance are compared as well.
        let chosen = hash >> (64 - SAMPLING_BITS) == 0 || index.is_multiple_of(LINE);
        // The bits below those that chose the word. An empty entry counts as the word 0, which compresses anyway.
        let slot = &mut table[(hash >> (64 - SAMPLING_BITS - TABLE_BITS)) as usize & ((1 << TABLE_BITS) - 1)];
        chosen && std::mem::replace(slot, word) == word
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a linear congruential generator.
    fn random(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn random_bytes_are_incompressible_from_the_minimum_on() {
        for len in [16 << 10, 64 << 10, 65 << 10, 1 << 20, 2 << 20] {
            assert!(looks_incompressible(&random(len)), "{len} bytes");
        }
        assert!(!looks_incompressible(&random((16 << 10) - 1)));
    }

    #[test]
    fn repetitions_are_found_at_every_distance() {
        for period in [1, 2, 3, 17, 100, 255, 256, 257, 1000, 4096, 10_000, 16_384, 30_000] {
            let data: Vec<u8> = random(period).into_iter().cycle().take(64 << 10).collect();
            assert!(!looks_incompressible(&data), "period {period}");
        }
        let counter: Vec<u8> = (0..64usize << 10).map(|at| at as u8).collect();
        assert!(!looks_incompressible(&counter));
        let mut copied = random(64 << 10);
        copied.copy_within(20_001..21_001, 50_000);
        assert!(!looks_incompressible(&copied));
    }

    #[test]
    fn uneven_frequencies_are_found() {
        let text: Vec<u8> = random(64 << 10).iter().map(|byte| byte % 64 + b' ').collect();
        assert!(!looks_incompressible(&text));
        let sevenbit: Vec<u8> = random(64 << 10).iter().map(|byte| byte & 0x7f).collect();
        assert!(!looks_incompressible(&sevenbit));
        let mut half = random(64 << 10);
        half[32 << 10..].fill(0);
        assert!(!looks_incompressible(&half));
        let mut end = random(64 << 10);
        end[60 << 10..].fill(7);
        assert!(!looks_incompressible(&end));
    }

    #[test]
    fn sums_of_the_longest_data_do_not_overflow() {
        assert!(!looks_incompressible(&vec![1; MAX_LEN]));
        assert!(!looks_incompressible(&vec![1; MAX_LEN + 1]));
    }
}
