//! OVA packages and tar archives, with the checksums of their headers corrected.

use std::sync::Arc;

use imgtool_core::{OpenOptions, ReadAt};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};

use super::{by_position, file};
use crate::exercise;
use crate::sparse::SparseFile;

/// Flag of an input whose checksums stay as they are.
const LEAVE_CHECKSUMS: u8 = 1;

/// Maximum length in bytes of an archive. Our limit, for the time per input: every file in it with a digest
/// is read.
const MAX_LEN: u64 = 16 << 20;

/// Length in bytes of a block.
const BLOCK: u64 = 512;

/// Maximum number of headers that are corrected. Our limit.
const MAX_HEADERS: usize = 1000;

pub(super) fn image(input: &[u8]) -> SparseFile {
    let (flags, mut file) = file(input, MAX_LEN);
    let mut at = 0;
    for _ in 0..MAX_HEADERS {
        if flags & LEAVE_CHECKSUMS != 0 || at >= file.len() {
            break;
        }
        let mut block = file.bytes(at..at + BLOCK);
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        file.write(at + 148, format!("{sum:06o}\0 ").as_bytes());
        let digits = String::from_utf8_lossy(&block[124..136]).into_owned();
        let size = u64::from_str_radix(digits.trim_matches(['\0', ' ']), 8).unwrap_or(0);
        let content = size.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        at = at.saturating_add(BLOCK).saturating_add(content);
    }
    file
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    let bytes = by_position(&file);
    let Ok(head) = bytes.head() else { return };
    let opener = PolicyOpener::new(exercise::registry(), ExternalPolicy::default());
    let options = OpenOptions { externals: opener.externals(), ..OpenOptions::default() };
    for name in ["ova", "tar"] {
        let driver = exercise::registry().get(name).expect("ours");
        if driver.probe(&head, bytes.len()).is_some() {
            exercise::image(name, &options, &|| by_position(&file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise, the fuzzer would not reach the disks.
    #[test]
    fn the_seeds_are_read() {
        for seed in
            [&include_bytes!("../../../seeds/ova/package")[..], include_bytes!("../../../seeds/ova/sparse")]
        {
            let file = Arc::new(image(seed));
            let opener = PolicyOpener::new(exercise::registry(), ExternalPolicy::default());
            let options = OpenOptions { externals: opener.externals(), ..OpenOptions::default() };
            let driver =
                exercise::registry().probe(&by_position(&file).head().expect("read"), None).expect("known").0;
            let source = driver.open(by_position(&file), &options).expect("sound");
            let outcome = exercise::random(&source, false);
            assert!(outcome.error.is_none() && outcome.data_bytes > Some(0), "{outcome:?}");
        }
    }
}
