//! Detection of formats by content and name, raw images, and the partitions on them.

use std::io;
use std::sync::Arc;

use imgtool_core::sync::lock;
use imgtool_core::{Access, BufferPool, DeviceId, Disk, Input, Location, OpenOptions};
use imgtool_platform::Guest;
use imgtool_storage::OpenInput;

use super::from_pipe;
use crate::exercise;
use crate::sparse::SparseFile;

/// Names of the image. The first byte of the input selects one.
const NAMES: [&str; 11] = [
    "disk",
    "-",
    "disk.raw",
    "disk.qcow2",
    "disk.vhdx",
    "backup.vma",
    "backup.vma.zst",
    "disk.img.gz",
    "disk.vhd",
    "disk.vhd.gz",
    "disk.dmg",
];

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
    let open_by_position = || OpenInput::of(by_position());
    let piped = || from_pipe(name, io::Cursor::new(bytes.to_vec()));

    // Opened by content, like `convert`.
    for input in [Ok(open_by_position()), open_by_position().decompressed(), piped()] {
        let options = OpenOptions::default();
        let opened =
            input.and_then(|input| imgtool_engine::open::open_image(&registry, input, None, &options));
        if let Some(opened) = exercise::opened(opened) {
            assert!(opened.location == Location::from(name));
            let _ = exercise::random(&opened.image, false);
        }
    }
    // Opened as raw, which accepts any bytes.
    exercise::image("raw", &OpenOptions::default(), &by_position);
    let raw = registry.get("raw").expect("a driver of ours");
    let source = raw.open(by_position(), &OpenOptions::default()).expect("anything is a raw image");
    let mut content = vec![0; bytes.len()];
    let Access::Random(random) = source.access() else { panic!("a file is read at random") };
    random.read_at(DeviceId(0), &mut content, 0).expect("all of it is there");
    assert!(content == bytes, "a raw image is not its bytes");
    let disk = Disk::only(Arc::clone(&source), "a raw image").expect("one disk");
    for sector_size in [512, 4096] {
        Guest::look(&disk, sector_size).expect("a look at any disk succeeds");
    }
    if imgtool_storage::outer::detect(bytes).is_none() {
        let source = raw
            .open(piped().expect("nothing to undo").input, &OpenOptions::default())
            .expect("anything is a raw image");
        let Access::Stream(stream) = source.access() else { panic!("a pipe is read in one pass") };
        let mut stream = lock(stream);
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
