//! Damaged frames of a seekable zstd file: no command reads content from a frame whose checksum is wrong, not
//! even a few bytes at its start.

use std::path::Path;

use imgtool_testing::images::Image;
use imgtool_testing::{oracles, require, tempdir, text};

use crate::support::imgtool;

/// Guest offset of the only data cluster of the disk.
const DATA: u64 = 3 * 512;

/// Returns bytes that zstd stores as they are.
fn incompressible(seed: u64, len: usize) -> Vec<u8> {
    let mut seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

/// Host offsets of the L2 table and of the data cluster: beyond the first 4 KiB, which every command reads.
const TABLE: usize = 64 << 10;
const CLUSTER: usize = 128 << 10;

/// Returns a qcow2 image with clusters of 512 bytes, so that each is read separately, and with a megabyte
/// of noise at its end. Writes its disk to `disk.raw`.
fn small_clusters(directory: &Path) -> Vec<u8> {
    let raw = directory.join("disk.raw");
    Image::hole("x", 64 << 10).with(DATA, incompressible(1, 512)).write_raw(&raw);
    let image = directory.join("disk.qcow2");
    let line = ["convert", text(&raw), "--to", "qcow2", "-o", "cluster_size=512", text(&image)];
    imgtool(line).ok();
    let mut bytes = std::fs::read(image).unwrap();
    bytes.resize(CLUSTER, 0);
    bytes.extend(incompressible(2, 1 << 20));
    // The header contains the offset of the L1 table, the L1 table that of the L2 table.
    let l1_table = host_offset(&bytes, 40);
    move_cluster(&mut bytes, l1_table, TABLE);
    move_cluster(&mut bytes, TABLE + 8 * 3, CLUSTER);
    bytes
}

/// Returns the offset in the entry at `at`: bits 9 to 55.
fn host_offset(image: &[u8], at: usize) -> usize {
    let entry = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Moves the cluster that the entry at `at` points to.
fn move_cluster(image: &mut [u8], at: usize, to: usize) {
    let from = host_offset(image, at);
    image.copy_within(from..from + 512, to);
    // Bit 63: the cluster has a refcount of one.
    image[at..at + 8].copy_from_slice(&(to as u64 | 1 << 63).to_be_bytes());
}

/// Compresses bytes as two frames, split at `border`, and a seek table without checksums, since the
/// frames have their own. If `flipped` is given, a byte of the second frame is changed there.
fn two_frames(plain: &[u8], border: usize, flipped: Option<&[u8]>) -> Vec<u8> {
    let (mut file, mut entries) = (Vec::new(), Vec::new());
    for part in [&plain[..border], &plain[border..]] {
        let mut frame = oracles::filter("zstd", &["-q", "-c", "--check", "--single-thread"], part);
        if let Some(pattern) = flipped.filter(|_| !file.is_empty()) {
            // Such bytes are stored as they are.
            let at = frame.windows(pattern.len()).position(|window| window == pattern).unwrap();
            frame[at] ^= 0x10;
        }
        entries.extend((frame.len() as u32).to_le_bytes());
        entries.extend((part.len() as u32).to_le_bytes());
        file.extend(frame);
    }
    file.extend(0x184d_2a5e_u32.to_le_bytes());
    file.extend((entries.len() as u32 + 9).to_le_bytes());
    file.extend(entries);
    file.extend(2u32.to_le_bytes());
    file.push(0);
    file.extend(0x8f92_eab1_u32.to_le_bytes());
    file
}

#[test]
fn no_command_reads_a_cluster_from_a_damaged_frame() {
    require!("zstd");
    let dir = tempdir();
    let plain = small_clusters(dir.path());
    let cluster = plain[CLUSTER..CLUSTER + 32].to_vec();
    let noise = plain[plain.len() - (512 << 10)..][..32].to_vec();
    // The damage is in the cluster itself, or in a part of the frame that no read asks for.
    for (border, flipped) in [(CLUSTER, &cluster), (CLUSTER, &noise), (TABLE, &noise)] {
        std::fs::write(dir.path().join("good.qcow2.zst"), two_frames(&plain, border, None)).unwrap();
        std::fs::write(dir.path().join("bad.qcow2.zst"), two_frames(&plain, border, Some(flipped))).unwrap();
        let mut lines = vec![
            ("convert --to raw NAME out", 1),
            ("convert --verify --to raw NAME out", 1),
            ("convert --to raw NAME -", 1),
            ("checksum NAME", 1),
            ("compare NAME disk.raw", 2),
            ("compare disk.raw NAME", 2),
        ];
        if border == TABLE {
            lines.extend([("map NAME", 1), ("measure --to raw NAME", 1)]);
        }
        for (line, code) in lines {
            let run = |name: &str| imgtool(line.replace("NAME", name).split(' ')).within(dir.path()).go();
            run("good.qcow2.zst").exits(0);
            let _ = std::fs::remove_file(dir.path().join("out"));
            run("bad.qcow2.zst").exits(code).says("zstd frame 1");
        }
        // Salvage lists the loss.
        let line = ["convert", "--salvage", "bad.qcow2.zst", "--to", "raw", "out"];
        imgtool(line).within(dir.path()).go().exits(3).says("zstd frame 1");
        std::fs::remove_file(dir.path().join("out")).unwrap();
    }
}
