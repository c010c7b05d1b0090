//! qcow2 images.

use std::sync::Arc;

use imgtool_core::OpenOptions;

use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Flag: the file may have any length.
const ANY_LEN: u8 = 1;

/// Maximum length in bytes of a file without this flag. Our limit: `check` has a counter for each cluster of
/// the
/// file.
const MAX_LEN: u64 = 256 << 20;

pub(super) fn image(input: &[u8]) -> SparseFile {
    let is_long = input.first().is_some_and(|flags| flags & ANY_LEN != 0);
    file(input, if is_long { MAX_FILE_LEN } else { MAX_LEN }).1
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    exercise::image("qcow2", &OpenOptions::default(), &|| by_position(&file));
    exercise::bitmaps("qcow2", &|| by_position(&file));
}
