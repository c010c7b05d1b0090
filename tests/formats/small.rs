//! Formats that no program at hand makes from a disk: built byte by byte, and converted to every format.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{occupied, oracles, require, tempdir, text};

use super::matrix::ask_oracles;
use super::read_only::dmg;
use crate::support::imgtool;

/// Size of an extent of the Bochs images in bytes: 20 sectors.
const EXTENT: usize = 20 * 512;

/// Returns a growing Bochs image of version 2. Extents of zeros are left out, and bits of sectors of zeros clear.
fn bochs(disk: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 512];
    for (at, word) in [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing")] {
        image[at..at + word.len()].copy_from_slice(word.as_bytes());
    }
    let extents: Vec<&[u8]> = disk.chunks(EXTENT).collect();
    let numbers = [(64, 2 << 16), (68, 512), (72, extents.len()), (76, 3), (80, EXTENT), (88, disk.len())];
    for (at, value) in numbers {
        image[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }
    let (mut catalog, mut data, mut stored) = (Vec::new(), Vec::new(), 0_u32);
    for extent in extents {
        let bits = extent.chunks(512).enumerate().fold(0_u32, |bits, (index, sector)| {
            bits | u32::from(sector.iter().any(|byte| *byte != 0)) << index
        });
        if bits == 0 {
            catalog.extend([0xff; 4]);
            continue;
        }
        catalog.extend(stored.to_le_bytes());
        stored += 1;
        let start = data.len();
        data.extend(bits.to_le_bytes());
        data.resize(start + 512, 0);
        data.extend(extent);
        data.resize(start + 512 + EXTENT, 0);
    }
    [image, catalog, data].concat()
}

/// Returns a cloop image, whose blocks are zlib streams without compression.
fn cloop(disk: &[u8]) -> Vec<u8> {
    let block = if disk.len().is_multiple_of(4096) { 4096 } else { 512 };
    let mut image = b"#!/bin/sh\n#V2.0 Format\n".to_vec();
    image.resize(128, 0);
    let blocks = disk.len() / block;
    image.extend([block as u32, blocks as u32].map(u32::to_be_bytes).concat());
    let (mut data, start) = (Vec::new(), image.len() + 8 * (blocks + 1));
    for content in disk.chunks(block) {
        image.extend(((start + data.len()) as u64).to_be_bytes());
        let len = block as u16;
        data.extend([&[0x78, 1, 1][..], &len.to_le_bytes(), &(!len).to_le_bytes(), content].concat());
        data.extend(adler32(content).to_be_bytes());
    }
    image.extend(((start + data.len()) as u64).to_be_bytes());
    [image, data].concat()
}

fn adler32(bytes: &[u8]) -> u32 {
    let (low, high) = bytes.iter().fold((1_u32, 0_u32), |(low, high), byte| {
        let low = (low + u32::from(*byte)) % 65_521;
        (low, (high + low) % 65_521)
    });
    high << 16 | low
}

/// Converts images of a format to every other format. The sizes are whole sectors, as these formats need them.
fn convert_to_all(format: &str, build: fn(&[u8]) -> Vec<u8>) {
    let names = ["every-mask", "prose-and-holes", "last-sector-of-odd-cluster", "sectors-not-blocks"];
    let dir = tempdir();
    let mut sources: Vec<(PathBuf, PathBuf)> = Vec::new();
    for image in images::all().into_iter().filter(|image| names.contains(&image.name)) {
        let raw = dir.path().join(format!("{}.raw", image.name));
        image.write_raw(&raw);
        let source = dir.path().join(format!("{}.{format}", image.name));
        std::fs::write(&source, build(&std::fs::read(&raw).unwrap())).unwrap();
        sources.push((raw, source));
    }
    assert_eq!(sources.len(), names.len());
    for to in ["raw", "qcow2", "vhdx", "vhd", "vdi", "vmdk", "vma"] {
        let mut outputs = Vec::new();
        for (raw, source) in &sources {
            let output = source.with_extension(format!("out.{to}"));
            imgtool(["convert", text(source), "--to", to, text(&output)]).ok();
            imgtool(["compare", "-f", "raw", "-F", to, text(raw), text(&output)]).ok();
            outputs.push((raw.clone(), output));
        }
        ask_oracles(to, &outputs);
    }
}

#[test]
fn bochs_to_every_format() {
    convert_to_all("bochs", bochs);
}

#[test]
fn cloop_to_every_format() {
    convert_to_all("cloop", cloop);
}

#[test]
fn dmg_to_every_format() {
    require!("bzip2");
    convert_to_all("dmg", dmg);
}

/// Asserts that an image of a format has the content of `disk`, by a conversion that keeps it sparse.
fn assert_large(directory: &Path, format: &str, disk: &Image) {
    let path = |name: &str| directory.join(name);
    disk.write_raw(&path("disk.raw"));
    let (image, raw) = (path(&format!("disk.{format}")), path("back.raw"));
    let run = imgtool(["convert", "-f", format, text(&image), text(&raw)]).measured().ok();
    assert!(run.peak_memory < 256 << 20, "{} bytes", run.peak_memory);
    assert!(occupied(&raw) < 4 << 20, "{} bytes are occupied", occupied(&raw));
    imgtool(["compare", "-f", "raw", "-F", "raw", text(&raw), text(&path("disk.raw"))]).ok();
    imgtool(["check", "-f", format, text(&image)]).ok();
}

/// Creates a file of `len` bytes, a hole with `parts` at their offsets.
fn sparse_file(path: &Path, len: u64, parts: &[(u64, &[u8])]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    for (offset, bytes) in parts {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

#[test]
fn reads_bochs_beyond_2_tib_with_extents_beyond_4_gib() {
    let dir = tempdir();
    let extent = 2_u64 << 20;
    let entries = (1 << 20) + 3;
    let size = entries * extent - 512;
    let content = images::noise(1, 512);
    let mut head = vec![0; 512];
    for (at, word) in [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing")] {
        head[at..at + word.len()].copy_from_slice(word.as_bytes());
    }
    for (at, value) in [(64, 2 << 16), (68, 512), (72, entries as u32), (76, 512), (80, extent as u32)] {
        head[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    head[88..96].copy_from_slice(&size.to_le_bytes());
    let mut catalog = vec![0xff; 4 * entries as usize];
    catalog[..4].fill(0);
    let last = catalog.len() - 4;
    catalog[last..].copy_from_slice(&4000_u32.to_le_bytes());
    let at = |position: u64| 512 + 4 * entries + position * (512 + extent);
    let parts: [(u64, &[u8]); 6] = [
        (0, &head),
        (512, &catalog),
        // A bit of the bitmap, and its sector: the fourth of the disk, and the last.
        (at(0), &[8]),
        (at(0) + 512 + 3 * 512, &content),
        (at(4000) + 511, &[0x40]),
        (at(4000) + 512 + extent - 1024, &content),
    ];
    sparse_file(&dir.path().join("disk.bochs"), at(4001), &parts);
    let disk = Image::hole("disk", size).with(1536, content.clone()).with(size - 512, content.clone());
    assert_large(dir.path(), "bochs", &disk);
}

#[test]
fn reads_cloop_beyond_4_gib() {
    require!("gzip");
    let dir = tempdir();
    let (block, blocks) = (1_usize << 20, 4099_usize);
    let zlib = |content: &[u8]| {
        let packed = oracles::filter("gzip", &["-nc"], content);
        let deflated = &packed[10..packed.len() - 8];
        [&[0x78, 0x9c], deflated, &adler32(content).to_be_bytes()].concat()
    };
    let zeros = zlib(&vec![0; block]);
    let content = images::noise(1, block);
    let mut image = b"#!/bin/sh\n#V2.0 Format\n".to_vec();
    image.resize(128, 0);
    image.extend([block as u32, blocks as u32].map(u32::to_be_bytes).concat());
    let start = image.len() + 8 * (blocks + 1);
    let offsets = (0..blocks).map(|index| start + index * zeros.len());
    let noise = zlib(&content);
    let last = start + (blocks - 1) * zeros.len();
    image.extend(offsets.chain([last + noise.len()]).flat_map(|offset| (offset as u64).to_be_bytes()));
    image.extend(zeros.repeat(blocks - 1));
    image.extend(noise);
    std::fs::write(dir.path().join("disk.cloop"), image).unwrap();
    let size = (block * blocks) as u64;
    assert_large(dir.path(), "cloop", &Image::hole("disk", size).with(size - block as u64, content));
}

#[test]
fn reads_dmg_beyond_2_tib_with_chunks_beyond_4_gib() {
    let dir = tempdir();
    let (sectors, far) = ((2_u64 << 31) + 77, 5_u64 << 30);
    let content = images::noise(1, 1024);
    let mut table = vec![0; 204];
    table[..8].copy_from_slice(b"mish\0\0\0\x01");
    table[16..24].copy_from_slice(&sectors.to_be_bytes());
    table[200..204].copy_from_slice(&3_u32.to_be_bytes());
    // Stored bytes, zeros, stored bytes.
    for (kind, numbers) in
        [(1_u32, [0, 2, 0, 1024]), (0, [2, sectors - 4, 0, 0]), (1, [sectors - 2, 2, far, 1024])]
    {
        table.extend([kind, 0].map(u32::to_be_bytes).concat());
        table.extend(numbers.map(u64::to_be_bytes).concat());
    }
    let len = table.len() as u32;
    let fork = [[16, 16 + 4 + len, 4 + len, 0, len].map(u32::to_be_bytes).concat(), table].concat();
    let mut trailer = vec![0; 512];
    trailer[..12].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
    trailer[40..48].copy_from_slice(&(far + 1024).to_be_bytes());
    trailer[48..56].copy_from_slice(&(fork.len() as u64).to_be_bytes());
    trailer[492..500].copy_from_slice(&sectors.to_be_bytes());
    let end = far + 1024 + fork.len() as u64;
    let parts: [(u64, &[u8]); 4] = [(0, &content), (far, &content), (far + 1024, &fork), (end, &trailer)];
    sparse_file(&dir.path().join("disk.dmg"), end + 512, &parts);
    let disk = Image::hole("disk", sectors * 512).with(0, content.clone());
    assert_large(dir.path(), "dmg", &disk.with(sectors * 512 - 1024, content));
}

/// Every chunk decodes, but the table has another checksum: no command may take the content for sound.
#[test]
fn a_dmg_with_a_wrong_checksum_is_no_source() {
    require!("bzip2");
    let dir = tempdir();
    let disk = images::noise(3, 64 << 10);
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("disk.raw"), &disk).unwrap();
    let mut image = dmg(&disk);
    let table = image.windows(4).position(|bytes| bytes == b"mish").unwrap();
    image[table + 64..table + 76].copy_from_slice(b"\0\0\0\x02\0\0\0\x20none");
    let bad = path("bad.dmg");
    std::fs::write(&bad, &image).unwrap();
    imgtool(["check", text(&bad)]).go().exits(2);
    imgtool(["convert", text(&bad), text(&path("out.qcow2"))]).go().exits(1).says("checksum");
    imgtool(["convert", "--join", text(&bad), text(&bad), text(&path("out.raw"))])
        .go()
        .exits(1)
        .says("checksum");
    imgtool(["checksum", text(&bad)]).go().exits(1).says("checksum");
    imgtool(["convert", "-q", text(&bad), "--salvage", text(&path("out.raw"))]).go().ends_with(3);
    imgtool(["compare", text(&path("out.raw")), text(&bad)]).go().exits(2).says("checksum");
    imgtool(["compare", text(&bad), text(&path("out.raw"))]).go().exits(2).says("checksum");
}
