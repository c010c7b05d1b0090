//! Targets that exist, without -n: block devices, empty files, and single files at mount points.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image, noise};
use imgtool_testing::oracles::{self, qemu_info, run_in, try_run_in};
use imgtool_testing::{assert_same, names, require, tempdir, text};

use crate::support::devices::{LoopDevice, Mounted, loop_devices, may_administer};
use crate::support::imgtool;

const DISK: usize = 3 << 20;

/// Writes a disk of 3 MiB with a hole in its middle as `disk.raw` and returns its content.
fn disk_in(directory: &Path) -> Vec<u8> {
    let mut bytes = noise(3, DISK);
    bytes[1 << 20..2 << 20].fill(0);
    std::fs::write(directory.join("disk.raw"), &bytes).unwrap();
    bytes
}

/// Runs qemu-img and imgtool with the same arguments, but for the target. Both exit codes must be `code`.
#[track_caller]
fn both(directory: &Path, line: &[&str], targets: [&Path; 2], more: &[&str], code: i32) {
    let [theirs, ours] = targets.map(|target| [line, &[text(target)], more].concat());
    assert_eq!(try_run_in("qemu-img", directory, &theirs).0, code, "{line:?}");
    imgtool(ours).within(directory).go().exits(code);
}

#[test]
fn a_device_takes_a_new_image_as_from_qemu_img() {
    require!("qemu-img");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let disk = disk_in(dir.path());
    let device = |name: &str, len: usize| LoopDevice::holding(&dir.path().join(name), &noise(9, len));
    for more in [0, 1 << 20] {
        let (theirs, ours) = (device("theirs", DISK + more), device("ours", DISK + more));
        both(dir.path(), &["convert", "-O", "raw", "disk.raw"], [theirs.path(), ours.path()], &[], 0);
        let found = ours.bytes();
        assert!(found[..DISK] == disk && found == theirs.bytes(), "{more}: content and tail");
    }
    let (theirs, ours) = (device("theirs", 8 << 20), device("ours", 8 << 20));
    for format in ["qcow2", "vdi"] {
        both(dir.path(), &["convert", "-O", format, "disk.raw"], [theirs.path(), ours.path()], &[], 0);
        run_in("qemu-img", dir.path(), &["compare", "-F", format, "disk.raw", text(ours.path())]);
    }
    let (theirs, ours) = (device("theirs", DISK - 512), device("ours", DISK - 512));
    let old = ours.bytes();
    both(dir.path(), &["convert", "-O", "raw", "disk.raw"], [theirs.path(), ours.path()], &[], 1);
    assert!(ours.bytes() == old, "too small");
}

#[test]
fn a_device_in_use_or_much_larger_needs_force() {
    if !loop_devices() {
        return;
    }
    require!("mkfs.ext4", "mount");
    let dir = tempdir();
    let disk = disk_in(dir.path());
    let device = LoopDevice::holding(&dir.path().join("device"), &noise(9, DISK + (5 << 20)));
    let old = device.bytes();
    let line = ["convert", "--to", "raw", "disk.raw", text(device.path())];
    imgtool(line).within(dir.path()).go().exits(1).says("much larger").says("--force");
    assert!(device.bytes() == old);
    {
        let _mounted = Mounted::ext4_read_only(&device, &dir.path().join("mnt"));
        let old = device.bytes();
        for line in [
            &["convert", "--to", "qcow2", "disk.raw", text(device.path())][..],
            &["create", "-f", "qcow2", text(device.path()), "1M"],
            &["create", "-f", "raw", text(device.path()), "7M"],
        ] {
            imgtool(line).within(dir.path()).go().exits(1).says("mounted or otherwise in use");
        }
        assert!(device.bytes() == old);
    }
    imgtool(line).args(["--force"]).within(dir.path()).ok();
    assert!(device.bytes()[..DISK] == disk);
    // Formats that end with their tables or hold a machine are no content of a device.
    let old = device.bytes();
    for format in ["vmdk", "vpc", "vma"] {
        let line = ["convert", "--to", format, "disk.raw", text(device.path())];
        imgtool(line).within(dir.path()).go().exits(1).says("is a block device");
    }
    imgtool(["convert", "-c", "--to", "vma", "disk.raw", text(device.path())])
        .within(dir.path())
        .go()
        .exits(1);
    assert!(device.bytes() == old);
}

#[test]
fn a_file_under_a_loop_device_is_not_replaced() {
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    disk_in(dir.path());
    let target = dir.path().join("target");
    let old = noise(9, DISK);
    let device = LoopDevice::holding(&target, &old);
    let inode = target.metadata().unwrap().ino();
    let lines: [&[&str]; 4] = [
        &["convert", "--force", "--to", "raw", "disk.raw", "target"],
        &["create", "--force", "-f", "raw", "target", "3M"],
        &["--compat", "convert", "-O", "qcow2", "disk.raw", "target"],
        &["--compat", "create", "-f", "raw", "target", "3M"],
    ];
    for line in lines {
        imgtool(line).within(dir.path()).go().exits(1).says("uses it").says(text(device.path()));
        assert_eq!(target.metadata().unwrap().ino(), inode, "{line:?}");
    }
    assert!(device.bytes() == old);
    drop(device);
    imgtool(lines[0]).within(dir.path()).ok();
    assert_ne!(target.metadata().unwrap().ino(), inode);
}

#[test]
fn a_source_that_is_mounted_for_writing_gets_a_note() {
    if !loop_devices() {
        return;
    }
    require!("mkfs.ext4", "mount");
    let dir = tempdir();
    let file = dir.path().join("disk");
    let device = LoopDevice::holding(&file, &vec![0; 16 << 20]);
    oracles::run("mkfs.ext4", &["-q", "-F", text(device.path())]);
    let point = dir.path().join("mnt");
    let read = |source: &Path| {
        imgtool(["convert", "--force", "-f", "raw", "-O", "raw", text(source), "out"]).within(dir.path()).ok()
    };
    {
        let _mounted = Mounted::ext4_read_only(&device, &point);
        for source in [&*file, device.path()] {
            assert!(!read(source).stderr.contains("mounted for writing"));
        }
    }
    let _mounted = Mounted::ext4(&device, &point);
    for source in [&*file, device.path()] {
        read(source).says("mounted for writing").says(text(&point));
    }
}

#[test]
fn an_empty_image_is_created_on_a_device() {
    require!("qemu-img");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let device = |name: &str| LoopDevice::holding(&dir.path().join(name), &noise(9, 2 << 20));
    let (theirs, ours) = (device("theirs"), device("ours"));
    both(dir.path(), &["create", "-q", "-f", "qcow2"], [theirs.path(), ours.path()], &["40G"], 0);
    assert_eq!(qemu_info(ours.path(), "qcow2")["virtual-size"], 40u64 << 30);
    run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", text(ours.path())]);
    both(dir.path(), &["create", "-q", "-f", "raw"], [theirs.path(), ours.path()], &["4M"], 1);
    both(dir.path(), &["create", "-q", "-f", "raw"], [theirs.path(), ours.path()], &["2M"], 0);
    assert!(ours.bytes() == vec![0; 2 << 20], "an empty disk reads as zeros");
}

#[test]
fn an_empty_file_is_no_conflict_and_keeps_mode_and_owner() {
    require!("qemu-img");
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let dir = tempdir();
        disk_in(dir.path());
        let targets = ["theirs", "ours"].map(|name| dir.path().join(name));
        let [theirs, ours] = targets.each_ref().map(std::path::PathBuf::as_path);
        for target in &targets {
            std::fs::write(target, "").unwrap();
            std::fs::set_permissions(target, std::fs::Permissions::from_mode(0o604)).unwrap();
            if may_administer() {
                chown(target, Some(12_345), Some(54_321)).unwrap();
            }
        }
        let before = std::fs::metadata(ours).unwrap();
        if format == "vma" {
            imgtool(["convert", "--to", format, "disk.raw", text(ours)]).within(dir.path()).ok();
        } else {
            both(dir.path(), &["convert", "-O", format, "disk.raw"], [theirs, ours], &[], 0);
            run_in("qemu-img", dir.path(), &["compare", "-F", format, "disk.raw", "ours"]);
        }
        let after = std::fs::metadata(ours).unwrap();
        let facts = |meta: &std::fs::Metadata| (meta.mode(), meta.uid(), meta.gid());
        assert_eq!(facts(&before), facts(&after), "{format}");
        // What has content needs a permission.
        imgtool(["convert", "--to", format, "disk.raw", text(ours)]).within(dir.path()).go().exits(1);
        assert_eq!(names(dir.path()), ["disk.raw", "ours", "theirs"], "{format}");
    }
    let dir = tempdir();
    disk_in(dir.path());
    std::fs::write(dir.path().join("x.raw"), "").unwrap();
    imgtool(["convert", "a=disk.raw", "--target", "a=x.raw"]).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("x.raw"), "--target");
    std::fs::write(dir.path().join("x.qcow2"), "").unwrap();
    imgtool(["create", "x.qcow2", "1M"]).within(dir.path()).ok();
    imgtool(["create", "x.qcow2", "1M"]).within(dir.path()).go().exits(1).says("already exists");
}

/// Another user could otherwise read what the superuser writes to a name in /tmp.
#[test]
fn an_empty_file_of_another_user_in_a_shared_directory_is_a_conflict() {
    if !may_administer() {
        imgtool_testing::oracles::unable("only the superuser can give files away", false);
        return;
    }
    let dir = tempdir();
    disk_in(dir.path());
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("x.raw"), "").unwrap();
    chown(shared.join("x.raw"), Some(12_345), Some(54_321)).unwrap();
    let line = ["convert", "disk.raw", "shared/x.raw"];
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
    imgtool(line).within(dir.path()).go().exits(1).says("already exists");
    imgtool(line).args(["--force"]).within(dir.path()).ok();
    assert_ne!(std::fs::metadata(shared.join("x.raw")).unwrap().uid(), 12_345);
}

#[test]
fn a_file_that_is_filled_meanwhile_keeps_its_content() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    let target = dir.path().join("x.qcow2");
    std::fs::write(&target, "").unwrap();
    let mut run = imgtool(["convert", "-r", "4M", "disk.raw", "x.qcow2"]).within(dir.path()).start();
    let began = Instant::now();
    while names(dir.path()).len() < 3 && began.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::write(&target, "precious").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    assert_eq!(names(dir.path()), ["disk.raw", "x.qcow2"]);
}

/// Mounts the single file `inner` over the file `x` in `directory`, as container engines do.
fn single_file(directory: &Path, content: &[u8]) -> Option<Mounted> {
    std::fs::write(directory.join("inner"), content).unwrap();
    std::fs::write(directory.join("x"), "").unwrap();
    Mounted::bind(&directory.join("inner"), &directory.join("x"))
}

#[test]
fn a_single_file_at_a_mount_point_is_written_in_place() {
    require!("qemu-img");
    for format in ["raw", "qcow2", "vhdx"] {
        let dir = tempdir();
        disk_in(dir.path());
        let Some(_mounted) = single_file(dir.path(), b"") else { return };
        let before = std::fs::metadata(dir.path().join("x")).unwrap();
        let line = ["convert", "--verify", "--to", format, "disk.raw", "x"];
        imgtool(line).within(dir.path()).ok().says("is a mount point and was written in place");
        assert_eq!(before.ino(), std::fs::metadata(dir.path().join("inner")).unwrap().ino());
        run_in("qemu-img", dir.path(), &["compare", "-F", format, "disk.raw", "inner"]);
        imgtool(["convert", "--to", "raw", "disk.raw", "new.raw"]).within(dir.path()).ok();
        if format == "raw" {
            assert_same(&dir.path().join("new.raw"), &dir.path().join("inner"), "the same bytes");
        }
        imgtool(line).within(dir.path()).go().exits(1).says("already exists");
        imgtool(line).args(["--force"]).within(dir.path()).ok();
        assert_eq!(names(dir.path()), ["disk.raw", "inner", "new.raw", "x"]);
    }
}

#[test]
fn a_failure_at_a_mount_point_leaves_an_empty_file() {
    require!("gzip");
    let dir = tempdir();
    let image = Image::hole("x", 4 << 20).with(0, noise(1, 4 << 20));
    image.write_raw(&dir.path().join("disk.raw"));
    run_in("gzip", dir.path(), &["-k", "disk.raw"]);
    let cut = std::fs::read(dir.path().join("disk.raw.gz")).unwrap();
    std::fs::write(dir.path().join("cut.raw.gz"), &cut[..cut.len() / 2]).unwrap();
    let Some(_mounted) = single_file(dir.path(), b"") else { return };
    let is_empty = || std::fs::metadata(dir.path().join("x")).unwrap().len() == 0;
    let run = imgtool(["convert", "cut.raw.gz", "x"]).within(dir.path()).go().ends_with(1);
    assert!(is_empty() && !run.stderr.contains("in place"), "{}", run.stderr);
    // With content, the loss is reported.
    std::fs::write(dir.path().join("x"), "old").unwrap();
    imgtool(["convert", "cut.raw.gz", "x"]).within(dir.path()).go().exits(1).says("already exists");
    let run = imgtool(["convert", "--force", "cut.raw.gz", "x"]).within(dir.path()).go().ends_with(1);
    run.says("was overwritten in place and is now incomplete");
    assert!(is_empty());
    let mut run = imgtool(["convert", "-r", "1M", "disk.raw", "x"]).within(dir.path()).start();
    let began = Instant::now();
    while is_empty() && began.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!is_empty(), "nothing was written");
    assert!(Command::new("kill").arg(run.id().to_string()).status().unwrap().success());
    assert!(!run.wait().unwrap().success());
    assert!(is_empty(), "after a signal");
}

/// The images of an archive are checked like a single one: nothing else changes in the directory.
#[test]
fn only_the_empty_ones_of_several_files_are_no_conflict() {
    let dir = tempdir();
    images::every_mask().write_raw(&dir.path().join("disk.raw"));
    imgtool(["convert", "a=disk.raw", "b=disk.raw", "vm.vma"]).within(dir.path()).ok();
    std::fs::create_dir(dir.path().join("out")).unwrap();
    std::fs::write(dir.path().join("out/a.raw"), "").unwrap();
    std::fs::write(dir.path().join("out/b.raw"), "old").unwrap();
    let line = ["convert", "vm.vma", "--to", "raw", "out/"];
    imgtool(line).within(dir.path()).go().exits(1).says("out/b.raw").says("already exists");
    std::fs::write(dir.path().join("out/b.raw"), "").unwrap();
    imgtool(line).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("out/b.raw"), "b");
}
