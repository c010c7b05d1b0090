//! Packing disks into archives: names, configurations, and everything that Proxmox VE needs to restore them.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::tempdir;

use crate::support::imgtool;

fn disk(directory: &Path, name: &str, seed: u64) {
    Image::hole("d", 300_032).with(4096, images::noise(seed, 9000)).write_raw(&directory.join(name));
}

fn device_names(directory: &Path, archive: &str) -> Vec<String> {
    let info = imgtool(["info", "--output", "json", archive]).within(directory).ok().json();
    let devices = info["devices"].as_array().unwrap();
    devices.iter().map(|device| device["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn derives_unique_device_names_from_file_names() {
    let dir = tempdir();
    std::fs::create_dir(dir.path().join("other")).unwrap();
    for (name, seed) in [("web.raw", 1), ("other/web.img", 2), ("my disk.raw", 3)] {
        disk(dir.path(), name, seed);
    }
    let run = imgtool(["convert", "web.raw", "other/web.img", "my disk.raw", "boot=web.raw", "vm.vma"])
        .within(dir.path())
        .ok();
    assert_eq!(device_names(dir.path(), "vm.vma"), ["web", "web-2", "my_disk", "boot"]);
    run.says("device 'my disk' is called 'my_disk' in the archive");
    imgtool(["convert", "bad name=web.raw", "x.vma"]).within(dir.path()).go().exits(2).says("bad name");
    imgtool(["convert", "a=vm.vma", "x.vma"]).within(dir.path()).go().exits(2).says("names one device");
}

#[test]
fn proxmox_writes_the_configuration_that_qmrestore_reads() {
    let dir = tempdir();
    disk(dir.path(), "web.raw", 1);
    disk(dir.path(), "data.raw", 2);
    let archive = "vzdump-qemu-9000-2026_01_02-03_04_05.vma.zst";
    let run = imgtool(["convert", "web.raw", "virtio1=data.raw", archive])
        .args(["--proxmox", "name=web", "--proxmox", "net0=virtio,bridge=vmbr0"])
        .within(dir.path())
        .ok();
    assert!(!run.stderr.contains("qmrestore"), "{}", run.stderr);
    assert_eq!(device_names(dir.path(), archive), ["drive-scsi0", "drive-virtio1"]);
    let config = imgtool(["vma", "config", archive]).within(dir.path()).ok().text();
    for line in [
        "name: web",
        "net0: virtio,bridge=vmbr0",
        "boot: order=scsi0",
        "scsi0: local:9000/vm-9000-disk-0.raw,size=293K",
        "#qmdump#map:scsi0:drive-scsi0:local:raw:",
        "#qmdump#map:virtio1:drive-virtio1:local:raw:",
    ] {
        assert!(config.lines().any(|have| have == line), "no '{line}' in\n{config}");
    }
    // The state of the guest is no drive. A line given by the user names the storage.
    let archive = "vzdump-qemu-9000-2026_01_02-03_04_06.vma";
    imgtool([
        "convert",
        "web.raw",
        "vmstate=data.raw",
        archive,
        "--proxmox",
        "scsi0=zfs:vm-1-disk-0,size=1M",
    ])
    .within(dir.path())
    .ok();
    assert_eq!(device_names(dir.path(), archive), ["drive-scsi0", "vmstate"]);
    let config = imgtool(["vma", "config", archive]).within(dir.path()).ok().text();
    assert!(config.contains("\nscsi0: zfs:vm-1-disk-0,size=1M\n"), "{config}");
    assert!(config.ends_with("#qmdump#map:scsi0:drive-scsi0:zfs:raw:\n"), "{config}");
    assert!(!config.contains("scsi1"), "{config}");
    let run = imgtool(["convert", "web.raw", "vm.vma", "--proxmox", "memory=512"]).within(dir.path()).ok();
    run.says("qmrestore refuses the name 'vm.vma': mv vm.vma vzdump-qemu-100-");
    // A configuration file that was made for other disks, as it is in the source.
    let config = "scsi0: local:100/a.raw\n#qmdump#map:scsi0:drive-scsi0:local:raw:\n";
    std::fs::write(dir.path().join("qemu-server.conf"), config).unwrap();
    let pack = ["convert", "drive-scsi0=web.raw", "data.raw", "two.vma", "--config", "qemu-server.conf"];
    imgtool(pack).within(dir.path()).ok();
    let few = "vzdump-qemu-1-2026_01_02-03_04_05.vma";
    imgtool(["convert", "two.vma", few, "--disk", "drive-scsi1"])
        .within(dir.path())
        .ok()
        .says("scsi0 is the device drive-scsi0, which is not in the archive");
    imgtool(["convert", "web.raw", "x.qcow2", "--proxmox", "a=b"]).within(dir.path()).go().exits(2);
    imgtool(["convert", "web.raw", "x.vma", "--proxmox", "a"]).within(dir.path()).go().exits(2);
}

#[test]
fn configurations_are_kept_replaced_or_combined() {
    let dir = tempdir();
    disk(dir.path(), "web.raw", 1);
    std::fs::write(dir.path().join("qemu-server.conf"), "one\n").unwrap();
    std::fs::write(dir.path().join("extra.conf"), "two\n").unwrap();
    let convert = |args: &[&str]| {
        imgtool(["convert", "-q"]).args(args).within(dir.path()).ok();
    };
    let names = |archive: &str| -> Vec<String> {
        let info = imgtool(["info", "--output", "json", archive]).within(dir.path()).ok().json();
        let configs = info["attachments"].as_array().unwrap().clone();
        configs.iter().map(|config| config["name"].as_str().unwrap().to_owned()).collect()
    };
    convert(&["web.raw", "a.vma", "--config", "qemu-server.conf"]);
    convert(&["a.vma", "kept.vma"]);
    assert_eq!(names("kept.vma"), ["qemu-server.conf"]);
    convert(&["a.vma", "replaced.vma", "--config", "extra.conf"]);
    assert_eq!(names("replaced.vma"), ["extra.conf"]);
    convert(&["a.vma", "joined.vma", "--config", "extra.conf", "--config-from-source"]);
    assert_eq!(names("joined.vma"), ["extra.conf", "qemu-server.conf"]);
}

#[test]
fn extension_or_c_flag_compresses_the_whole_output() {
    let dir = tempdir();
    disk(dir.path(), "web.raw", 1);
    for (args, magic) in [
        (vec!["a.vma.zst"], &[0x28, 0xb5, 0x2f, 0xfd][..]),
        (vec!["a.vma.gz"], &[0x1f, 0x8b]),
        (vec!["b.vma", "-c"], &[0x28, 0xb5, 0x2f, 0xfd]),
        (vec!["c.vma", "-c=gzip:9"], &[0x1f, 0x8b]),
        (vec!["a.raw.zst"], &[0x28, 0xb5, 0x2f, 0xfd]),
    ] {
        imgtool(["convert", "web.raw"]).args(&args).within(dir.path()).ok();
        let bytes = std::fs::read(dir.path().join(args[0])).unwrap();
        assert!(bytes.starts_with(magic), "{args:?}");
        imgtool(["compare", "web.raw", args[0]]).within(dir.path()).ok();
    }
    for (args, words) in [
        (vec!["x.vma.lzo"], "lzop is read, but not written"),
        (vec!["x.qcow2.zst"], "can't be compressed as a whole"),
        (vec!["x.raw", "-c"], "no compression of its own"),
        (vec!["x.vma.gz", "-c=zstd"], "gzip by the extension"),
        (vec!["x.vma", "-c=lz77"], "lz77"),
    ] {
        imgtool(["convert", "web.raw"]).args(&args).within(dir.path()).go().exits(2).says(words);
    }
}

#[test]
fn overlay_compares_equal_and_protects_its_base() {
    let dir = tempdir();
    disk(dir.path(), "base.raw", 1);
    imgtool(["convert", "base.raw", "base.qcow2"]).within(dir.path()).ok();
    let mut bytes = std::fs::read(dir.path().join("base.raw")).unwrap();
    bytes[200_000] ^= 1;
    std::fs::write(dir.path().join("new.raw"), bytes).unwrap();
    imgtool(["convert", "-B", "base.qcow2", "-F", "qcow2", "new.raw", "overlay.qcow2"])
        .within(dir.path())
        .ok();
    imgtool(["compare", "new.raw", "overlay.qcow2"])
        .within(dir.path())
        .go()
        .exits(2)
        .says("--allow-external");
    imgtool(["compare", "--allow-external", "chain", "new.raw", "overlay.qcow2"]).within(dir.path()).ok();
    // The backing image of an overlay is not overwritten.
    for target in [&["--force", "base.qcow2"][..], &["-n", "base.qcow2"]] {
        imgtool(["convert", "--allow-external", "chain", "overlay.qcow2"])
            .args(target)
            .within(dir.path())
            .go()
            .exits(1)
            .says("same file");
    }
    let chain = imgtool([
        "info",
        "--backing-chain",
        "--allow-external",
        "chain",
        "--output",
        "json",
        "overlay.qcow2",
    ])
    .within(dir.path())
    .ok()
    .json();
    assert_eq!(chain.as_array().unwrap().len(), 2);
}
