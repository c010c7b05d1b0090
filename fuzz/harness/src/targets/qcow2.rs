//! qcow2 images.

use std::sync::Arc;

use imgtool_toolkit::OpenOptions;

use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

pub(super) fn image(input: &[u8]) -> SparseFile {
    file(input, MAX_FILE_LEN).1
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    exercise::image("qcow2", &OpenOptions::default(), &|| by_position(&file));
}
