//! Restoring to existing block devices: sizes, tails, zeros, and devices in use.

use std::path::Path;

use imgtool_testing::images::noise;
use imgtool_testing::{fixture, oracles, require, sha256, tempdir, text};

use crate::support::devices::{LoopDevice, Mounted, loop_devices};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

const SCSI: &str = "2eb0f4945306c46775684ae3e6b0f9c401fea1cbfb4ff3c2d6cbe6b8745326f3";
const EFI: &str = "a0fd2cf34e841d0d1e7f30367fc2b547c952d35ae30d9003b2890c10b61d82c9";
const EFI_SIZE: usize = 540_672;
const SCSI_SIZE: usize = 5_255_168;
const TOLERANCE: usize = 4 << 20;

/// Restores the EFI disk to `target`, with the options `more`.
fn restore_efi(target: &Path, more: &[&str]) -> crate::support::run::Outcome {
    let target = format!("drive-efidisk0={}", text(target));
    imgtool(["convert", text(&fixture("two-disks.vma.zst")), "--disk", "drive-efidisk0", "--target", &target])
        .args(more)
        .go()
}

#[test]
fn accepts_devices_up_to_4_mib_larger_and_keeps_the_tail() {
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    for more in [0, 512, TOLERANCE - 512, TOLERANCE] {
        let old = noise(5, EFI_SIZE + more);
        let device = LoopDevice::holding(&dir.path().join("disk"), &old);
        restore_efi(device.path(), &[]).exits(0);
        let now = device.bytes();
        assert_eq!(sha256(&now[..EFI_SIZE]), EFI, "{more} more");
        assert!(now[EFI_SIZE..] == old[EFI_SIZE..], "{more} more: the tail");
    }
}

#[test]
fn refuses_other_device_sizes_and_names_both_sizes() {
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    for size in [512, EFI_SIZE - 512, EFI_SIZE + TOLERANCE + 512] {
        let old = noise(6, size);
        let device = LoopDevice::holding(&dir.path().join("disk"), &old);
        let run = restore_efi(device.path(), &[]).exits(1);
        run.says(&EFI_SIZE.to_string()).says(&size.to_string());
        assert!(device.bytes() == old, "{size}");
        // A map file of the vma program is refused with the message of that program.
        let map = dir.path().join("map");
        std::fs::write(&map, format!("skip=drive-scsi0\n1:drive-efidisk0={}\n", text(device.path())))
            .unwrap();
        let archive = fixture("two-disks.vma.zst");
        let words = format!(
            "vma_reader_register_bs for stream drive-efidisk0 failed - unexpected size {size} != {EFI_SIZE}"
        );
        imgtool(["vma", "extract", "-r", text(&map), text(&archive), text(&dir.path().join("out"))])
            .go()
            .exits(1)
            .says(&words);
        assert!(device.bytes() == old, "{size}, by a map");
    }
    // With --force, the disk replaces the front of a much larger device.
    let old = noise(7, EFI_SIZE + 2 * TOLERANCE);
    let device = LoopDevice::holding(&dir.path().join("disk"), &old);
    restore_efi(device.path(), &["--force"]).exits(0);
    assert_eq!(sha256(&device.bytes()[..EFI_SIZE]), EFI);
    assert!(device.bytes()[EFI_SIZE..] == old[EFI_SIZE..]);
}

/// Returns the number of calls with which a run zeroes ranges of the target, and the number of bytes that it
/// writes there. `zeroed` is appended to the target's argument.
fn calls(target: &Path, zeroed: &str) -> (usize, u64) {
    let trace = tempdir();
    let log = trace.path().join("trace");
    let place = format!("drive-scsi0={}{zeroed}", text(target));
    let output = std::process::Command::new("strace")
        .args(["-f", "-y", "-e", "trace=fallocate,ioctl,pwritev,pwrite64", "-o", text(&log), PROGRAM])
        .args(["convert", "-q", text(&fixture("two-disks.vma.zst"))])
        .args(["--threads", "1", "--disk", "drive-scsi0", "--target", &place])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let log = std::fs::read_to_string(log).unwrap();
    let of_target: Vec<&str> =
        log.lines().filter(|line| line.contains(&format!("<{}", text(target)))).collect();
    let zeroings =
        of_target.iter().filter(|line| line.contains("fallocate(") && line.ends_with("= 0")).count();
    let written = of_target
        .iter()
        .filter(|line| line.contains("pwrite"))
        .filter_map(|line| line.rsplit("= ").next()?.parse::<u64>().ok())
        .sum();
    (zeroings, written)
}

#[test]
fn never_writes_zeros_and_skips_zeroing_a_zeroed_device() {
    if !loop_devices() {
        return;
    }
    require!("strace");
    let dir = tempdir();
    let stored = 2_154_496;
    let device = LoopDevice::holding(&dir.path().join("old"), &noise(8, SCSI_SIZE));
    let (zeroings, written) = calls(device.path(), "");
    assert!(zeroings > 5, "the device zeroes: {zeroings}");
    assert_eq!(written, stored, "zeros are not sent");
    assert_eq!(sha256(&device.bytes()), SCSI);
    let device = LoopDevice::holding(&dir.path().join("new"), &vec![0; SCSI_SIZE]);
    assert_eq!(calls(device.path(), ",zeroed"), (0, stored));
    assert_eq!(sha256(&device.bytes()), SCSI);
    // The program believes the user: old data stays where the disk is zero.
    let device = LoopDevice::holding(&dir.path().join("lied"), &vec![0xaa; SCSI_SIZE]);
    calls(device.path(), ",zeroed");
    assert_ne!(sha256(&device.bytes()), SCSI);
    // The program punches holes into an existing file.
    let file = dir.path().join("file");
    std::fs::write(&file, noise(9, SCSI_SIZE)).unwrap();
    let (zeroings, written) = calls(&file, "");
    assert!(zeroings > 5 && written == stored, "{zeroings} zeroings, {written} written");
    assert_eq!(sha256(&std::fs::read(&file).unwrap()), SCSI);
}

#[test]
fn refuses_a_device_in_use_without_force() {
    if !loop_devices() {
        return;
    }
    require!("mkfs.ext4", "mount");
    let dir = tempdir();
    let device = LoopDevice::holding(&dir.path().join("disk"), &vec![0; EFI_SIZE + TOLERANCE]);
    {
        let _mounted = Mounted::ext4_read_only(&device, &dir.path().join("mnt"));
        let before = device.bytes();
        restore_efi(device.path(), &[]).exits(1).says("mounted or otherwise in use").says("--force");
        assert!(device.bytes() == before, "mounted");
        // The file below a mounted loop device is in use as well.
        restore_efi(&dir.path().join("disk"), &[]).exits(1).says("uses it");
        assert!(device.bytes() == before, "the file below");
        restore_efi(device.path(), &["--force"]).exits(0);
        assert_eq!(sha256(&device.bytes()[..EFI_SIZE]), EFI, "--force");
    }
    {
        let above = LoopDevice::over(device.path());
        let before = device.bytes();
        restore_efi(device.path(), &[]).exits(1).says(&format!("loop device {} uses it", text(above.path())));
        assert!(device.bytes() == before, "below a loop device");
    }
    restore_efi(device.path(), &[]).exits(0);
}

#[test]
fn refuses_an_active_swap_device() {
    if !loop_devices() {
        return;
    }
    require!("mkswap", "swapon", "swapoff");
    let dir = tempdir();
    let device = LoopDevice::holding(&dir.path().join("disk"), &vec![0; EFI_SIZE + TOLERANCE]);
    oracles::run("mkswap", &["-q", text(device.path())]);
    let swapon = std::process::Command::new("swapon").arg(device.path()).output().unwrap();
    if !swapon.status.success() {
        // A container with loop devices may still forbid swapping. The test with a mounted device covers the
        // same check.
        oracles::unable(&format!("this user may not swap: {swapon:?}"), false);
        return;
    }
    let run = restore_efi(device.path(), &[]);
    oracles::run("swapoff", &[text(device.path())]);
    run.exits(1).says("in use");
}

#[test]
fn refuses_an_image_locked_by_qemu_without_force() {
    require!("qemu-io");
    let dir = tempdir();
    let file = dir.path().join("disk.raw");
    let old = noise(10, EFI_SIZE);
    std::fs::write(&file, &old).unwrap();
    // qemu-io waits for commands on its standard input, with the image open and locked.
    let mut machine = std::process::Command::new("qemu-io")
        .args(["-f", "raw", text(&file)])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 8];
    std::io::Read::read_exact(machine.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let run = restore_efi(&file, &[]);
    let now = std::fs::read(&file).unwrap();
    let forced = restore_efi(&file, &["--force"]);
    drop(machine.stdin.take());
    machine.wait().unwrap();
    run.exits(1).says("has locked it").says("--force");
    assert!(now == old, "nothing was written");
    forced.exits(0);
    assert_eq!(sha256(&std::fs::read(&file).unwrap()), EFI);
}

/// QEMU's programs lock the node of a device like a file.
#[test]
fn refuses_a_device_that_qemu_writes() {
    require!("qemu-io");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let device = LoopDevice::holding(&dir.path().join("disk"), &noise(11, 1 << 20));
    let mut machine = std::process::Command::new("qemu-io")
        .args(["-f", "raw", text(device.path())])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(machine.stdout.as_mut().unwrap(), &mut [0; 8]).unwrap();
    let copy = dir.path().join("copy.raw");
    let line = ["convert", "-f", "raw", text(device.path()), "--to", "raw", text(&copy)];
    let refused = imgtool(line).go();
    let shared = imgtool(line).args(["-U"]).go();
    drop(machine.stdin.take());
    machine.wait().unwrap();
    refused.exits(1).says("may write it").says("-U");
    shared.exits(0).says("was in use");
    std::fs::remove_file(&copy).unwrap();
    imgtool(line).ok();
}
