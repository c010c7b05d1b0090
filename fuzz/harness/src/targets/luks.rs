//! LUKS containers, opened with the passphrase of the seeds and without one.

use std::sync::Arc;

use imgtool_core::{OpenOptions, Secret};
use imgtool_crypt::{HEADER_LEN, Header};

use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Passphrase of the seeds.
const PASSPHRASE: &[u8] = b"fuzz";

/// Maximum number of PBKDF2 iterations with which an input is unlocked: more would take longer than an input may.
const MAX_ITERATIONS: u64 = 5000;

pub(super) fn image(input: &[u8]) -> SparseFile {
    file(input, MAX_FILE_LEN).1
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    exercise::image("luks", &OpenOptions::default(), &|| by_position(&file));
    let layout = OpenOptions { layout_only: true, ..OpenOptions::default() };
    let _ =
        exercise::opened(exercise::registry().get("luks").expect("ours").open(by_position(&file), &layout));
    if is_quick(&file) {
        let secrets = Secret::new(PASSPHRASE.to_vec()).into();
        let options = OpenOptions { secrets, ..OpenOptions::default() };
        exercise::image("luks", &options, &|| by_position(&file));
    }
}

/// True if unlocking takes little time.
fn is_quick(file: &SparseFile) -> bool {
    let Ok(header) = Header::parse(&file.bytes(0..HEADER_LEN as u64)) else { return true };
    let slots = header.slots.iter().filter(|slot| slot.active);
    let each =
        |slot: &imgtool_crypt::KeySlot| u64::from(slot.iterations) + u64::from(header.digest_iterations);
    slots.map(each).sum::<u64>() <= MAX_ITERATIONS
}
