//! Detection of formats by content and name, and raw images.

use std::io;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::{Access, BufferPool, DeviceId, Input, OpenOptions};

use crate::exercise;
use crate::sparse::SparseFile;

/// Names of the image, one of which the first byte of the input picks.
const NAMES: [&str; 8] =
    ["disk", "-", "disk.raw", "disk.qcow2", "disk.vhdx", "backup.vma", "backup.vma.zst", "disk.img.gz"];

pub(super) fn run(input: &[u8]) {
    let Some((pick, bytes)) = input.split_first() else { return };
    let name = NAMES[usize::from(*pick) % NAMES.len()];
    let registry = exercise::registry();
    for driver in registry.drivers() {
        let _ = driver.probe(bytes, Some(bytes.len() as u64));
        let _ = driver.probe(bytes, None);
    }
    let mut file = SparseFile::new(bytes.len() as u64);
    file.write(0, bytes);
    let file = Arc::new(file);
    let by_position = || Input::from_read_at(name, Arc::clone(&file) as _);
    let stream = || Input::from_stream(name, Box::new(io::Cursor::new(bytes.to_vec())));

    // Opened by content, as `convert` does.
    for input in [Ok(by_position()), by_position().decompressed(), stream()] {
        let opened = input.and_then(|input| registry.open(input, None, &OpenOptions::default()));
        if let Some(opened) = exercise::opened(opened) {
            assert!(Path::new(name) == opened.path);
            let _ = exercise::random(&*opened.source, false);
        }
    }
    // Opened as raw, which accepts any bytes.
    exercise::image("raw", &OpenOptions::default(), &by_position);
    let raw = registry.get("raw").expect("a driver of ours");
    let mut source = raw.open(by_position(), &OpenOptions::default()).expect("anything is a raw image");
    let mut content = vec![0; bytes.len()];
    let Access::Random(random) = source.access() else { panic!("a file is read at random") };
    random.read_at(DeviceId(0), &mut content, 0).expect("all of it is there");
    assert!(content == bytes, "a raw image is not its bytes");
    if imgtool_toolkit::storage::outer::detect(bytes).is_none() {
        let mut source = raw
            .open(stream().expect("nothing to undo"), &OpenOptions::default())
            .expect("anything is a raw image");
        let Access::Sequential(stream) = source.access() else { panic!("a pipe is read in one pass") };
        let pool = BufferPool::new();
        let mut at = 0;
        while let Some(piece) = stream.next_piece(&pool).expect("nothing can fail") {
            assert_eq!(piece.start, at as u64);
            let end = at + piece.len as usize;
            let zeros = vec![0; end - at];
            assert!(piece.data.as_deref().unwrap_or(&zeros) == &bytes[at..end], "a pipe is not its bytes");
            at = end;
        }
        assert_eq!((at, stream.final_size(DeviceId(0))), (bytes.len(), Some(at as u64)));
    }
}
