//! Malicious disks of the formats without a file of their own here: VHD, VDI, VMDK, LUKS, and the formats that are
//! only read. Most are files of gigabytes that take no space.

use std::path::{Path, PathBuf};

use imgtool_testing::{require, tempdir};

use super::{Craft, run};

const GIB: u64 = 1 << 30;

/// Returns `count` table entries of four bytes, made by `entry` from their numbers.
fn words(count: u32, entry: impl Fn(u32) -> [u8; 4]) -> Vec<u8> {
    (0..count).flat_map(entry).collect()
}

/// Returns `count` equal table entries of eight bytes.
fn longs(count: usize, entry: [u8; 8]) -> Vec<u8> {
    entry.repeat(count)
}

/// Seals a structure of a VHD with the complement of the sum of its bytes.
fn seal(mut bytes: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let sum = !bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    bytes[checksum_at..checksum_at + 4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Makes a VHD of `disk` bytes with `entries` at 2048, in a file of 8 GiB. `change` changes the dynamic header.
fn vhd(
    directory: &Path,
    name: &str,
    disk: u64,
    block: u32,
    entries: &[u8],
    change: impl Fn(&mut [u8]),
) -> PathBuf {
    let len = 8 * GIB;
    let craft = Craft::new(directory, name, len);
    let mut header = vec![0; 1024];
    header[..16].copy_from_slice(b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff");
    header[16..28].copy_from_slice(&[0, 0, 0, 0, 0, 0, 8, 0, 0, 1, 0, 0]);
    header[28..32].copy_from_slice(&u32::try_from(disk.div_ceil(block.into())).unwrap().to_be_bytes());
    header[32..36].copy_from_slice(&block.to_be_bytes());
    change(&mut header);
    let is_child = header[40] != 0;
    let mut footer = vec![0; 512];
    footer[..24].copy_from_slice(b"conectix\0\0\0\x02\0\x01\0\0\0\0\0\0\0\0\x02\0");
    footer[48..56].copy_from_slice(&disk.to_be_bytes());
    footer[63] = if is_child { 4 } else { 3 };
    footer[68] = 1;
    let footer = seal(footer, 64);
    craft.put(0, &footer).put(512, &seal(header, 36)).put(2048, entries).put(len - 512, &footer);
    craft.path
}

/// Big-endian entry of a table: sectors.
fn sector(at: u64) -> [u8; 4] {
    u32::try_from(at / 512).unwrap().to_be_bytes()
}

fn vhds(directory: &Path) -> Vec<PathBuf> {
    let same = words(1 << 16, |_| sector(GIB));
    let apart = words(4095, |index| sector(GIB + u64::from(index) * ((1 << 20) + 512)));
    let locators = |header: &mut [u8]| {
        header[40] = 1;
        for locator in header[576..768].chunks_exact_mut(24) {
            locator[..4].copy_from_slice(b"W2ru");
            locator[4..12].copy_from_slice(&[0, 0, 128, 0, 0, 1, 0, 0]);
            locator[16..].copy_from_slice(&(2 * GIB).to_be_bytes());
        }
    };
    vec![
        vhd(directory, "entries-of-one-block.vhd", 32 * GIB, 512 << 10, &same, |_| ()),
        vhd(directory, "blocks-of-a-sector.vhd", 32 << 20, 512, &same, |_| ()),
        vhd(directory, "blocks-in-a-hole.vhd", 4095 << 20, 1 << 20, &apart, |_| ()),
        vhd(directory, "blocks-of-4-gib.vhd", 64 * GIB, 1 << 31, &same[..4096], |_| ()),
        vhd(directory, "locators-of-64-kib.vhd", GIB, 1 << 20, &same[..4096], locators),
        vhd(directory, "table-beyond-the-end.vhd", GIB, 1 << 20, &[], |header| {
            header[16..24].copy_from_slice(&(8 * GIB).to_be_bytes());
        }),
    ]
}

/// Makes a VDI whose map of `blocks` entries is at 4096, in a file of `len` bytes.
fn vdi(directory: &Path, name: &str, len: u64, blocks: u32, block: u32, map: &[u8]) -> Craft {
    let craft = Craft::new(directory, name, len);
    let data = 4096 + 4 * u64::from(blocks).next_multiple_of(1024);
    craft.le32(64, 0xbeda_107f).le32(68, 0x0001_0001).le32(72, 400).le32(76, 1).le32(340, 4096);
    craft.le32(344, u32::try_from(data).unwrap()).le32(360, 512).le32(376, block).le32(384, blocks);
    craft.put(368, &(u64::from(blocks) * u64::from(block)).to_le_bytes()).put(392, &[1; 32]);
    craft.put(4096, map);
    craft
}

fn vdis(directory: &Path) -> Vec<PathBuf> {
    let alternating = words(32 << 10, |index| (index % 2).to_le_bytes());
    let scattered = words(32 << 10, |index| (index ^ 1).to_le_bytes());
    vec![
        vdi(directory, "map-of-4-gib-in-a-hole.vdi", 5 * GIB, (1 << 30) - 2048, 4096, &[]).path,
        vdi(directory, "two-blocks-everywhere.vdi", 5 * GIB, 32 << 10, 1 << 20, &alternating).path,
        vdi(directory, "blocks-in-disorder.vdi", 40 * GIB, 32 << 10, 1 << 20, &scattered).path,
        vdi(directory, "map-past-the-end.vdi", GIB, 1 << 29, 64 << 20, &[]).path,
        {
            let craft = vdi(directory, "extra-of-64-mib.vdi", 4 << 40, 32 << 10, 1 << 20, &scattered);
            craft.le32(380, 64 << 20).path.clone()
        },
        {
            let craft = vdi(directory, "child-of-nobody.vdi", 5 * GIB, 1 << 20, 1 << 20, &scattered);
            craft.le32(76, 4).put(424, &[9; 32]).path.clone()
        },
    ]
}

/// Makes a hosted sparse VMDK of `capacity` sectors in grains of `grain` sectors, with its directory at 64 KiB.
fn sparse(directory: &Path, name: &str, capacity: u64, grain: u64, directory_entries: &[u8]) -> Craft {
    let craft = Craft::new(directory, name, 8 * GIB);
    craft
        .put(0, b"KDMV")
        .le32(4, 1)
        .le32(8, 1)
        .put(12, &capacity.to_le_bytes())
        .put(20, &grain.to_le_bytes());
    craft.le32(44, 512).put(56, &128_u64.to_le_bytes()).put(64, &128_u64.to_le_bytes());
    craft.put(73, b"\n \r\n").put(64 << 10, directory_entries);
    craft
}

fn vmdks(directory: &Path) -> Vec<PathBuf> {
    let text = |name: &str, lines: &str| {
        let craft = Craft::new(directory, name, 0);
        craft.put(
            0,
            format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n{lines}").as_bytes(),
        );
        craft.path
    };
    let lines = |count: usize, line: &str| format!("{line}\n").repeat(count);
    let long_line = "x".repeat(1 << 20);
    let tables = words(1 << 20, |index| ((1 << 20) | (index * 4)).to_le_bytes());
    let same = words(8 << 20, |_| (1_u32 << 20).to_le_bytes());
    // Far behind the end of the file, each at another place.
    let beyond = words(8 << 20, |index| (u32::MAX - index).to_le_bytes());
    let stream =
        sparse(directory, "compressed-grains-of-4-gib.vmdk", 1 << 20, 128, &(1_u32 << 20).to_le_bytes());
    stream.le32(4, 3).le32(8, 0x0003_0001).put(77, &[1, 0]);
    stream.put(1 << 29, &words(512, |index| ((1_u32 << 21) | index).to_le_bytes()));
    for grain in 0..512 {
        stream.le32(GIB + 512 * grain + 8, u32::MAX);
    }
    let cowd = Craft::new(directory, "cowd-with-one-table.vmdk", 8 * GIB);
    cowd.put(0, b"COWD").le32(4, 1).le32(8, 3).le32(12, u32::MAX).le32(16, 1).le32(20, 4).le32(24, 1 << 20);
    cowd.put(2048, &same[..4 << 20]);
    let se = Craft::new(directory, "se-sparse-with-one-table.vmdk", 8 * GIB);
    let numbers = [0xcafe_babe, 0x2_0000_0001, 1 << 36, 8, 64, 0];
    for (index, number) in (0..).zip(numbers) {
        se.put(8 * index, &u64::to_le_bytes(number));
    }
    // Volatile header, journal header, journal, directory, tables, free bitmap, backmap, grains.
    let areas =
        [(1, 1), (2, 1), (3, 1), (8, 1 << 16), (1 << 17, 1 << 20), (3, 1), (3, 1), (1 << 22, 1 << 23)];
    for (index, (offset, size)) in (0..).zip(areas) {
        se.put(80 + 16 * index, &u64::to_le_bytes(offset)).put(88 + 16 * index, &u64::to_le_bytes(size));
    }
    se.put(512, &0xcafe_cafe_u64.to_le_bytes());
    se.put(4096, &longs(1 << 21, 0x1000_0000_0000_0001_u64.to_le_bytes()));
    vec![
        text("too-many-extents.vmdk", &lines(40_000, "RW 2048 ZERO")),
        text("as-many-extents-as-allowed.vmdk", &lines(32_768, "RW 536870912 ZERO")),
        text("extents-of-one-file.vmdk", &lines(32_768, "RW 8 FLAT \"too-many-extents.vmdk\" 0")),
        text("extents-of-one-sparse-file.vmdk", &lines(30_000, "RW 8 SPARSE \"tables-in-a-hole.vmdk\"")),
        text("line-of-a-mib.vmdk", &format!("{long_line}\nRW 2048 ZERO\n")),
        text("comments.vmdk", &lines(1 << 20, "#")),
        text("extent-of-2-64-sectors.vmdk", "RW 18446744073709551615 ZERO\n"),
        sparse(directory, "tables-in-a-hole.vmdk", 1 << 36, 128, &tables).path,
        sparse(directory, "one-table-for-all.vmdk", 8 << 32, 8, &same).path,
        sparse(directory, "tables-beyond-the-end.vmdk", 8 << 32, 8, &beyond).path,
        sparse(directory, "capacity-of-2-53.vmdk", 1 << 53, 2048, &same).path,
        stream.path,
        cowd.path,
        se.path,
    ]
}

fn containers(directory: &Path) -> Vec<PathBuf> {
    let luks = |name: &str, change: &dyn Fn(&Craft)| {
        let craft = Craft::new(directory, name, 8 * GIB);
        craft.put(0, b"LUKS\xba\xbe\0\x01").put(8, b"aes").put(40, b"xts-plain64").put(72, b"sha256");
        craft.be32(104, 4096).be32(108, 64).be32(164, 1000);
        for slot in (208..592).step_by(48) {
            craft.be32(slot, 0x00ac_71f3).be32(slot + 4, 1000).be32(slot + 40, 8).be32(slot + 44, 4000);
        }
        change(&craft);
        craft.path
    };
    vec![
        luks("eight-slots.luks", &|_| ()),
        luks("iterations.luks", &|craft| {
            craft.be32(212, u32::MAX);
        }),
        luks("stripes.luks", &|craft| {
            craft.be32(252, u32::MAX);
        }),
        luks("key-of-4-gib.luks", &|craft| {
            craft.be32(108, u32::MAX);
        }),
        luks("payload-at-2-tib.luks", &|craft| {
            craft.be32(104, u32::MAX);
        }),
    ]
}

/// Images of QED, QCOW version 1 and Parallels.
fn mapped(directory: &Path) -> Vec<PathBuf> {
    let qed = |name: &str, cluster: u32, size: u64, entries: &[u8]| {
        let craft = Craft::new(directory, name, 8 * GIB);
        craft.put(0, b"QED\0").le32(4, cluster).le32(8, 16).le32(12, 1);
        craft.put(40, &(64_u64 << 20).to_le_bytes()).put(48, &size.to_le_bytes()).put(64 << 20, entries);
        craft.path
    };
    let qcow = |name: &str, bits: [u8; 2], size: u64, len: u64, entries: &[u8]| {
        let craft = Craft::new(directory, name, len);
        craft.put(0, b"QFI\xfb\0\0\0\x01").be64(24, size).put(32, &bits).be64(40, 512).put(512, entries);
        craft.path
    };
    let parallels = |name: &str, sectors: u64, cluster: u32, entries: u32, table: &[u8]| {
        let craft = Craft::new(directory, name, 20 * GIB);
        craft.put(0, b"WithouFreSpacExt").le32(16, 2).le32(28, cluster).le32(32, entries);
        craft.put(36, &sectors.to_le_bytes()).put(64, table);
        craft.path
    };
    let compressed = u64::to_be_bytes(1 << 63 | 4095 << 47 | 1 << 30);
    vec![
        qed("empty-tables-of-a-gib.qed", 64 << 20, 1 << 62, &[]),
        qed("one-table-for-all.qed", 4096, 256 << 30, &longs(8192, (128_u64 << 20).to_le_bytes())),
        qed("tables-beyond-the-end.qed", 4096, 256 << 30, &longs(8192, (1_u64 << 50).to_le_bytes())),
        qcow("table-of-512-gib-in-a-hole.qcow1", [9, 6], 1 << 51, 1 << 40, &[]),
        qcow("one-table-for-all.qcow1", [16, 13], 1 << 46, 16 * GIB, &longs(1 << 17, u64::to_be_bytes(GIB))),
        qcow("tables-of-compressed-noise.qcow1", [16, 13], 512 << 20, GIB, &{
            let mut tables = longs(1, u64::to_be_bytes(1024));
            tables.resize(512, 0);
            tables.extend(longs(8192, compressed));
            tables
        }),
        parallels("table-of-16-gib-in-a-hole.hds", (u64::from(u32::MAX) - 1) << 11, 1 << 11, u32::MAX, &[]),
        parallels(
            "one-cluster-everywhere.hds",
            64 << 20,
            1 << 11,
            1 << 20,
            &words(1 << 15, |_| [1, 0, 0, 0]),
        ),
        parallels(
            "clusters-of-a-gib.hds",
            1 << 40,
            1 << 21,
            1 << 20,
            &words(1 << 15, |index| index.to_le_bytes()),
        ),
    ]
}

/// Images of Bochs, cloop and DMG.
fn others(directory: &Path) -> Vec<PathBuf> {
    let bochs = |name: &str, entries: u32, bitmap: u32, extent: u32, catalog: &[u8]| {
        let craft = Craft::new(directory, name, 40 * GIB);
        craft.put(0, b"Bochs Virtual HD Image").put(32, b"Redolog").put(48, b"Growing");
        craft.le32(64, 2 << 16).le32(68, 512).le32(72, entries).le32(76, bitmap).le32(80, extent);
        craft.put(88, &(u64::from(entries) * u64::from(extent)).to_le_bytes()).put(512, catalog);
        craft.path
    };
    let cloop = |name: &str, block: u32, blocks: u32, offsets: &[u8]| {
        let craft = Craft::new(directory, name, 40 * GIB);
        craft.put(0, b"#!/bin/sh\n#V2.0 Format\n").be32(128, block).be32(132, blocks).put(136, offsets);
        craft.path
    };
    let dmg = |name: &str, list: &[u8], list_len: u64| {
        let craft = Craft::new(directory, name, GIB);
        craft.put(4096, list).put(GIB - 512, b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01");
        craft.be32(GIB - 512 + 56, 1).be32(GIB - 512 + 60, 1).be64(GIB - 512 + 216, 4096);
        craft.be64(GIB - 512 + 224, list_len).be32(GIB - 512 + 488, 1).be64(GIB - 512 + 492, 1 << 30);
        craft.path
    };
    let blocks =
        |block: u64| -> Vec<u8> { (0..=64).flat_map(|index| (4096 + index * block).to_be_bytes()).collect() };
    let nested = [b"<plist>".to_vec(), b"<dict>".repeat(1 << 20)].concat();
    let chunks = property_list(1 << 20);
    vec![
        bochs("catalog-of-16-gib-in-a-hole.img", u32::MAX, 512, 4096, &[]),
        bochs("bitmaps-of-64-mib.img", 1 << 10, 64 << 20, 64 << 20, &words(1 << 10, u32::to_le_bytes)),
        bochs(
            "extents-in-disorder.img",
            1 << 20,
            512,
            512 << 10,
            &words(1 << 15, |index| (index ^ 1).to_le_bytes()),
        ),
        cloop("offsets-in-a-hole.cloop", 64 << 20, u32::MAX, &[]),
        cloop("blocks-of-64-mib.cloop", 64 << 20, 4, &blocks(64 << 20)),
        cloop("blocks-of-a-tib.cloop", 64 << 20, 64, &blocks(1 << 40)),
        dmg("list-of-holes.dmg", &[], 64 << 20),
        dmg("nested-list.dmg", &nested, nested.len() as u64),
        dmg("a-million-chunks.dmg", chunks.as_bytes(), chunks.len() as u64),
    ]
}

/// Returns a property list with a table of `count` chunks of one sector, all of them the same stored bytes.
fn property_list(count: u32) -> String {
    // 'mish', a table of `count` sectors; three bytes are four letters.
    let mut table = vec![0; 204];
    table[..8].copy_from_slice(b"mish\0\0\0\x01");
    table[16..24].copy_from_slice(&u64::from(count).to_be_bytes());
    table[200..204].copy_from_slice(&count.to_be_bytes());
    for index in 0..u64::from(count) {
        table.extend([0x80, 0, 0, 5, 0, 0, 0, 0]);
        for number in [index, 1, 0, 600] {
            table.extend(number.to_be_bytes());
        }
    }
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    table.resize(table.len().next_multiple_of(3), 0);
    let letters = table.chunks_exact(3).flat_map(|three| {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(LETTERS[(bits >> shift & 63) as usize]))
    });
    let data: String = letters.collect();
    format!(
        "<?xml version=\"1.0\"?><plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key>\
         <data>{data}</data></dict></array></dict></dict></plist>"
    )
}

/// Runs the commands that read tables and content on every file. Each must end within the limits of [`run`].
#[track_caller]
fn all_are_bounded(directory: &Path, files: &[PathBuf]) {
    for path in files {
        let file = path.file_name().unwrap().to_str().unwrap();
        for line in [
            &["info", file][..],
            &["check", file],
            &["map", file],
            &["convert", "--salvage", file, "--to", "qcow2", "out/"],
            &["convert", file, "--to", "vhdx", "out/"],
        ] {
            let outcome = run(directory, line);
            eprintln!("{line:?}: {:?}, {} MiB", outcome.status.code(), outcome.peak_memory >> 20);
        }
    }
}

#[test]
fn malicious_vhd_images_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &vhds(dir.path()));
}

#[test]
fn malicious_vdi_images_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &vdis(dir.path()));
}

#[test]
fn malicious_vmdk_images_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &vmdks(dir.path()));
}

#[test]
fn malicious_luks_containers_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &containers(dir.path()));
}

#[test]
fn malicious_images_of_small_formats_with_tables_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &mapped(dir.path()));
}

#[test]
fn malicious_images_of_other_small_formats_stay_within_limits() {
    require!("prlimit");
    let dir = tempdir();
    all_are_bounded(dir.path(), &others(dir.path()));
}
