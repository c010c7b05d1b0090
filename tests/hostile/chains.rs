//! Chains of images, and images that look like another format.

use std::fs::File;

use imgtool::contracts::OpenOptions;
use imgtool_engine::{ExternalPolicy, PolicyOpener};
use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, snapshot, tempdir};

use super::externals::with_parent;
use super::{Craft, MEMORY, qcow2};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Creates a directory with the images `0.qcow2`, which has the content of `0.raw`, to `DEPTH.qcow2`, each the
/// backing file of the next.
fn deep_chain(depth: u32) -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&dir.path().join("0.raw"));
    oracles::qemu_make(&dir.path().join("0.raw"), "qcow2", "", &dir.path().join("0.qcow2"));
    for number in 1..=depth {
        let craft = qcow2(dir.path(), &format!("{number}.qcow2"), 16 << 20, 16, 1 << 20, 1);
        let name = format!("{}.qcow2", number - 1);
        craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
        craft.be32(104, 0xe279_2aca).be32(108, 5).put(112, b"qcow2");
    }
    dir
}

/// The library promises that 128 KiB of stack suffice, the size of a thread's with musl.
#[test]
fn a_deep_chain_fits_on_a_small_stack() {
    require!("qemu-img");
    let dir = deep_chain(256);
    let top = dir.path().join("256.qcow2");
    let expected = std::fs::read(dir.path().join("0.raw")).unwrap();
    let read = move || {
        let registry = imgtool::registry();
        let policy = ExternalPolicy { chain: true, ..ExternalPolicy::default() };
        let externals = PolicyOpener::new(registry.clone(), policy).externals();
        let options = OpenOptions { externals, ..OpenOptions::default() };
        let image = imgtool::open_with(&registry, &top, None, &options).unwrap();
        let disk = image.disks().unwrap().remove(0);
        let mut found = vec![0; expected.len()];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert_eq!(disk.map(0..1 << 20).unwrap()[0].depth, 256);
        assert!(disk.extents(0..1 << 20).unwrap()[0].is_data());
        assert!(disk.rough_extents(0..1 << 20, 65_536).unwrap()[0].is_data());
        assert!(disk.locate(0..65_536).is_some());
        assert!(disk.losses().is_empty() && disk.read_granule() > 0);
        std::mem::drop((image, disk));
    };
    std::thread::Builder::new().stack_size(128 << 10).spawn(read).unwrap().join().unwrap();
    // The main thread of the program has the stack that the user's limit gives.
    for line in ["info --backing-chain", "map", "check", "convert --to raw", "checksum"] {
        let script = format!(
            "ulimit -s 128; exec {PROGRAM} {line} --allow-external chain 256.qcow2 {}",
            if line.starts_with("convert") { "out.raw" } else { "" }
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &script])
            .current_dir(dir.path())
            .output()
            .unwrap();
        // `check` reports that the crafted image has no refcounts.
        let code = output.status.code();
        assert!(code == Some(0) || line == "check" && code.is_some(), "{line}: {output:?}");
    }
    imgtool_testing::assert_same(&dir.path().join("0.raw"), &dir.path().join("out.raw"), "256 images");
}

#[test]
fn follows_chains_up_to_the_depth_limit_and_refuses_deeper() {
    require!("qemu-img");
    let dir = deep_chain(258);
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
