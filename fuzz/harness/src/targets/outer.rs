//! Outer compression: streams and seekable files. The checksums of lzop files are corrected first.

use std::io;
use std::sync::Arc;

use imgtool_core::{Input, RandomInput, Result};
use imgtool_storage::OpenInput;

use super::from_pipe;
use crate::exercise;
use crate::sparse::SparseFile;

/// Maximum number of decompressed bytes to read. Our limit, for the time per input.
const MOST: usize = 4 << 20;

/// Last bytes of a seekable zstd file.
const SEEK_TABLE_MAGIC: [u8; 4] = [0xb1, 0xea, 0x92, 0x8f];

/// Decompressed content, at most [`MOST`] bytes.
type Plain = Result<Vec<u8>>;

/// Decompresses any format, in several layers, as a stream and by position.
pub(super) fn run(input: &[u8]) {
    let mut file = SparseFile::new(input.len() as u64);
    file.write(0, input);
    let file = Arc::new(file);
    let by_position = || OpenInput::of(Input::from_read_at("image", Arc::clone(&file) as _)).decompressed();
    let piped = from_pipe("-", io::Cursor::new(input.to_vec()));

    let stream = piped.and_then(|open| read_stream(open.input));
    let has_table = input.ends_with(&SEEK_TABLE_MAGIC);
    let is_seekable = by_position().is_ok_and(|open| !open.compression.is_empty() && !open.input.is_stream());
    compare(
        &stream,
        &by_position().and_then(|open| read_stream(open.input)),
        has_table,
        "a file read in order",
    );
    if is_seekable {
        let random = by_position().and_then(|open| read_at_random(&open.input.into_random()?));
        compare(&stream, &random, has_table, "a file read by position");
    }
}

/// Decompresses lzop files. Bit 0 of the first byte keeps the checksums.
pub(super) fn run_lzop(input: &[u8]) {
    let Some((flags, bytes)) = input.split_first() else { return };
    let bytes = if flags & 1 == 0 { lzop::sealed(bytes) } else { bytes.to_vec() };
    if bytes.starts_with(&lzop::MAGIC) {
        run(&bytes);
    }
}

fn read_stream(input: Input) -> Plain {
    let mut stream = input.into_stream()?;
    let mut plain = Vec::new();
    let mut chunk = vec![0; 50_000];
    while plain.len() < MOST {
        let len = stream.read_full(&mut chunk).inspect_err(exercise::printed)?;
        plain.extend_from_slice(&chunk[..len]);
        if len < chunk.len() {
            break;
        }
    }
    plain.truncate(MOST);
    Ok(plain)
}

/// Reads backwards, in parts that do not match frames.
fn read_at_random(input: &RandomInput) -> Plain {
    let len = usize::try_from(input.len()).unwrap_or(usize::MAX).min(MOST);
    let mut plain = vec![0xa5; len];
    let mut end = len;
    while end > 0 {
        let start = end.saturating_sub(30_001);
        input.read_exact_at(&mut plain[start..end], start as u64).inspect_err(exercise::printed)?;
        end = start;
    }
    Ok(plain)
}

/// Asserts that a file reads like a stream. They may differ only if a seek table does not match the file: the
/// stream ignores the table, but the file is refused.
fn compare(stream: &Plain, file: &Plain, has_table: bool, what: &str) {
    match (stream, file) {
        (Ok(stream), Ok(file)) => assert!(stream == file, "{what} has other content than a stream"),
        (Err(_), Err(_)) => {}
        (Ok(_), Err(_)) if has_table => {}
        // The damage is beyond the bytes that are compared.
        (Err(_), Ok(plain)) | (Ok(plain), Err(_)) if plain.len() >= MOST => {}
        (stream, file) => panic!(
            "{what} and a stream disagree: {:?} and {:?}",
            file.as_ref().map(Vec::len),
            stream.as_ref().map(Vec::len)
        ),
    }
}

/// The part of the lzop format that is needed to correct checksums.
mod lzop {
    pub(super) const MAGIC: [u8; 9] = [0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a, 0x0a];

    /// Maximum length in bytes of a block whose checksums are corrected. Our limit, for the time per input.
    const MAX_BLOCK: usize = 1 << 20;

    /// Corrects all checksums in `bytes`, up to the point where they stop being an lzop file.
    pub(super) fn sealed(bytes: &[u8]) -> Vec<u8> {
        let mut file = Sealer { bytes: bytes.to_vec(), at: 0 };
        while file.member().is_some() {}
        file.bytes
    }

    struct Sealer {
        bytes: Vec<u8>,
        at: usize,
    }

    impl Sealer {
        fn take(&mut self, len: usize) -> Option<usize> {
            let start = self.at;
            self.at = start.checked_add(len).filter(|end| *end <= self.bytes.len())?;
            Some(start)
        }

        fn number(&mut self, len: usize) -> Option<u32> {
            let start = self.take(len)?;
            Some(self.bytes[start..self.at].iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
        }

        fn put(&mut self, at: usize, sum: u32) {
            self.bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        }

        fn member(&mut self) -> Option<()> {
            let magic = self.take(MAGIC.len())?;
            if self.bytes[magic..self.at] != MAGIC {
                return None;
            }
            let start = self.at;
            let long = self.number(2)? >= 0x0940;
            self.take(if long { 2 + 2 + 1 + 1 } else { 2 + 1 })?;
            let flags = self.number(4)?;
            let filter = if flags & 0x800 != 0 { 4 } else { 0 };
            self.take(filter + 8 + if long { 4 } else { 0 })?;
            let name_len = self.number(1)? as usize;
            self.take(name_len)?;
            let end = self.at;
            let sum = self.take(4)?;
            let header = &self.bytes[start..end];
            let right =
                if flags & 0x1000 != 0 { crc32fast::hash(header) } else { adler2::adler32_slice(header) };
            self.put(sum, right);
            if flags & 0x40 != 0 {
                let len = self.number(4)? as usize;
                self.take(len.checked_add(4)?)?;
            }
            while self.block(flags)? {}
            Some(())
        }

        fn block(&mut self, flags: u32) -> Option<bool> {
            let plain_len = self.number(4)? as usize;
            if plain_len == 0 {
                return Some(false);
            }
            let stored_len = self.number(4)? as usize;
            let is_compressed = stored_len < plain_len;
            let mut places = [None; 4];
            for (place, flag) in places.iter_mut().zip([0x1, 0x100, 0x2, 0x200]) {
                let of_stored = flag & 0x202 != 0;
                if flags & flag != 0 && (is_compressed || !of_stored) {
                    *place = Some(self.take(4)?);
                }
            }
            let start = self.take(stored_len)?;
            let stored = self.bytes[start..self.at].to_vec();
            let mut plain = vec![0; if plain_len <= MAX_BLOCK { plain_len } else { 0 }];
            if !is_compressed {
                plain.clone_from(&stored);
            } else if lzokay::decompress::decompress(&stored, &mut plain).is_err() {
                plain.clear();
            }
            let sums = [
                adler2::adler32_slice(&plain),
                crc32fast::hash(&plain),
                adler2::adler32_slice(&stored),
                crc32fast::hash(&stored),
            ];
            for (place, sum) in places.into_iter().zip(sums) {
                if let Some(at) = place {
                    self.put(at, sum);
                }
            }
            Some(true)
        }
    }
}
