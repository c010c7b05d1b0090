//! Formats that no program at hand makes from a disk: built byte by byte, and converted to every format.

use std::path::PathBuf;

use imgtool_testing::images;
use imgtool_testing::{require, tempdir, text};

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
