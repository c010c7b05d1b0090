//! Malicious qcow2 images: L1 and L2 tables, and compressed clusters.

use std::path::{Path, PathBuf};

use imgtool_testing::{images, require, tempdir};

use super::{Craft, all_end, qcow2};
use crate::support::imgtool;

const L1: u64 = 1 << 21;
const L2: u64 = 1 << 23;
const DATA: u64 = 1 << 25;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const TIB: u64 = 1 << 40;

/// Creates an image of a disk of `size` bytes with `l1_size` L1 entries, and applies `change` to it.
fn image(
    directory: &Path,
    name: &str,
    (cluster_bits, size, l1_size): (u32, u64, u32),
    change: impl Fn(&Craft),
) -> PathBuf {
    let craft = qcow2(directory, &format!("{name}.qcow2"), 64 << 20, cluster_bits, size, l1_size);
    change(&craft);
    craft.path
}

/// A disk of 64 MiB in clusters of 4 KiB: 32 L2 tables.
const USUAL: (u32, u64, u32) = (12, 64 << 20, 32);
/// A disk of 256 MiB in clusters of 2 MiB: one L2 table.
const LARGE_CLUSTERS: (u32, u64, u32) = (21, 1 << 28, 1);

/// Writes the same entry `count` times, from file offset `at` on.
fn fill(craft: &Craft, at: u64, count: u64, entry: u64) {
    let bytes: Vec<u8> = (0..count).flat_map(|_| entry.to_be_bytes()).collect();
    craft.put(at, &bytes);
}

fn tables(directory: &Path) -> Vec<PathBuf> {
    let nothing = |_: &Craft| ();
    vec![
        image(directory, "l1-of-4-gi-entries", (16, 1 << 62, u32::MAX), nothing),
        image(directory, "l1-of-32-mib-in-a-hole", (16, 64 * TIB, 4 << 20), |c| c.file.set_len(TIB).unwrap()),
        image(directory, "l1-for-64-tib", (16, 64 * TIB, 131_072), nothing),
        image(directory, "l1-at-the-end-of-the-world", (9, 64 * TIB, 4 << 20), nothing),
        image(directory, "l2-that-is-itself", USUAL, |c| {
            fill(c, L1, 32, L2 | COPIED);
            fill(c, L2, 512, L2 | COPIED);
        }),
        image(directory, "l2-that-is-the-l1", USUAL, |c| fill(c, L1, 32, L1 | COPIED)),
        image(directory, "l2-that-is-the-header", USUAL, |c| fill(c, L1, 32, 1 << 16)),
        image(directory, "l2-tables-that-point-at-each-other", USUAL, |c| {
            (0..32).for_each(|i| {
                c.be64(L1 + 8 * i, (L2 + 4096 * (i % 2)) | COPIED);
            });
            fill(c, L2, 512, (L2 + 4096) | COPIED);
            fill(c, L2 + 4096, 512, L2 | COPIED);
        }),
        image(directory, "l2-beyond-the-end", USUAL, |c| {
            c.be64(L1, (1 << 55) | COPIED);
        }),
        image(directory, "clusters-beyond-the-end", USUAL, |c| {
            c.be64(L1, L2 | COPIED).be64(L2, 0x00ff_ffff_ffff_0000 | COPIED);
        }),
        image(directory, "one-l2-table-for-1-tib-in-a-hole", (21, TIB, 2), |c| {
            fill(c, L1, 2, L2 | COPIED);
            (0..262_144).step_by(4096).for_each(|i| {
                c.be64(L2 + 8 * i, (1 << 24) | COPIED);
            });
        }),
        // 2 PiB described by one table of 64 KiB: unallocated clusters, then zero clusters, then both in
        // turn.
        image(directory, "one-empty-l2-table-for-2-pib", (16, 2048 * TIB, 4 << 20), |c| {
            c.file.set_len(1 << 27).unwrap();
            fill(c, L1, 4 << 20, 1 << 26);
            c.be64(48, 3 << 25);
        }),
        image(directory, "one-l2-table-of-zeros-for-2-pib", (16, 2048 * TIB, 4 << 20), |c| {
            c.file.set_len(1 << 27).unwrap();
            fill(c, L1, 4 << 20, 1 << 26);
            fill(c, 1 << 26, 8192, 1);
            c.be64(48, 3 << 25);
        }),
        image(directory, "one-l2-table-of-this-and-that-for-2-pib", (16, 2048 * TIB, 4 << 20), |c| {
            c.file.set_len(1 << 27).unwrap();
            fill(c, L1, 4 << 20, 1 << 26);
            (0..8192).step_by(2).for_each(|i| {
                c.be64((1 << 26) + 8 * i, 1);
            });
            c.be64(48, 3 << 25);
        }),
        image(directory, "one-cluster-for-all-of-a-disk", LARGE_CLUSTERS, |c| {
            c.be64(L1, L2 | COPIED).put(DATA, &images::noise(1, 2 << 20));
            fill(c, L2, 128, DATA | COPIED);
        }),
        image(directory, "extended-l2-of-contradictions", (16, 1 << 28, 1), |c| {
            // Incompatible feature bit 4. Each entry marks every subcluster both as allocated and as zero.
            c.be64(72, 16).be64(L1, L2 | COPIED);
            let entry = [(DATA | COPIED).to_be_bytes(), [0xff; 8]].concat();
            c.put(L2, &entry.repeat(4096));
        }),
    ]
}

/// Returns the L2 entry of a compressed cluster at file offset `at`, with `sectors` sectors after the first.
fn compressed(cluster_bits: u32, at: u64, sectors: u64) -> u64 {
    COMPRESSED | (sectors << (62 - (cluster_bits - 8))) | at
}

/// Returns a zstd frame without content size: a window descriptor, and one block that repeats a zero `len`
/// times.
fn zstd_frame(window: u8, len: u32) -> Vec<u8> {
    // The last block (bit 0), run-length encoded (bits 1 and 2).
    let header = 1 | 1 << 1 | len << 3;
    [&[0x28, 0xb5, 0x2f, 0xfd, 0, window], &header.to_le_bytes()[..3], &[0]].concat()
}

fn compressed_clusters(directory: &Path) -> Vec<PathBuf> {
    let zstd = |c: &Craft, frame: &[u8]| {
        // Incompatible feature bit 3, compression type 1.
        c.be64(72, 8).be32(100, 112).put(104, &[1]);
        c.be64(L1, L2 | COPIED).put(DATA, frame);
    };
    vec![
        image(directory, "compressed-beyond-everything", USUAL, |c| {
            c.be64(L1, L2 | COPIED);
            fill(c, L2, 512, u64::MAX);
        }),
        // Deflate: one final stored block of no bytes, so that the cluster is too short.
        image(directory, "compressed-clusters-of-nothing", LARGE_CLUSTERS, |c| {
            c.be64(L1, L2 | COPIED).put(DATA, &[1, 0, 0, 0xff, 0xff]);
            fill(c, L2, 128, compressed(21, DATA, 0x1fff));
        }),
        image(directory, "compressed-clusters-of-empty-blocks", LARGE_CLUSTERS, |c| {
            c.be64(L1, L2 | COPIED).put(DATA, &[0, 0, 0, 0xff, 0xff].repeat(400_000));
            fill(c, L2, 128, compressed(21, DATA, 0x1fff >> 1));
        }),
        // Each cluster asks for a window of 128 MiB, in every thread.
        image(directory, "zstd-clusters-with-windows-of-128-mib", (16, 1 << 27, 1), |c| {
            zstd(c, &zstd_frame(17 << 3, 65_536));
            fill(c, L2, 2048, compressed(16, DATA, 1));
        }),
        image(directory, "zstd-clusters-with-windows-of-2-tib", (16, 1 << 27, 1), |c| {
            zstd(c, &zstd_frame(31 << 3, 65_536));
            fill(c, L2, 2048, compressed(16, DATA, 1));
        }),
        image(directory, "zstd-clusters-that-go-on", (16, 1 << 27, 1), |c| {
            zstd(c, &zstd_frame(17 << 3, 1 << 17));
            fill(c, L2, 2048, compressed(16, DATA, 1));
        }),
        image(directory, "zstd-clusters-of-empty-frames", LARGE_CLUSTERS, |c| {
            zstd(c, &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0].repeat(200_000));
            fill(c, L2, 128, compressed(21, DATA, 0x1fff >> 1));
        }),
    ]
}

/// One table of alternating subclusters for a thousand L1 entries, so 400 KB describe 131 million extents. Every
/// look at them took seconds.
#[test]
fn tables_that_many_entries_share_take_little_time() {
    require!("prlimit");
    let dir = tempdir();
    image(dir.path(), "shared", (16, 1000 << 28, 1000), |c| {
        c.be64(72, 16);
        fill(c, L1, 1000, L2 | COPIED);
        let pair = [DATA | COPIED, 0xaaaa_aaaa_5555_5555].map(u64::to_be_bytes).concat();
        c.put(L2, &pair.repeat(4096));
    });
    for line in
        ["measure --to qcow2 shared.qcow2", "measure shared.qcow2", "map shared.qcow2", "check shared.qcow2"]
    {
        let run = imgtool(line.split(' ')).within(dir.path()).cpu_limit(3).go();
        assert!(matches!(run.status.code(), Some(1 | 2)), "{line}: {:?}\n{}", run.status, run.stderr);
    }
}

#[test]
fn hostile_qcow2_tables_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("qcow2-tables", dir.path(), &tables(dir.path()));
}

#[test]
fn hostile_compressed_clusters_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("qcow2-compressed-clusters", dir.path(), &compressed_clusters(dir.path()));
}
