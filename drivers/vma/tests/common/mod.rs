//! What the tests of this crate share.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use imgtool_toolkit::storage::ReadAt;
use imgtool_toolkit::zero::is_zero;
use imgtool_toolkit::{
    Access, BufferPool, DeviceId, Error, ImageSource, Input, OpenOptions, RandomAccess, Result,
};
use imgtool_vma::VmaSource;
use sha2::{Digest, Sha256};

/// The content of every device by id.
pub type Content = BTreeMap<u32, Vec<u8>>;

/// A file of the repository's fixtures.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A file in memory.
struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> std::io::Result<()> {
        let start = usize::try_from(position).unwrap();
        let bytes = self.0.get(start..start + buf.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

pub fn as_file(archive: &[u8]) -> Input {
    Input::from_read_at("test.vma", Arc::new(Memory(archive.to_vec())))
}

/// Hands out few bytes at a time, as pipes do.
struct Drip(std::io::Cursor<Vec<u8>>);

impl Read for Drip {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let count = buf.len().min(10_007);
        self.0.read(&mut buf[..count])
    }
}

pub fn as_stream(archive: &[u8]) -> Input {
    let reader = Drip(std::io::Cursor::new(archive.to_vec()));
    Input::from_stream("test.vma", Box::new(reader)).unwrap()
}

/// Opens and reads everything, whichever way the source offers.
pub fn read(input: Input, options: &OpenOptions) -> Result<Content> {
    let mut source = VmaSource::open(input, options)?;
    read_source(&mut source)
}

pub fn read_source(source: &mut VmaSource) -> Result<Content> {
    let devices = source.info().devices.clone();
    match source.access() {
        Access::Random(random) => devices
            .iter()
            .map(|device| Ok((device.id.0, read_random(random, device.id, device.size)?)))
            .collect(),
        Access::Sequential(stream) => {
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

/// Reads a device by its extents, and checks that these tell the truth.
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

/// Reads from a file and from a stream; both must say the same.
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

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
