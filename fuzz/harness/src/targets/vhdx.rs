//! VHDX images. Their checksums are corrected first, or the fuzzer would never get past them.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{OpenOptions, ReadAt};

use super::{by_position, file};
use crate::exercise;
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Flag: keeps the checksums.
const LEAVE_CHECKSUMS: u8 = 1;

/// Both headers and both region tables: signature, file offset and length in bytes (MS-VHDX 2.2).
const STRUCTURES: [(&[u8; 4], u64, u64); 4] = [
    (b"head", 64 << 10, 4 << 10),
    (b"head", 128 << 10, 4 << 10),
    (b"regi", 192 << 10, 64 << 10),
    (b"regi", 256 << 10, 64 << 10),
];

/// Maximum length in bytes of a log entry whose checksum is corrected. Our limit, for the time per input.
const MAX_ENTRY: u64 = 1 << 20;
/// Maximum number of log entries per header whose checksums are corrected. Our limit, for the time per input.
const MAX_ENTRIES: usize = 64;

pub(super) fn image(input: &[u8]) -> SparseFile {
    let (flags, mut file) = file(input, MAX_FILE_LEN);
    if flags & LEAVE_CHECKSUMS == 0 {
        for (signature, at, len) in STRUCTURES {
            if file.bytes(at..at + 4) == signature {
                seal(&mut file, at, len);
            }
        }
        seal_log(&mut file);
    }
    file
}

/// Corrects the CRC-32C at byte 4 of a structure.
fn seal(file: &mut SparseFile, at: u64, len: u64) {
    let mut bytes = file.bytes(at..at.saturating_add(len));
    bytes[4..8].fill(0);
    file.write(at + 4, &crc32c::crc32c(&bytes).to_le_bytes());
}

/// Corrects the checksums of the log entries of both headers (MS-VHDX 2.3.1.1). Entries that wrap around the
/// end of the log keep their checksums.
fn seal_log(file: &mut SparseFile) {
    for (_, header, _) in &STRUCTURES[..2] {
        let fields = file.bytes(header + 68..header + 80);
        let (length, offset) = (number(&fields, 0..4), number(&fields, 4..12));
        let end = offset.saturating_add(length).min(file.len());
        let sectors: Vec<u64> = file.written(offset..end).filter(|at| at % 4096 == 0).collect();
        let entries = sectors.into_iter().filter(|at| file.bytes(*at..at + 4) == b"loge");
        let entries: Vec<u64> = entries.take(MAX_ENTRIES).collect();
        for at in entries {
            let len = number(&file.bytes(at + 8..at + 12), 0..4);
            if (64..=MAX_ENTRY.min(end - at)).contains(&len) {
                seal(file, at, len);
            }
        }
    }
}

fn number(bytes: &[u8], field: Range<usize>) -> u64 {
    bytes[field].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    exercise::image("vhdx", &OpenOptions::default(), &|| by_position(&file));
}
