//! Malicious qcow2 images: header, extensions, snapshots and refcounts.

use std::path::{Path, PathBuf};

use imgtool_testing::{require, tempdir};

use super::{Craft, all_end, qcow2, run};

const L1: u64 = 1 << 21;
const REFTABLE: u64 = 1 << 22;
/// File offset of snapshots, bitmaps and names.
const ELSEWHERE: u64 = 1 << 24;

/// Creates an image of a disk of 1 GiB, and applies `change` to it.
fn edited(directory: &Path, name: &str, change: impl Fn(&Craft)) -> PathBuf {
    let craft = qcow2(directory, &format!("{name}.qcow2"), 64 << 20, 16, 1 << 30, 2);
    change(&craft);
    craft.path
}

/// Writes the type and length of the first header extension.
fn extension(craft: &Craft, kind: u32, len: u32) {
    craft.be32(104, kind).be32(108, len);
}

/// Writes a bitmaps extension with this number of bitmaps and a directory of `directory_len` bytes.
fn bitmaps(craft: &Craft, number: u32, directory_len: u64) {
    craft.be64(88, 1);
    extension(craft, 0x2385_2875, 24);
    craft.be32(112, number).be64(120, directory_len).be64(128, ELSEWHERE);
}

fn headers(directory: &Path) -> Vec<PathBuf> {
    let mut all = vec![
        edited(directory, "header-of-4-gib", |c| {
            c.be32(100, u32::MAX);
        }),
        edited(directory, "refcount-bits-of-2-to-255", |c| {
            c.be32(96, 255);
        }),
        edited(directory, "clusters-of-2-to-the-31", |c| {
            c.be32(20, 31);
        }),
        edited(directory, "extension-of-4-gib", |c| extension(c, 0x6803_f857, u32::MAX)),
        edited(directory, "extensions-without-end", |c| {
            (104..65_000).step_by(8).for_each(|at| {
                c.be32(at, 7);
            });
        }),
        edited(directory, "features-that-paint-the-terminal", |c| {
            c.be64(72, 0xffff_ffff_0000_0000);
            extension(c, 0x6803_f857, 48 * 64);
            for bit in 0..64u8 {
                c.put(112 + 48 * u64::from(bit), &[0, bit]);
                c.put(114 + 48 * u64::from(bit), b"\x1b]0;mine\x07\x1b[2J\x9b31m\xe2\x80\xae\r\n\0");
            }
        }),
        edited(directory, "backing-name-of-4-gib", |c| {
            c.be64(8, 4096).be32(16, u32::MAX);
        }),
        edited(directory, "backing-name-that-paints", |c| {
            let name = b"\x1b[2J\x1b]52;c;bWluZQ==\x07\n\r\x08\x7f";
            c.be64(8, 4096).be32(16, name.len() as u32).put(4096, name);
        }),
        edited(directory, "itself-as-backing-file", |c| {
            c.be64(8, 4096).be32(16, 28).put(4096, b"itself-as-backing-file.qcow2");
        }),
        edited(directory, "itself-as-data-file", |c| {
            c.be64(72, 4);
            extension(c, 0x4441_5441, 25);
            c.put(112, b"itself-as-data-file.qcow2");
        }),
    ];
    all.extend([
        edited(directory, "bitmaps-without-number", |c| bitmaps(c, u32::MAX, u64::MAX)),
        edited(directory, "bitmaps-in-a-hole", |c| bitmaps(c, 65_535, 32 << 20)),
        edited(directory, "bitmaps-that-share-a-table-of-4-gi-entries", |c| {
            bitmaps(c, 1365, 1365 * 32);
            for number in 0..1365 {
                let at = ELSEWHERE + 32 * number;
                // Table offset and length, flags, type, granularity, name's length, extra data.
                c.be64(at, 1 << 25).be32(at + 8, u32::MAX).put(at + 16, &[1, 16, 0, 1]).put(at + 24, b"n");
            }
        }),
    ]);
    all
}

fn refcounts_and_snapshots(directory: &Path) -> Vec<PathBuf> {
    vec![
        edited(directory, "refcount-table-of-4-gi-clusters", |c| {
            c.be32(56, u32::MAX);
        }),
        edited(directory, "refcount-table-that-is-its-own-block", |c| {
            (0..8192).for_each(|i| {
                c.be64(REFTABLE + 8 * i, REFTABLE);
            });
        }),
        edited(directory, "refcount-table-of-8-mib-that-is-one-block", |c| {
            c.be32(56, 128);
            let entries: Vec<u8> = (0..1 << 20).flat_map(|_| (1u64 << 25).to_be_bytes()).collect();
            c.put(REFTABLE, &entries).put(1 << 25, &[0xff; 65_536]);
        }),
        edited(directory, "refcounts-beyond-the-end", |c| {
            (0..8192u64).for_each(|i| {
                c.be64(REFTABLE + 8 * i, ((1 << 62) - (i << 16)) & !0xffff);
            });
        }),
        edited(directory, "4-gi-snapshots", |c| {
            c.be32(60, u32::MAX).be64(64, ELSEWHERE);
        }),
        edited(directory, "snapshots-in-a-hole", |c| {
            c.be32(60, 65_536).be64(64, ELSEWHERE);
        }),
        edited(directory, "a-snapshot-of-4-gib", |c| {
            c.be32(60, 1).be64(64, ELSEWHERE).be64(ELSEWHERE, L1).be32(ELSEWHERE + 8, u32::MAX);
            c.put(ELSEWHERE + 12, &[0xff; 4]).be32(ELSEWHERE + 36, u32::MAX);
        }),
        edited(directory, "snapshots-that-share-an-l1-of-32-mib", |c| {
            // An entry: 40 bytes, 24 of extra data, an id and a name of one byte each; 72 bytes with padding.
            c.be32(60, 65_536).be64(64, ELSEWHERE);
            let mut table = Vec::new();
            for number in 0..65_536u32 {
                table.extend((1u64 << 25).to_be_bytes());
                table.extend((4u32 << 20).to_be_bytes());
                table.extend([0, 1, 0, 1]);
                table.extend([0; 20]);
                table.extend(24u32.to_be_bytes());
                table.extend([0; 8]);
                table.extend((1u64 << 30).to_be_bytes());
                table.extend([0; 8]);
                table.extend([b'1' + (number % 9) as u8, b'n', 0, 0, 0, 0, 0, 0]);
            }
            c.put(ELSEWHERE, &table);
            c.file.set_len(1 << 27).unwrap();
        }),
        edited(directory, "65536-snapshots-one-with-a-name-of-64-kib", |c| {
            c.be32(60, 65_536).be64(64, ELSEWHERE);
            let mut table = Vec::new();
            for number in 0..65_536u32 {
                let name = if number == 0 { vec![0x1b; 65_535] } else { vec![b'n'] };
                table.extend(L1.to_be_bytes());
                table.extend(2u32.to_be_bytes());
                table.extend([0, 1]);
                table.extend((name.len() as u16).to_be_bytes());
                table.extend([0; 20]);
                table.extend(16u32.to_be_bytes());
                table.extend([0; 8]);
                table.extend((1u64 << 30).to_be_bytes());
                table.push(b'1');
                table.extend(name);
                table.resize(table.len().next_multiple_of(8), 0);
            }
            c.put(ELSEWHERE, &table);
        }),
        edited(directory, "a-snapshot-whose-l1-is-a-table-of-itself", |c| {
            c.be32(60, 1).be64(64, ELSEWHERE).be64(ELSEWHERE, L1).be32(ELSEWHERE + 8, 2);
            c.put(ELSEWHERE + 12, &[0, 1, 0, 1]).be32(ELSEWHERE + 36, 24);
            c.be64(ELSEWHERE + 48, 1 << 30).put(ELSEWHERE + 64, b"1n");
            c.be64(L1, L1).be64(L1 + 8, L1);
        }),
    ]
}

#[test]
fn hostile_qcow2_headers_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("qcow2-headers", dir.path(), &headers(dir.path()));
}

#[test]
fn hostile_refcounts_and_snapshots_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("qcow2-refcounts-and-snapshots", dir.path(), &refcounts_and_snapshots(dir.path()));
}

/// Writes a bitmaps extension with `number` bitmaps whose tables have `entries` entries at `table`.
fn listed_bitmaps(craft: &Craft, number: u32, table: u64, entries: u32) {
    bitmaps(craft, number, 32 * u64::from(number));
    for index in 0..u64::from(number) {
        let at = ELSEWHERE + 32 * index;
        // Granularity 512: a disk of 1 GiB has 256 KiB of bits, in four clusters.
        craft
            .be64(at, table)
            .be32(at + 8, entries)
            .put(at + 16, &[1, 9, 0, 8])
            .put(at + 24, format!("{index:08}").as_bytes());
    }
}

#[test]
fn copies_of_hostile_bitmaps_stay_within_limits() {
    require!("prlimit");
    const TABLE: u64 = 1 << 25;
    let dir = tempdir();
    let all_at = |craft: &Craft, offset: u64| {
        (0..4).for_each(|entry| {
            craft.be64(TABLE + 8 * entry, offset);
        });
    };
    for (name, words, change) in [
        (
            "too-many-bits",
            "the limit is 4294967296",
            &(|c: &Craft| listed_bitmaps(c, 65_535, TABLE, 4)) as &dyn Fn(&Craft),
        ),
        ("wrong-table", "needs 4", &|c| listed_bitmaps(c, 1, TABLE, 5)),
        ("table-in-no-cluster", "not aligned", &|c| listed_bitmaps(c, 1, TABLE + 8, 4)),
        ("table-past-the-end", "exceeds the file", &|c| listed_bitmaps(c, 1, 1 << 40, 4)),
        ("bits-in-no-cluster", "not aligned", &|c| {
            listed_bitmaps(c, 1, TABLE, 4);
            all_at(c, ELSEWHERE + 512);
        }),
        ("bits-past-the-end", "bits-past-the-end", &|c| {
            listed_bitmaps(c, 1, TABLE, 4);
            all_at(c, 1 << 40);
        }),
        ("no-directory", "bitmap", &|c| bitmaps(c, u32::MAX, u64::MAX)),
        // Bits that overlap the header of their own image are bits like any others.
        ("bits-in-the-header", "", &|c| {
            listed_bitmaps(c, 100, TABLE, 4);
            all_at(c, 1 << 16);
        }),
    ] {
        let path = edited(dir.path(), name, change);
        let file = path.file_name().unwrap().to_str().unwrap();
        let outcome = run(dir.path(), &["convert", "--bitmaps", "-O", "qcow2", file, "out"]);
        outcome.exits(i32::from(!words.is_empty())).says(words);
    }
}
