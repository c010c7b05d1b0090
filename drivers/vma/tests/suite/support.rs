//! Reads archives in every way that a source offers.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use imgtool_core::sync::lock;
use imgtool_core::zero::is_zero;
use imgtool_core::{
    Access, BufferPool, DeviceId, Error, ImageSource, Input, Memory, OpenOptions, RandomAccess, Result,
};
use imgtool_storage::Opening;
use imgtool_testing::memory;
use imgtool_vma::VmaSource;

/// The content of every device, by id.
pub type Content = BTreeMap<u32, Vec<u8>>;

/// Opens a file as the program does, with outer compression undone.
pub fn open_file(path: &Path) -> Input {
    imgtool_storage::open::open(&path.into(), Opening::ByContent, &Memory::default()).unwrap().input
}

pub fn as_file(archive: &[u8]) -> Input {
    memory::as_file("test.vma", archive)
}

pub fn as_stream(archive: &[u8]) -> Input {
    memory::as_stream("test.vma", archive)
}

/// Returns a pipe as the program opens it, with outer compression undone.
pub fn piped(reader: impl Read + Send + 'static) -> Result<Input> {
    memory::from_reader("test.vma", reader)
}

/// Opens an archive and reads every device, in the way that the source offers.
pub fn read(input: Input, options: &OpenOptions) -> Result<Content> {
    read_source(&VmaSource::open(input, options)?)
}

pub fn read_source(source: &dyn ImageSource) -> Result<Content> {
    let devices = source.info().devices.clone();
    match source.access() {
        Access::Random(random) => devices
            .iter()
            .map(|device| Ok((device.id.0, read_random(random, device.id, device.size)?)))
            .collect(),
        Access::Stream(stream) => {
            let mut stream = lock(stream);
            let mut content: Content =
                devices.iter().map(|device| (device.id.0, vec![0xa5; device.size as usize])).collect();
            let mut left: BTreeMap<u32, u64> =
                devices.iter().map(|device| (device.id.0, device.size)).collect();
            let pool = BufferPool::new();
            while let Some(piece) = stream.next_piece(&pool)? {
                let device = content.get_mut(&piece.device.0).unwrap();
                let part = &mut device[piece.start as usize..piece.end() as usize];
                match &piece.data {
                    Some(data) => {
                        assert_eq!(data.len() as u64, piece.len);
                        assert!(piece.len <= 1 << 20, "pieces are at most 1 MiB");
                        part.copy_from_slice(data);
                        assert_zero_outside_runs(data, &piece.runs);
                    }
                    None => part.fill(0),
                }
                let left = left.get_mut(&piece.device.0).unwrap();
                *left = left.checked_sub(piece.len).expect("every byte comes once");
            }
            assert!(left.values().all(|left| *left == 0), "every byte comes: {left:?}");
            Ok(content)
        }
    }
}

fn assert_zero_outside_runs(data: &[u8], runs: &[std::ops::Range<usize>]) {
    let mut from = 0;
    for run in runs {
        assert!(run.start >= from && run.start < run.end);
        assert!(is_zero(&data[from..run.start]));
        from = run.end;
    }
    assert!(is_zero(&data[from..]));
}

/// Reads a device, and checks that its extents match its content.
fn read_random(random: &dyn RandomAccess, id: DeviceId, size: u64) -> Result<Vec<u8>> {
    let mut whole = vec![0xa5; size as usize];
    random.read_at(id, &mut whole, 0)?;
    let mut position = 0;
    while position < size {
        for extent in random.extents(id, position..size)? {
            assert_eq!(extent.start, position, "extents are contiguous");
            assert!(extent.len > 0 && extent.end() <= size);
            let part = &whole[extent.start as usize..extent.end() as usize];
            if extent.is_data() {
                let mut again = vec![0; part.len()];
                random.read_at(id, &mut again, extent.start)?;
                assert_eq!(again, part);
            } else {
                assert!(is_zero(part), "extents without data are zero");
            }
            position = extent.end();
        }
    }
    Ok(whole)
}

/// Reads an archive as a file and as a stream. Both must give the same content or the same error.
pub fn read_both(archive: &[u8], options: &OpenOptions) -> Result<Content> {
    let from_file = read(as_file(archive), options);
    let from_stream = read(as_stream(archive), options);
    match (from_file, from_stream) {
        (Ok(file), Ok(stream)) => {
            assert!(file == stream, "a file and a stream must give the same bytes");
            Ok(file)
        }
        (Err(file), Err(stream)) => {
            assert_eq!(file.to_string(), stream.to_string());
            assert_eq!(file.hint_text(), stream.hint_text());
            Err(file)
        }
        (file, stream) => panic!("{:?} against {:?}", summary(&file), summary(&stream)),
    }
}

fn summary(result: &Result<Content>) -> Result<Vec<usize>, &Error> {
    result.as_ref().map(|content| content.values().map(Vec::len).collect())
}
