//! Images of the formats that are only read: Parallels, QED, QCOW version 1, Bochs, cloop, DMG. The content
//! decides which.

use std::sync::Arc;

use imgtool_core::{OpenOptions, Registry, Secret};

use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Returns a registry of these formats.
fn registry() -> Registry {
    let mut registry = Registry::new();
    imgtool_parallels::register(&mut registry);
    imgtool_qed::register(&mut registry);
    imgtool_qcow1::register(&mut registry);
    imgtool_bochs::register(&mut registry);
    imgtool_cloop::register(&mut registry);
    imgtool_dmg::register(&mut registry);
    registry
}

pub(super) fn image(input: &[u8]) -> SparseFile {
    file(input, MAX_FILE_LEN).1
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    let bytes = by_position(&file);
    let (Ok(head), Ok(end)) = (bytes.head(), bytes.end()) else { return };
    // Any passphrase opens an image with QEMU's first AES.
    let options = OpenOptions { secrets: Secret::new(b"x".to_vec()).into(), ..OpenOptions::default() };
    for driver in registry().drivers() {
        if driver.probe(&head, bytes.len()).is_some() || driver.probe_end(end.as_deref()) {
            exercise::image(driver.name(), &options, &|| by_position(&file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise, the fuzzer would not reach the decryption.
    #[test]
    fn the_encrypted_seed_is_read() {
        let file = Arc::new(image(include_bytes!("../../../seeds/small/qcow-aes")));
        let options = OpenOptions { secrets: Secret::new(b"x".to_vec()).into(), ..OpenOptions::default() };
        let driver = registry().get("qcow").expect("registered");
        let source = driver.open(by_position(&file), &options).expect("any passphrase opens it");
        let outcome = exercise::random(&source, false);
        assert!(outcome.error.is_none() && outcome.data_bytes > Some(0), "{outcome:?}");
    }
}
