//! Chains of images, and images that look like another format.

use std::fs::File;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, snapshot, tempdir};

use super::externals::with_parent;
use super::{Craft, MEMORY, qcow2};
use crate::support::imgtool;

#[test]
fn follows_chains_up_to_the_depth_limit_and_refuses_deeper() {
    require!("qemu-img");
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&dir.path().join("0.raw"));
    oracles::qemu_make(&dir.path().join("0.raw"), "qcow2", "", &dir.path().join("0.qcow2"));
    for number in 1..=258 {
        let craft = qcow2(dir.path(), &format!("{number}.qcow2"), 16 << 20, 16, 1 << 20, 1);
        let name = format!("{}.qcow2", number - 1);
        craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
        craft.be32(104, 0xe279_2aca).be32(108, 5).put(112, b"qcow2");
    }
    let line = |top: &str| {
        ["convert", "--allow-external", "chain", top, "--to", "raw", "out.raw"].map(str::to_owned)
    };
    let run = imgtool(line("256.qcow2")).within(dir.path()).measured().ok();
    assert!(run.peak_memory < MEMORY, "{} bytes", run.peak_memory);
    imgtool_testing::assert_same(&dir.path().join("0.raw"), &dir.path().join("out.raw"), "256 images");
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    imgtool(line("258.qcow2")).within(dir.path()).go().exits(1).says("deeper than");
    assert!(!dir.path().join("out.raw").exists());
    // A loop is reported at once.
    let craft = Craft {
        path: dir.path().join("1.qcow2"),
        file: File::options().write(true).open(dir.path().join("1.qcow2")).unwrap(),
    };
    craft.put(4096, b"9.qcow2");
    imgtool(line("9.qcow2"))
        .within(dir.path())
        .go()
        .exits(1)
        .says("'9.qcow2' leads back to an image of the same chain");
    assert!(!dir.path().join("out.raw").exists());
}

/// Every image has a BAT of 4 MiB with some entries set, although all content is the parent's. The tables
/// that the images keep in memory must not add up.
#[test]
fn long_vhdx_chain_stays_within_the_memory_limit() {
    const IMAGES: usize = 80;
    const BAT_REGION: [u8; 4] = [0x66, 0x77, 0xc2, 0x2d];
    let guid = "dddddddd-0000-4000-8000-000000000001";
    let dir = tempdir();
    let create = |name: &str| {
        let (block_size, guid) = ("block_size=1M", format!("data_write_guid={guid}"));
        imgtool(["create", "-f", "vhdx", "-o", block_size, "-o", &guid, name, "500G"])
            .within(dir.path())
            .ok();
    };
    create("0.vhdx");
    let linkage = ("parent_linkage", &*format!("{{{guid}}}"));
    for number in 1..IMAGES {
        let name = format!("{number}.vhdx");
        create(&name);
        with_parent(dir.path(), &name, &[linkage, ("relative_path", &format!("{}.vhdx", number - 1))]);
        let path = dir.path().join(&name);
        let bytes = std::fs::read(&path).unwrap();
        let entry = bytes.windows(4).position(|window| window == BAT_REGION).unwrap() + 16;
        let bat = u64::from_le_bytes(bytes[entry..entry + 8].try_into().unwrap());
        // One block in each 64 KiB of the BAT is not present, so its offset has no meaning. All other blocks
        // are zeros.
        let entries: Vec<u8> = (0..500 << 10)
            .flat_map(|entry| (1u64 << 20 | if entry % 8192 == 0 { 0 } else { 2 }).to_le_bytes())
            .collect();
        let craft = Craft { path: path.clone(), file: File::options().write(true).open(&path).unwrap() };
        craft.put(bat, &entries);
    }
    let top = format!("{}.vhdx", IMAGES - 1);
    let run = imgtool(["map", "--allow-external", "chain", &top]).within(dir.path()).measured().ok();
    eprintln!("{} MiB", run.peak_memory >> 20);
    assert!(run.peak_memory < MEMORY, "{} bytes", run.peak_memory);
}

#[test]
fn explicit_format_overrides_detection() {
    let dir = tempdir();
    // The guest of a raw disk wrote a qcow2 header with a backing file into its first sectors.
    let craft = qcow2(dir.path(), "guest.raw", 16 << 20, 16, 1 << 30, 1);
    craft.be64(8, 4096).be32(16, 11).put(4096, b"/etc/passwd");
    imgtool(["convert", "-f", "raw", "guest.raw", "--to", "raw", "out.raw"]).within(dir.path()).ok();
    imgtool_testing::assert_same(&craft.path, &dir.path().join("out.raw"), "raw is raw");
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    let before = snapshot(dir.path());
    for format in ["vhdx", "vma"] {
        imgtool(["convert", "-f", format, "guest.raw", "--to", "raw", "out.raw"])
            .within(dir.path())
            .go()
            .exits(1);
    }
    // Bytes that look compressed are ordinary content of a raw disk.
    std::fs::write(
        dir.path().join("zip.raw"),
        [&[0x1f, 0x8b, 8, 0], images::noise(1, 5000).as_slice()].concat(),
    )
    .unwrap();
    imgtool(["convert", "-f", "raw", "zip.raw", "--to", "raw", "zip.out"]).within(dir.path()).ok();
    imgtool_testing::assert_same(&dir.path().join("zip.raw"), &dir.path().join("zip.out"), "not undone");
    std::fs::remove_file(dir.path().join("zip.raw")).unwrap();
    std::fs::remove_file(dir.path().join("zip.out")).unwrap();
    assert_eq!(snapshot(dir.path()), before);
}
