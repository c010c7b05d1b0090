//! Devices and files that exist as targets under the name of qemu-img.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use imgtool_testing::images::noise;
use imgtool_testing::oracles::run_in;
use imgtool_testing::{require, tempdir, text};

use crate::support::devices::{LoopDevice, Mounted, loop_devices};
use crate::support::imgtool;

const DISK: usize = 2 << 20;

/// Opens an image with qemu-io, which locks it and waits for commands.
fn open_by_qemu(image: &Path) -> Child {
    let mut machine = Command::new("qemu-io")
        .args(["-f", "raw", text(image)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    machine.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    machine
}

/// The name permits to replace files, not to write into what is in use.
#[test]
fn create_keeps_a_device_in_use() {
    require!("qemu-io", "mkfs.ext4", "mount");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let device = LoopDevice::holding(&dir.path().join("device"), &noise(9, 8 << 20));
    let refused = |words: &str| {
        let before = device.bytes();
        for format in ["raw", "qcow2"] {
            let line = ["--compat", "create", "-f", format, text(device.path()), "4M"];
            imgtool(line).within(dir.path()).go().ends_with(1).says(words);
            assert!(device.bytes() == before, "{format}: {words}");
        }
    };
    {
        let _mounted = Mounted::ext4_read_only(&device, &dir.path().join("mnt"));
        refused("mounted or otherwise in use");
    }
    let mut machine = open_by_qemu(device.path());
    refused("has locked it");
    drop(machine.stdin.take());
    machine.wait().unwrap();
}

#[test]
fn create_keeps_a_file_that_qemu_uses() {
    require!("qemu-io");
    let dir = tempdir();
    let file = dir.path().join("old.raw");
    std::fs::write(&file, noise(1, DISK)).unwrap();
    let mut machine = open_by_qemu(&file);
    for format in ["raw", "qcow2"] {
        let line = ["--compat", "create", "-f", format, "old.raw", "1M"];
        imgtool(line).within(dir.path()).go().exits(1).says("has locked it");
    }
    drop(machine.stdin.take());
    machine.wait().unwrap();
    assert!(std::fs::read(&file).unwrap() == noise(1, DISK));
    imgtool(["--compat", "create", "-f", "raw", "old.raw", "1M"]).within(dir.path()).go().ends_with(0);
    assert!(std::fs::read(&file).unwrap() == vec![0; 1 << 20]);
}

#[test]
fn create_clears_the_first_sector_of_a_device_as_qemu_img() {
    require!("qemu-img");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let old = noise(9, 8 << 20);
    let [theirs, ours] = ["theirs", "ours"].map(|name| LoopDevice::holding(&dir.path().join(name), &old));
    run_in("qemu-img", dir.path(), &["create", "-q", "-f", "raw", text(theirs.path()), "1M"]);
    let line = ["--compat", "create", "-q", "-f", "raw", text(ours.path())];
    imgtool(line).args(["1M"]).within(dir.path()).go().ends_with(0);
    assert!(ours.bytes() == theirs.bytes());
    assert!(ours.bytes()[512..] == old[512..]);
    imgtool(line).args(["9M"]).within(dir.path()).go().ends_with(1).says("too small");
    assert!(ours.bytes() == theirs.bytes());
}

/// Volumes are as large as the image or larger (Cinder, Nova, KubeVirt's importer, vdsm).
#[test]
fn a_raw_disk_goes_to_the_front_of_a_larger_target() {
    require!("qemu-img");
    let dir = tempdir();
    std::fs::write(dir.path().join("disk.raw"), noise(3, DISK)).unwrap();
    run_in("qemu-img", dir.path(), &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let old = noise(9, DISK + (9 << 20));
    let check = |targets: [&Path; 2], more: &[&str], bytes: &dyn Fn(&str) -> Vec<u8>| {
        let line = [&["convert", "-O", "raw", "-f", "qcow2"], more, &["disk.qcow2"]].concat();
        run_in("qemu-img", dir.path(), &[&line[..], &[text(targets[0])]].concat());
        imgtool(["--compat"]).args(&line).args([targets[1]]).within(dir.path()).go().ends_with(0);
        assert!(bytes("ours") == bytes("theirs"), "{more:?}");
        assert!(bytes("ours")[DISK..] == old[DISK..], "{more:?}: the rest keeps its bytes");
    };
    let paths = ["theirs", "ours"].map(|name| dir.path().join(name));
    paths.iter().for_each(|path| std::fs::write(path, &old).unwrap());
    check(paths.each_ref().map(|path| path.as_path()), &["-n"], &|name| {
        std::fs::read(dir.path().join(name)).unwrap()
    });
    if !loop_devices() {
        return;
    }
    for more in [&[][..], &["-n", "-W"]] {
        let devices = paths.each_ref().map(|path| LoopDevice::holding(path, &old));
        check(devices.each_ref().map(LoopDevice::path), more, &|name| match name {
            "ours" => devices[1].bytes(),
            _ => devices[0].bytes(),
        });
    }
}
