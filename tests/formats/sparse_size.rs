//! `-S`: the minimum length of a run of zeros that is left out, in every format.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, occupied, oracles, require, sha256_file, snapshot, tempdir, text};
use serde_json::Value;

use crate::support::imgtool;

const MIB: u64 = 1 << 20;

/// Writes a disk of 8 MiB, mostly zeros: `disk.raw`, fully allocated, and `holes.raw`, with holes.
fn disks(directory: &Path) {
    let mut bytes = vec![0; 8 << 20];
    for (number, (start, len)) in (0..).zip([
        (0, 4096),
        (0x3000, 512),
        (0x40000, 65536),
        (0x60000, 4096),
        (0x100000, 300_000),
        (0x200000, 4096),
    ]) {
        bytes[start..start + len].copy_from_slice(&images::noise(number, len));
    }
    Image::hole("disk", 8 * MIB).with(0, bytes).write_raw(&directory.join("disk.raw"));
    imgtool(["convert", "-q", "disk.raw", "holes.raw"]).within(directory).ok();
    assert!(occupied(&directory.join("disk.raw")) >= 8 * MIB);
    assert!(occupied(&directory.join("holes.raw")) < MIB);
}

/// Returns the start and end of each range that qemu-img's map reports as data.
fn data_by_qemu(image: &Path) -> Vec<(u64, u64)> {
    let run = oracles::run("qemu-img", &["map", "-f", "qcow2", "--output=json", text(image)]);
    let map: Value = serde_json::from_slice(&run.stdout).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for extent in map.as_array().unwrap().iter().filter(|extent| extent["data"] == true) {
        let (start, len) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = start + len,
            _ => found.push((start, start + len)),
        }
    }
    found
}

#[test]
fn qcow2_allocation_matches_qemu_img() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    disks(dir.path());
    let base = dir.path().join("base.qcow2");
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), "8M"]);
    // The content differs from the disk's: we do not store data that the base already contains, but qemu-img
    // does.
    oracles::run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 7 0 8M", text(&base)]);
    for set in [
        "",
        "-o cluster_size=4k",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-c",
        "-o compat=0.10",
        "-o preallocation=metadata",
        "-B base.qcow2 -F qcow2",
    ] {
        for size in ["4k", "64k", "128k", "256k", "1M", "0"] {
            let line = format!("convert -q -f raw -O qcow2 -S {size} {set} disk.raw");
            let line: Vec<&str> = line.split_whitespace().collect();
            imgtool(line.iter().copied().chain(["ours.qcow2", "--force"])).within(dir.path()).ok();
            let script = format!(
                "cd {} && qemu-img {} theirs.qcow2",
                text(dir.path()),
                line.join(" ").replace("-q ", "")
            );
            oracles::run("sh", &["-c", &script]);
            let (ours, theirs) = (dir.path().join("ours.qcow2"), dir.path().join("theirs.qcow2"));
            oracles::qemu_check(&ours, "qcow2");
            oracles::qemu_compare(&ours, "qcow2", &dir.path().join("disk.raw"), "raw");
            assert_eq!(data_by_qemu(&ours), data_by_qemu(&theirs), "-S {size} {set}");
        }
    }
}

#[test]
fn holes_of_the_source_count_only_where_they_do_not_change_the_bytes() {
    let dir = tempdir();
    disks(dir.path());
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let out = dir.path().join(format!("out.{format}"));
        let convert = |size, source| {
            imgtool(["convert", "-q", "-S", size, &format!("disk={source}"), "--force", text(&out)])
                .env("SOURCE_DATE_EPOCH", "1")
                .within(dir.path())
                .ok();
            (occupied(&out), sha256_file(&out))
        };
        let (smallest, _) = convert("4k", "holes.raw");
        let (of_holes, holes) = convert("1M", "holes.raw");
        let (of_dense, dense) = convert("1M", "disk.raw");
        assert_eq!(holes, dense, "{format}");
        assert!(of_dense > smallest + 64 * 1024, "{format}: {of_dense}");
        if format == "raw" {
            assert!(of_holes < smallest + 32 * 1024, "{format}: {of_holes}");
        }
    }
}

#[test]
fn sparse_size_0_stores_every_zero() {
    require!("qemu-img");
    let dir = tempdir();
    disks(dir.path());
    for set in [
        "qcow2",
        "qcow2 -o extended_l2=on",
        "qcow2 -o cluster_size=512",
        "qcow2 -o data_file=data.bin",
        "qcow2 -o preallocation=falloc",
        "vhdx",
        "vhdx -o block_size=1M",
        "vhdx -o subformat=fixed",
        "vma",
        "raw",
    ] {
        for source in ["disk.raw", "holes.raw"] {
            // qemu-img resolves the name of a data file against its working directory.
            let set = set.replace("=data", &format!("={}/data", text(dir.path())));
            let line = format!("convert -q -S 0 {source} --force --verify out --to {set}");
            imgtool(line.split(' ')).within(dir.path()).ok();
            let out = dir.path().join(if set.contains("data_file") { "data.bin" } else { "out" });
            assert!(occupied(&out) >= 8 * MIB, "{set} {source}: {}", occupied(&out));
            assert!(occupied(&out) < 10 * MIB, "{set} {source}: {}", occupied(&out));
            let out = dir.path().join("out");
            let format = set.split(' ').next().unwrap();
            imgtool(["convert", "-q", "--allow-external", "chain", text(&out), "back.raw", "--force"])
                .within(dir.path())
                .ok();
            assert_same(&dir.path().join("disk.raw"), &dir.path().join("back.raw"), &set);
            if format == "qcow2" {
                oracles::qemu_check(&out, "qcow2");
                if !set.contains("data_file") {
                    assert_eq!(data_by_qemu(&out), [(0, 8 * MIB)], "{set} {source}");
                }
            }
            if format == "vhdx" {
                oracles::qemu_check(&out, "vhdx");
                oracles::qemu_compare(&out, "vhdx", &dir.path().join("disk.raw"), "raw");
                let map = imgtool(["map", "--output", "json", text(&out)]).ok().json();
                assert!(
                    map.as_array().unwrap().iter().all(|extent| extent["present"] == true),
                    "{set}: {map}"
                );
            }
        }
    }
    // Also from a stream, whose size is unknown until it ends.
    for format in ["raw", "qcow2"] {
        let out = dir.path().join("streamed");
        imgtool(["convert", "-q", "-S", "0", "-f", "raw", "-", "--to", format, text(&out), "--force"])
            .pipe_from(&dir.path().join("holes.raw"))
            .ok();
        assert!(occupied(&out) >= 8 * MIB, "{format}: {}", occupied(&out));
    }
}

#[test]
fn vhdx_guids_do_not_depend_on_the_sparse_size() {
    let dir = tempdir();
    disks(dir.path());
    let facts = ["4k", "1M", "0"].map(|size| {
        imgtool(["convert", "-q", "-S", size, "disk.raw", "out.vhdx", "--force"]).within(dir.path()).ok();
        let info = imgtool(["info", "--output", "json", "out.vhdx"]).within(dir.path()).ok().json();
        info["format-specific"].clone()
    });
    assert!(facts[0].to_string().contains("guid"), "{}", facts[0]);
    assert_eq!(facts[0], facts[1]);
    assert_eq!(facts[0], facts[2]);
}

#[test]
fn sparse_size_applies_to_separate_targets() {
    let dir = tempdir();
    disks(dir.path());
    imgtool(["convert", "-q", "a=holes.raw", "b=holes.raw", "two.vma"]).within(dir.path()).ok();
    let line = "convert -q -S 0 two.vma --to qcow2 --target a=a.qcow2 --target b=b.vhdx,format=vhdx";
    imgtool(line.split(' ')).within(dir.path()).ok();
    for name in ["a.qcow2", "b.vhdx"] {
        assert!(occupied(&dir.path().join(name)) >= 8 * MIB, "{name}");
    }
}

#[test]
fn refuses_sparse_sizes_that_qemu_img_rejects() {
    let dir = tempdir();
    disks(dir.path());
    let before = snapshot(dir.path());
    for size in ["1000", "3", "17M", "-1", "x"] {
        imgtool(["convert", &format!("-S={size}"), "disk.raw", "out.raw"])
            .within(dir.path())
            .go()
            .exits(2)
            .says("-S");
        assert_eq!(snapshot(dir.path()), before, "{size}");
    }
    imgtool(["convert", "-S", "16M", "disk.raw", "out.raw"]).within(dir.path()).ok();
}
