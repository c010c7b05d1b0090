//! Malicious VHDX images, made from a valid one.

use std::path::{Path, PathBuf};

use imgtool_testing::{images, require, tempdir, text};

use super::{Craft, all_end};
use crate::support::imgtool;

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
/// File offset of logs.
const LOG: u64 = 1 << 30;
const LOG_GUID: [u8; 16] = [0x11; 16];
/// File offset of blocks.
const DATA: u64 = 2 << 30;
const MAX: [u8; 4] = u32::MAX.to_le_bytes();
/// Maximum length that fits into 32 bits and is a multiple of 1 MiB.
const MOST: u32 = 0xfff0_0000;
/// State of a payload block: fully present.
const PRESENT: u64 = 6;

/// The first bytes of the GUIDs of metadata items, as stored in a file.
const FILE_PARAMETERS: [u8; 4] = [0x37, 0x67, 0xa1, 0xca];
const DISK_SIZE: [u8; 4] = [0x24, 0x42, 0xa5, 0x2f];
const LOGICAL_SECTOR: [u8; 4] = [0x1d, 0xbf, 0x41, 0x81];

/// Returns the CRC-32C of `bytes`, the checksum of VHDX, computed bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// Corrects the checksum at byte 4 of a structure.
fn seal(craft: &Craft, at: u64, len: usize) {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    craft.put(at + 4, &[0; 4]).file.read_exact_at(&mut bytes, at).unwrap();
    craft.put(at + 4, &crc32c(&bytes).to_le_bytes());
}

/// A valid disk of 256 MiB in blocks of 8 MiB, with the file offsets of its structures.
struct Good {
    bytes: Vec<u8>,
    metadata: u64,
    bat: u64,
}

impl Good {
    fn new(directory: &Path) -> Self {
        let path = directory.join("good");
        imgtool(["create", "-f", "vhdx", text(&path), "256M"]).ok();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let metadata = bytes.windows(8).position(|window| window == b"metadata").unwrap() as u64;
        let region = |guid: [u8; 4]| {
            let entry = bytes[REGIONS[0] as usize..].windows(4).position(|window| window == guid).unwrap();
            let at = REGIONS[0] as usize + entry + 16;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        let bat = region([0x66, 0x77, 0xc2, 0x2d]);
        Self { bytes, metadata, bat }
    }

    /// Returns the file offset of a metadata item's value.
    fn item(&self, guid: [u8; 4]) -> u64 {
        let table = &self.bytes[self.metadata as usize..];
        let entry = table.windows(4).position(|window| window == guid).unwrap();
        self.metadata + u64::from(u32::from_le_bytes(table[entry + 16..entry + 20].try_into().unwrap()))
    }

    /// Creates a file of 8 GiB, mostly a hole, applies `change` to it and corrects its checksums.
    fn edited(&self, directory: &Path, name: &str, change: impl Fn(&Craft)) -> PathBuf {
        let craft = Craft::new(directory, &format!("{name}.vhdx"), 8 << 30);
        craft.put(0, &self.bytes);
        change(&craft);
        HEADERS.iter().for_each(|at| seal(&craft, *at, 4096));
        REGIONS.iter().for_each(|at| seal(&craft, *at, 65_536));
        craft.path
    }
}

/// Writes the same value into both headers or both region tables.
fn each(places: [u64; 2], craft: &Craft, at: u64, value: &[u8]) {
    for place in places {
        craft.put(place + at, value);
    }
}

/// Makes both headers refer to a log of `len` bytes that must be replayed.
fn log(craft: &Craft, len: u32) {
    each(HEADERS, craft, 68, &len.to_le_bytes());
    each(HEADERS, craft, 72, &LOG.to_le_bytes());
    each(HEADERS, craft, 48, &LOG_GUID);
}

/// Writes a log entry with its length, sequence number, file length `last` and descriptors. Corrects its
/// checksum if `sealed`.
fn log_entry(craft: &Craft, len: u32, number: u64, last: u64, descriptors: &[u8], sealed: bool) {
    craft.put(LOG, b"loge").put(LOG + 8, &len.to_le_bytes()).put(LOG + 16, &number.to_le_bytes());
    craft.put(LOG + 24, &(descriptors.len() as u32 / 32).to_le_bytes()).put(LOG + 32, &LOG_GUID);
    craft.put(LOG + 56, &last.to_le_bytes()).put(LOG + 64, descriptors);
    if sealed {
        seal(craft, LOG, len as usize);
    }
}

/// Returns a descriptor that zeroes `len` bytes at file offset `at`.
fn zero_descriptor(at: u64, len: u64, number: u64) -> Vec<u8> {
    [b"zero".as_slice(), &[0; 4], &len.to_le_bytes(), &at.to_le_bytes(), &number.to_le_bytes()].concat()
}

fn logs(directory: &Path) -> Vec<PathBuf> {
    let good = Good::new(directory);
    let edit = |name: &str, change: &dyn Fn(&Craft)| good.edited(directory, name, change);
    vec![
        edit("log-of-4-gib-in-a-hole", &|c| log(c, MOST)),
        edit("log-beyond-the-end", &|c| {
            log(c, MOST);
            each(HEADERS, c, 72, &(7u64 << 30).to_le_bytes());
        }),
        edit("log-over-the-tables", &|c| {
            log(c, MOST);
            each(HEADERS, c, 72, &(1u64 << 20).to_le_bytes());
        }),
        edit("log-of-entries-that-overlap", &|c| {
            log(c, 64 << 20);
            for sector in 0..16_384u64 {
                let at = LOG + sector * 4096;
                c.put(at, b"loge").put(at + 8, &(64u32 << 20).to_le_bytes());
                c.put(at + 16, &(sector + 1).to_le_bytes()).put(at + 24, &[1]).put(at + 32, &LOG_GUID);
            }
        }),
        edit("log-of-one-entry-of-4-gib", &|c| {
            log(c, MOST);
            log_entry(c, MOST, 1, 1 << 30, &zero_descriptor(DATA, 4096, 1), false);
        }),
        edit("log-with-4-gi-descriptors", &|c| {
            log(c, MOST);
            log_entry(c, MOST, 1, 1 << 30, &[], false);
            c.put(LOG + 24, &MAX);
        }),
        edit("log-that-zeroes-everything", &|c| {
            log(c, 1 << 20);
            log_entry(c, 4096, 1, 8 << 30, &zero_descriptor(0, 8 << 30, 1), true);
        }),
        edit("log-that-zeroes-a-million-places", &|c| {
            log(c, 64 << 20);
            let all: Vec<u8> =
                (0..(1u64 << 20) + 8).flat_map(|i| zero_descriptor((1 << 40) + i * 8192, 4096, 1)).collect();
            log_entry(c, (all.len() as u32 + 64).next_multiple_of(4096), 1, 8 << 30, &all, true);
        }),
        edit("log-that-makes-the-file-8-eib", &|c| {
            log(c, 1 << 20);
            log_entry(c, 4096, 1, i64::MAX as u64, &zero_descriptor(DATA, 4096, 1), true);
        }),
        edit("log-whose-tail-is-elsewhere", &|c| {
            log(c, 1 << 20);
            log_entry(c, 4096, u64::MAX, 8 << 30, &zero_descriptor(DATA, 4096, u64::MAX), false);
            c.put(LOG + 12, &(512u32 << 10).to_le_bytes());
            seal(c, LOG, 4096);
        }),
    ]
}

fn tables(directory: &Path) -> Vec<PathBuf> {
    let good = Good::new(directory);
    let edit = |name: &str, change: &dyn Fn(&Craft)| good.edited(directory, name, change);
    let mut all = vec![
        edit("regions-without-number", &|c| each(REGIONS, c, 8, &MAX)),
        edit("2047-regions", &|c| each(REGIONS, c, 8, &2047u32.to_le_bytes())),
        edit("2047-regions-that-must-be-known", &|c| {
            each(REGIONS, c, 8, &2047u32.to_le_bytes());
            for number in 2..2047u64 {
                let mut entry = [number as u8; 32];
                entry[16..24].copy_from_slice(&(number << 20).to_le_bytes());
                entry[24..].copy_from_slice(&[0, 0, 16, 0, 1, 0, 0, 0]);
                each(REGIONS, c, 16 + 32 * number, &entry);
            }
        }),
        edit("regions-of-4-gib", &|c| {
            each(REGIONS, c, 16 + 24, &MOST.to_le_bytes());
            each(REGIONS, c, 48 + 24, &MOST.to_le_bytes());
        }),
        edit("region-beyond-the-end", &|c| each(REGIONS, c, 16 + 16, &(1u64 << 62).to_le_bytes())),
        edit("regions-that-are-one", &|c| each(REGIONS, c, 16 + 16, &(2u64 << 20).to_le_bytes())),
        edit("metadata-without-number", &|c| {
            c.put(good.metadata + 10, &[0xff; 2]);
        }),
        edit("metadata-items-of-4-gib", &|c| {
            (0..5).for_each(|i| {
                c.put(good.metadata + 32 + 32 * i + 20, &MAX);
            });
        }),
        edit("metadata-items-out-of-range", &|c| {
            (0..5).for_each(|i| {
                c.put(good.metadata + 32 + 32 * i + 16, &MAX);
            });
        }),
        edit("metadata-items-in-the-table", &|c| {
            (0..5).for_each(|i| {
                c.put(good.metadata + 32 + 32 * i + 16, &[0; 4]);
            });
        }),
    ];
    let (parameters, size) = (good.item(FILE_PARAMETERS), good.item(DISK_SIZE));
    all.extend([
        edit("blocks-of-4-gib", &|c| {
            c.put(parameters, &MAX);
        }),
        edit("blocks-of-nothing", &|c| {
            c.put(parameters, &[0; 4]);
        }),
        edit("sectors-of-4-gib", &|c| {
            c.put(good.item(LOGICAL_SECTOR), &MAX);
        }),
        edit("a-disk-of-64-tib-in-a-small-bat", &|c| {
            c.put(size, &(64u64 << 40).to_le_bytes());
        }),
        edit("a-disk-of-16-eib", &|c| {
            c.put(size, &u64::MAX.to_le_bytes());
        }),
        edit("one-block-for-all", &|c| {
            c.put(DATA, &images::noise(1, 8 << 20));
            (0..32).for_each(|i| {
                c.put(good.bat + 8 * i, &(DATA | PRESENT).to_le_bytes());
            });
        }),
        edit("blocks-that-are-the-tables", &|c| {
            (0..32).for_each(|i| {
                c.put(good.bat + 8 * i, &((1 << 20) | PRESENT).to_le_bytes());
            });
        }),
        edit("blocks-beyond-the-end", &|c| {
            (0..32).for_each(|i| {
                c.put(good.bat + 8 * i, &(!0xf_ffff | PRESENT).to_le_bytes());
            });
        }),
        edit("blocks-of-states-that-are-none", &|c| {
            (0..32u64).for_each(|i| {
                c.put(good.bat + 8 * i, &(DATA | (i % 8)).to_le_bytes());
            });
        }),
    ]);
    let large = directory.join("64-tib-in-blocks-of-1-mib.vhdx");
    imgtool(["create", "-f", "vhdx", "-o", "block_size=1M", text(&large), "64T"]).ok();
    all.push(large);
    all
}

#[test]
fn hostile_vhdx_logs_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("vhdx-logs", dir.path(), &logs(dir.path()));
}

#[test]
fn hostile_vhdx_tables_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("vhdx-tables", dir.path(), &tables(dir.path()));
}
