//! Malicious VMA archives.

use std::fs::File;
use std::path::{Path, PathBuf};

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{require, tempdir, text};
use md5::{Digest, Md5};

use super::all_end;
use crate::support::imgtool;

/// Corrects the checksum of an archive's header.
fn seal_vma(bytes: &mut [u8]) {
    let header_size = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
    bytes[32..48].fill(0);
    let digest = Md5::digest(&bytes[..header_size.min(bytes.len())]);
    bytes[32..48].copy_from_slice(&digest);
}

/// Creates the archives and returns their paths.
fn vma_images(directory: &Path) -> Vec<PathBuf> {
    let good = Archive::of([("drive-scsi0", Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536)))])
        .config("qemu-server.conf", b"cores: 1\n")
        .build();
    let mut all = Vec::new();
    let mut edit = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.bytes.clone();
        change(&mut bytes);
        let path = directory.join(format!("{name}.vma"));
        std::fs::write(&path, bytes).unwrap();
        all.push(path);
    };
    let put32 =
        |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let device = |bytes: &mut Vec<u8>, id: usize, size: u64| {
        let name: [u8; 4] = bytes[4096 + 32..][..4].try_into().unwrap();
        bytes[4096 + 32 * id..][..4].copy_from_slice(&name);
        bytes[4096 + 32 * id + 8..][..8].copy_from_slice(&size.to_be_bytes());
    };
    edit("a-device-of-16-eib", &|b| {
        device(b, 1, u64::MAX);
        seal_vma(b);
    });
    edit("254-devices-of-256-tib", &|b| {
        (1..255).for_each(|id| device(b, id, 1 << 48));
        seal_vma(b);
    });
    edit("254-devices-of-8-eib", &|b| {
        (1..255).for_each(|id| device(b, id, 1 << 63));
        seal_vma(b);
    });
    edit("header-of-4-gib", &|b| put32(b, 56, 0xffff_fe00));
    edit("header-of-2-gib-in-a-hole", &|b| put32(b, 56, 0x7fff_fe00));
    edit("blobs-of-4-gib", &|b| {
        put32(b, 52, u32::MAX);
        seal_vma(b);
    });
    edit("blobs-that-overlap-everything", &|b| {
        (0..256).for_each(|i| {
            let (name, data): ([u8; 4], [u8; 4]) =
                (b[2044..2048].try_into().unwrap(), b[3068..3072].try_into().unwrap());
            b[2044 + 4 * i..][..4].copy_from_slice(&name);
            b[3068 + 4 * i..][..4].copy_from_slice(&data);
        });
        seal_vma(b);
    });
    edit("names-that-point-outside", &|b| {
        put32(b, 4096 + 32, u32::MAX);
        seal_vma(b);
    });
    // Extents without a cluster, one after the other.
    edit("extents-of-nothing", &|b| {
        let extent = {
            let at = good.extents[0];
            let mut header = b[at..at + 512].to_vec();
            header[6..8].fill(0);
            header[40..].fill(0);
            header[24..40].fill(0);
            let digest = Md5::digest(&header);
            header[24..40].copy_from_slice(&digest);
            header
        };
        b.truncate(good.extents[0]);
        (0..20_000).for_each(|_| b.extend(&extent));
    });
    // Changes an extent header and corrects its checksum.
    let extent = |b: &mut Vec<u8>, change: &dyn Fn(&mut [u8])| {
        let at = good.extents[0];
        change(&mut b[at..at + 512]);
        b[at + 24..at + 40].fill(0);
        let digest = Md5::digest(&b[at..at + 512]);
        b[at + 24..at + 40].copy_from_slice(&digest);
    };
    // Each of the 59 block infos: mask (2 bytes), 0, device id, cluster number.
    edit("clusters-of-2-to-the-48", &|b| {
        extent(b, &|header| header[40..].chunks_exact_mut(8).for_each(|info| info[4..].fill(0xff)));
    });
    edit("masks-past-the-end", &|b| {
        extent(b, &|header| header[40..].chunks_exact_mut(8).for_each(|info| info[..2].fill(0xff)));
    });
    edit("clusters-of-devices-that-are-not-there", &|b| {
        extent(b, &|header| header[40..].chunks_exact_mut(8).for_each(|info| info[3] = 200));
    });
    edit("one-cluster-59-times", &|b| {
        extent(b, &|header| header[40..].chunks_exact_mut(8).for_each(|info| info.fill(0)));
        extent(b, &|header| header[40..].chunks_exact_mut(8).for_each(|info| info[3] = 1));
    });
    edit("more-blocks-than-an-extent-has", &|b| {
        extent(b, &|header| header[6..8].fill(0xff));
    });
    edit("a-name-that-paints-the-terminal", &|b| {
        // The blob of the first device's name: its length, then the name.
        let at = b.windows(11).position(|window| window == b"drive-scsi0").unwrap();
        b[at..at + 11].copy_from_slice(b"\x1b[2J\x1b]0;mi\x07");
        seal_vma(b);
    });
    edit("510-names-that-are-one-blob-of-64-kib", &|b| {
        let blobs = {
            let mut blobs = vec![0, 0xff, 0xff];
            blobs.extend([0x1b; 65_534]);
            blobs.push(0);
            blobs
        };
        let header_size = (12_288 + blobs.len()).next_multiple_of(512);
        b.truncate(12_288);
        b.extend(&blobs);
        b.resize(header_size, 0);
        put32(b, 52, blobs.len() as u32);
        put32(b, 56, header_size as u32);
        (0..256).for_each(|index| put32(b, 2044 + 4 * index, 1));
        (0..256).for_each(|index| put32(b, 3068 + 4 * index, 1));
        (1..255).for_each(|id| {
            put32(b, 4096 + 32 * id, 1);
            b[4096 + 32 * id + 8..][..8].copy_from_slice(&(1u64 << 16).to_be_bytes());
        });
        seal_vma(b);
        let uuid = b[8..24].to_vec();
        for first in (1..255u8).step_by(59) {
            // A zero cluster of each device.
            let mut header = [0; 512];
            header[..4].copy_from_slice(b"VMAE");
            header[8..24].copy_from_slice(&uuid);
            for (slot, id) in (first..255).take(59).enumerate() {
                header[40 + 8 * slot + 3] = id;
            }
            let digest = Md5::digest(header);
            header[24..40].copy_from_slice(&digest);
            b.extend(header);
        }
    });
    // A zero cluster in each 4 GiB of many devices: each takes 8 bytes here, and some memory in the reader.
    edit("clusters-scattered-over-5-pib", &|b| {
        (1..=20).for_each(|id| device(b, id, 1 << 48));
        seal_vma(b);
        let at = good.extents[0];
        let mut header = b[at..at + 512].to_vec();
        header[6..8].fill(0);
        b.truncate(at);
        let places: Vec<[u8; 8]> = (1..=20u8)
            .flat_map(|id| (0..1u32 << 16).map(move |part| (id, part << 16)))
            .map(|(id, cluster)| {
                let [a, b, c, d] = cluster.to_be_bytes();
                [0, 0, 0, id, a, b, c, d]
            })
            .collect();
        for slots in places.chunks(59) {
            header[40..].fill(0);
            header[40..40 + 8 * slots.len()].copy_from_slice(slots.as_flattened());
            header[24..40].fill(0);
            let digest = Md5::digest(&header);
            header[24..40].copy_from_slice(&digest);
            b.extend(&header);
        }
    });
    let hole = &all[all.iter().position(|path| text(path).contains("in-a-hole")).unwrap()];
    File::options().write(true).open(hole).unwrap().set_len(3 << 30).unwrap();
    all
}

/// Bytes that look like the start of an extent header everywhere. They took half a minute.
#[test]
fn apparent_extent_headers_take_little_time() {
    require!("prlimit");
    let dir = tempdir();
    let good = Archive::of([("drive-scsi0", Image::hole("x", 1 << 20))]).build();
    let start = [b"VMAE\0\0\0\0", &good.bytes[8..24]].concat();
    for pattern in [b"VMAE".as_slice(), &start] {
        let mut bytes = good.bytes[..good.extents[0]].to_vec();
        bytes.extend(pattern.repeat((128 << 20) / pattern.len()));
        std::fs::write(dir.path().join("noise.vma"), bytes).unwrap();
        for line in ["check noise.vma", "convert -q --salvage --force noise.vma --to raw out/"] {
            let run = imgtool(line.split(' ')).within(dir.path()).cpu_limit(3).go();
            assert!(matches!(run.status.code(), Some(2 | 3)), "{line}: {:?}\n{}", run.status, run.stderr);
        }
    }
}

#[test]
fn hostile_vma_archives_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_end("vma-archives", dir.path(), &vma_images(dir.path()));
}
