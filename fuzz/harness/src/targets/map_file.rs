//! The map file of `imgtool vma extract -r`.

use imgtool_core::{Error, ErrorKind};

use crate::exercise;

/// The program's own module, unchanged.
#[path = "../../../../src/commands/vma/map_file.rs"]
#[allow(dead_code)]
mod parser;

/// The function that the module imports from its parent.
fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

pub(super) fn run(input: &[u8]) {
    let Some(map) = exercise::opened(parser::Map::from_reader(input)) else { return };
    let limit = map.limit();
    for word in input.split(|byte| b"=:\n".contains(byte)) {
        match map.get(word) {
            Some(parser::Entry::Target { bps, .. }) => {
                assert!(*bps == 0 || limit.is_some_and(|limit| limit <= *bps));
            }
            Some(parser::Entry::Skip) | None => {}
        }
    }
}
