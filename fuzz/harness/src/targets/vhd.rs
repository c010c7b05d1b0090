//! VHD images over a parent that has the right UUID, by position and, if they may be fixed, as a stream. Their
//! checksums are corrected first, or the fuzzer would never get past them.

use std::sync::Arc;

use imgtool_core::input::{Cursor, PROBE_LEN};
use imgtool_core::sync::lock;
use imgtool_core::{Access, BufferPool, DeviceId, Driver, Error, Input, OpenOptions, ReadAt, Result};
use imgtool_vhd::VhdDriver;

use super::beside::OneFile;
use super::{by_position, file};
use crate::exercise::{self, opened, printed};
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Flag: keeps the checksums.
const LEAVE_CHECKSUMS: u8 = 1;

/// Maximum length in bytes of a file that is read as a stream. Our limit, for the time per input.
const MAX_STREAM: u64 = 16 << 20;

/// Length in bytes of the footer, and place of its checksum.
const FOOTER: (u64, u64) = (512, 64);
/// Length in bytes of the dynamic header, and place of its checksum.
const HEADER: (u64, u64) = (1024, 36);

pub(super) fn image(input: &[u8]) -> SparseFile {
    let (flags, mut file) = file(input, MAX_FILE_LEN);
    if flags & LEAVE_CHECKSUMS == 0 {
        for footer in footers(&file) {
            if file.bytes(footer..footer + 8) == b"conectix" {
                let header = number(&file.bytes(footer + 16..footer + 24));
                seal(&mut file, header, HEADER);
                seal(&mut file, footer, FOOTER);
            }
        }
    }
    file
}

/// Returns the offsets of the footer, by both of its lengths, and of its copy.
fn footers(file: &SparseFile) -> [u64; 3] {
    [file.len().saturating_sub(511), file.len().saturating_sub(512), 0]
}

/// Corrects the checksum of a structure.
fn seal(file: &mut SparseFile, at: u64, (len, checksum): (u64, u64)) {
    let Some(end) = at.checked_add(len) else { return };
    let mut bytes = file.bytes(at..end);
    let field = checksum as usize..checksum as usize + 4;
    bytes[field.clone()].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    if bytes.iter().any(|byte| *byte != 0) {
        file.write(at + checksum, &(!sum).to_be_bytes());
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Returns a fixed image of 64 KiB with the UUID that the image's header states for its parent.
fn parent(image: &SparseFile) -> SparseFile {
    const SIZE: u64 = 64 << 10;
    let header = number(&image.bytes(16..24));
    let uuid = header.checked_add(56).map(|end| image.bytes(header + 40..end)).unwrap_or_default();
    let mut file = SparseFile::new(SIZE + FOOTER.0);
    file.write(0, &[0x50; 40_000]);
    for (at, bytes) in [
        (0, &b"conectix"[..]),
        (12, &0x0001_0000_u32.to_be_bytes()),
        (16, &[0xff; 8]),
        (48, &SIZE.to_be_bytes()),
        (60, &2_u32.to_be_bytes()),
        (68, &uuid),
    ] {
        file.write(SIZE + at, bytes);
    }
    seal(&mut file, SIZE, FOOTER);
    file
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    let beside = OneFile { driver: VhdDriver, file: Arc::new(parent(&file)) };
    let options = beside.options();
    exercise::image("vhd", &options, &|| by_position(&file));
    let head = file.bytes(0..file.len().min(PROBE_LEN as u64));
    if file.len() > MAX_STREAM || !VhdDriver.reads_stream(&head) {
        return;
    }
    let piped = || Input::from_reader("image", Box::new(Cursor::new(Arc::clone(&file) as _)));
    let streamed = opened(piped().and_then(|input| read_through(&file, input)));
    let checked = opened(piped().and_then(|input| VhdDriver.check(input, &OpenOptions::default())));
    let found = VhdDriver.open(by_position(&file), &options);
    match (streamed, found) {
        (Some(size), Ok(found)) => {
            assert!(found.info().devices[0].size == size, "a stream and a file have different sizes");
            assert!(checked.is_some_and(|report| report.corruptions == 0), "check differs from reading");
        }
        (Some(_), Err(error)) => panic!("a stream is read, but the file is refused: {error}"),
        // A file may have bytes between the disk and the footer.
        (None, found) => drop(found),
    }
}

/// Reads a stream to its end, and asserts that it brings the start of the file. Returns the size of the disk.
fn read_through(file: &SparseFile, input: Input) -> Result<u64> {
    let source = VhdDriver.open(input, &OpenOptions::default())?;
    let Access::Stream(pass) = source.access() else { panic!("not read in one pass") };
    let (mut pass, pool) = (lock(pass), BufferPool::new());
    let mut at = 0;
    while let Some(piece) = pass.next_piece(&pool).inspect_err(printed)? {
        assert_eq!(piece.start, at);
        let end = at + piece.len;
        let bytes = file.bytes(at..end);
        assert!(piece.data.as_deref() == Some(&bytes[..]), "a pipe is not its bytes");
        at = end;
    }
    assert_eq!(pass.final_size(DeviceId(0)), Some(at));
    Ok::<_, Error>(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise, the fuzzer would not reach the reading of children.
    #[test]
    fn the_child_among_the_seeds_finds_its_parent() {
        let file = Arc::new(image(include_bytes!("../../../seeds/vhd/differencing")));
        let beside = OneFile { driver: VhdDriver, file: Arc::new(parent(&file)) };
        let source = VhdDriver.open(by_position(&file), &beside.options()).expect("over its parent");
        let outcome = exercise::random(&source, false);
        assert!(outcome.error.is_none() && outcome.data_bytes > Some(8192), "{outcome:?}");
    }
}
