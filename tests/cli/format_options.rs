//! Options of every format, and flags that other programs know.

use std::path::Path;

use imgtool_testing::{oracles, require, tempdir, text};

use super::with_disk;
use crate::support::devices::{LoopDevice, Mounted, loop_devices};
use crate::support::imgtool;

#[test]
fn the_last_value_of_a_key_counts() {
    let dir = with_disk();
    let line =
        ["create", "-f", "qcow2", "-o", "cluster_size=4k,size=1M", "-o", "cluster_size=8k", "new.qcow2"];
    imgtool(line).within(dir.path()).ok();
    let info = imgtool(["info", "--output", "json", "new.qcow2"]).within(dir.path()).ok().json();
    assert_eq!((info["cluster-size"].as_u64(), info["virtual-size"].as_u64()), (Some(8192), Some(1 << 20)));
    let line = ["create", "-f", "raw", "-o", "size=1M", "other.raw", "2M"];
    imgtool(line).within(dir.path()).go().exits(2).says("given twice");
    // -b and -F win over -o, and one of them may be an option.
    let line =
        ["create", "-f", "qcow2", "-b", "disk.raw", "-o", "backing_file=none,backing_fmt=raw", "child.qcow2"];
    imgtool(line).within(dir.path()).ok();
    let info = imgtool(["info", "--output", "json", "child.qcow2"]).within(dir.path()).ok().json();
    assert_eq!(info["backing-filename"], "disk.raw");
    let line = ["create", "-f", "qcow2", "-b", "disk.raw", "third.qcow2"];
    let refused = imgtool(line).within(dir.path()).go().exits(2);
    refused.says("format of the backing file is missing").says("if that is right, add -F raw");
    imgtool(["convert", "-B", "child.qcow2", "disk.raw", "fourth.qcow2"])
        .within(dir.path())
        .go()
        .exits(2)
        .says("'child.qcow2' looks like qcow2; if that is right, add -F qcow2");
}

#[test]
fn a_size_without_effect_gets_a_note() {
    let dir = with_disk();
    let line = ["convert", "disk.raw", "--to", "qcow2", "-o", "size=1G", "new.qcow2"];
    imgtool(line).within(dir.path()).ok().says("-o size has no effect");
    let line = ["convert", "disk.raw", "--to", "qcow2", "-o", "size=much", "other.qcow2"];
    imgtool(line).within(dir.path()).go().exits(2).says("size");
}

#[test]
fn nocow_is_set_or_gets_a_note() {
    require!("stat");
    let dir = tempdir();
    let line =
        ["create", "--output", "json", "-f", "raw", "-o", "nocow=on,extent_size_hint=1M", "new.raw", "1M"];
    let run = imgtool(line).within(dir.path()).ok();
    let notes = run.json()["notes"].to_string();
    let file_system = oracles::run("stat", &["-f", "-c", "%T", text(dir.path())]).stdout;
    let has_switch = file_system.starts_with(b"btrfs");
    assert_eq!(notes.contains("copy-on-write"), !has_switch, "{notes}");
    let line = ["create", "-f", "raw", "-o", "nocow=off", "--output", "json", "plain.raw", "1M"];
    assert_eq!(imgtool(line).within(dir.path()).ok().json()["notes"], serde_json::json!([]));
    let help = imgtool(["create", "-f", "raw", "-o", "help"]).ok().text();
    assert!(help.contains("Options of every format:") && help.contains("nocow="), "{help}");
}

/// True if chattr(1)'s flag `C` is set.
fn is_without_copies(path: &Path) -> bool {
    let flags = oracles::run("lsattr", &[text(path)]).stdout;
    String::from_utf8(flags).unwrap().split(' ').next().unwrap().contains('C')
}

#[test]
fn nocow_sets_the_flag_on_btrfs() {
    require!("mkfs.btrfs", "lsattr", "mount");
    if !loop_devices() {
        return;
    }
    let dir = with_disk();
    let disk = dir.path().join("device");
    std::fs::File::create(&disk).unwrap().set_len(256 << 20).unwrap();
    let device = LoopDevice::over(&disk);
    let mounted = dir.path().join("btrfs");
    let _mounted = Mounted::btrfs(&device, &mounted);
    for (line, name) in [
        ("create -f raw -o nocow=on btrfs/a.raw 1M", "a.raw"),
        ("create -f qcow2 -o nocow=on,preallocation=metadata btrfs/b.qcow2 1M", "b.qcow2"),
        ("convert disk.raw --to qcow2 -o nocow=on btrfs/c.qcow2", "c.qcow2"),
        ("convert disk.raw --to raw -o nocow=on btrfs/d.raw", "d.raw"),
        ("convert disk.raw --to vmdk -o subformat=twoGbMaxExtentFlat,nocow=on btrfs/e.vmdk", "e-f001.vmdk"),
    ] {
        let run = imgtool(line.split(' ')).within(dir.path()).ok();
        assert!(!run.stderr.contains("copy-on-write"), "{}", run.stderr);
        assert!(is_without_copies(&mounted.join(name)), "{line}");
    }
    imgtool(["compare", "disk.raw", "btrfs/c.qcow2"]).within(dir.path()).ok();
    imgtool(["compare", "disk.raw", "btrfs/d.raw"]).within(dir.path()).ok();
    imgtool(["convert", "disk.raw", "btrfs/f.raw"]).within(dir.path()).ok();
    assert!(!is_without_copies(&mounted.join("f.raw")));
}

#[test]
fn flags_of_other_spellings_have_their_meaning() {
    let dir = with_disk();
    imgtool(["convert", "-q", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    let map = |args: &[&str]| imgtool(["map", "--output", "json"]).args(args).within(dir.path()).ok().json();
    let part = map(&["-s", "8k", "-l", "4k", "disk.qcow2"]);
    assert_eq!(part, map(&["--start-offset=0x2000", "--max-length=4096", "disk.qcow2"]));
    assert_eq!((part[0]["start"].as_u64(), part[0]["length"].as_u64()), (Some(8192), Some(4096)));
    let line = ["compare", "--a-format", "raw", "--b-format", "qcow2", "disk.raw", "disk.qcow2"];
    imgtool(line).within(dir.path()).ok();
    imgtool(["compare", "--b-format", "raw", "disk.raw", "disk.qcow2"]).within(dir.path()).go().ends_with(1);
    let info = imgtool(["info", "-b", "--output", "json", "disk.qcow2"]).within(dir.path()).ok().json();
    assert_eq!(info.as_array().map(Vec::len), Some(1));
    let line = ["convert", "--source-format=raw", "--target-format=vhdx", "disk.raw", "image"];
    imgtool(line).within(dir.path()).ok();
    let info = imgtool(["info", "--output", "json", "image"]).within(dir.path()).ok().json();
    assert_eq!(info["format"], "vhdx");
    imgtool(["check", "disk.raw"]).within(dir.path()).go().ends_with(63).says("no structure");
}

#[test]
fn every_format_has_a_dirty_flag() {
    let dir = with_disk();
    for name in ["a.raw", "a.qcow2", "a.vhdx", "a.vhd", "a.vdi", "a.vmdk", "a.vma"] {
        imgtool(["convert", "-q", "-f", "raw", "disk.raw", name]).within(dir.path()).ok();
        let info = imgtool(["info", "--output", "json", name]).within(dir.path()).ok().json();
        assert_eq!(info["dirty-flag"], false, "{name}");
    }
}

#[test]
fn a_device_takes_no_space_of_a_file_system() {
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let device = LoopDevice::holding(&dir.path().join("file"), &[1; 1 << 20]);
    let info = imgtool(["info", "-f", "raw", "--output", "json", text(device.path())]).ok().json();
    assert_eq!(info["actual-size"], 0);
}
