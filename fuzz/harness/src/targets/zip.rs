//! Zip archives.

use std::sync::Arc;

use imgtool_core::OpenOptions;
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};

use super::by_position;
use crate::exercise;
use crate::sparse::SparseFile;

/// Maximum length in bytes of an archive. Our limit: it has some members and a disk of a few KiB.
const MAX_LEN: usize = 64 << 10;

pub(super) fn run(input: &[u8]) {
    let input = &input[..input.len().min(MAX_LEN)];
    let mut file = SparseFile::new(input.len() as u64);
    file.write(0, input);
    let file = Arc::new(file);
    let opener = PolicyOpener::new(exercise::registry(), ExternalPolicy::default());
    let options = OpenOptions { externals: opener.externals(), ..OpenOptions::default() };
    exercise::image("zip", &options, &|| by_position(&file));
    let options = OpenOptions { member: Some("b.raw".to_owned()), ..options };
    exercise::image("zip", &options, &|| by_position(&file));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise, the fuzzer would not reach the disks.
    #[test]
    fn the_seeds_are_read() {
        for seed in [
            &include_bytes!("../../../seeds/zip/stored")[..],
            include_bytes!("../../../seeds/zip/deflated"),
            include_bytes!("../../../seeds/zip/wide"),
        ] {
            let mut file = SparseFile::new(seed.len() as u64);
            file.write(0, seed);
            let file = Arc::new(file);
            let opener = PolicyOpener::new(exercise::registry(), ExternalPolicy::default());
            let options = OpenOptions { externals: opener.externals(), ..OpenOptions::default() };
            let driver = exercise::registry().get("zip").expect("ours");
            let source = driver.open(by_position(&file), &options).expect("sound");
            let outcome = exercise::random(&source, false);
            assert!(outcome.error.is_none() && outcome.data_bytes > Some(0), "{outcome:?}");
        }
    }
}
