//! VDI images, over a parent that has the right UUIDs.

use std::sync::Arc;

use imgtool_vdi::VdiDriver;

use super::beside::OneFile;
use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

pub(super) fn image(input: &[u8]) -> SparseFile {
    file(input, MAX_FILE_LEN).1
}

/// Returns a dynamic image of 64 KiB in blocks of 4 KiB with the UUIDs that the image states for its parent.
fn parent(image: &SparseFile) -> SparseFile {
    const BLOCK: u32 = 4096;
    let mut file = SparseFile::new(4096 + 8 * u64::from(BLOCK));
    let fields = [(64, 0xbeda_107f_u32), (68, 0x0001_0001), (72, 400), (76, 1), (340, 512), (344, 4096)];
    for (at, value) in fields.into_iter().chain([(368, 16 * BLOCK), (376, BLOCK), (384, 16), (388, 8)]) {
        file.write(at, &value.to_le_bytes());
    }
    // Version 0.1 has its UUIDs elsewhere, and none of the parent's content.
    let uuids = if image.bytes(68..72) == [1, 0, 0, 0] {
        [image.bytes(404..420), vec![0; 16]].concat()
    } else {
        image.bytes(424..456)
    };
    file.write(392, &uuids);
    for entry in 0..16 {
        file.write(512 + 4 * entry, &if entry < 8 { entry as u32 } else { u32::MAX }.to_le_bytes());
    }
    file.write(4096, &[0x50; 30_000]);
    file
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    let beside = OneFile { driver: VdiDriver, file: Arc::new(parent(&file)) };
    exercise::image("vdi", &beside.options(), &|| by_position(&file));
}

#[cfg(test)]
mod tests {
    use imgtool_core::Driver;

    use super::*;

    /// Otherwise, the fuzzer would not reach the reading of children.
    #[test]
    fn the_child_among_the_seeds_finds_its_parent() {
        let file = Arc::new(image(include_bytes!("../../../seeds/vdi/differencing")));
        let beside = OneFile { driver: VdiDriver, file: Arc::new(parent(&file)) };
        let source = VdiDriver.open(by_position(&file), &beside.options()).expect("over its parent");
        let outcome = exercise::random(&source, false);
        assert!(outcome.error.is_none() && outcome.data_bytes > Some(8192), "{outcome:?}");
    }
}
