//! A source is never a target, under any name, and no file is two targets. The program refuses both before it
//! opens anything for writing.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, oracles, require, snapshot, tempdir, text};

use crate::support::devices::{LoopDevice, Mounted, loop_devices};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Runs a shell line in which `$IMGTOOL` is the program. Asserts that it exits with `code`, prints each of
/// `words`, changes nothing in `directory`, and opens nothing for writing.
#[track_caller]
fn refused(directory: &Path, line: &str, code: i32, words: &[&str]) {
    let before = snapshot(directory);
    let log = tempfile::NamedTempFile::new().unwrap();
    let traced = format!(
        "strace -f -o {} -e trace=open,openat,openat2,creat,mkdir,mkdirat {PROGRAM}",
        text(log.path())
    );
    let output = Command::new("bash")
        .args(["-c", line])
        .env("IMGTOOL", traced)
        .current_dir(directory)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}\n{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no '{word}': {line}\n{stderr}");
    }
    assert_eq!(snapshot(directory), before, "{line}");
    let trace = std::fs::read_to_string(log.path()).unwrap();
    let writing = |call: &&str| {
        let for_writing =
            ["O_WRONLY", "O_RDWR", "O_CREAT", "creat(", "mkdir"].iter().any(|flag| call.contains(flag));
        // The C library and the Rust runtime open these files for themselves.
        for_writing
            && !call.contains("\"/dev/null\"")
            && !call.contains("\"/proc/")
            && !call.contains("\"/sys/")
    };
    let opened: Vec<&str> = trace.lines().filter(writing).collect();
    assert!(opened.is_empty(), "{line}: {opened:?}");
}

fn with_image() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 2 << 20).with(70_000, images::noise(1, 1 << 20)).write_raw(&dir.path().join("disk.raw"));
    dir
}

#[test]
fn refuses_the_source_as_target_under_any_name() {
    require!("strace");
    let dir = with_image();
    symlink("disk.raw", dir.path().join("soft")).unwrap();
    std::fs::hard_link(dir.path().join("disk.raw"), dir.path().join("hard")).unwrap();
    for to in ["raw", "qcow2", "vhdx", "vma"] {
        for (source, target) in [
            ("disk.raw", "disk.raw"),
            ("disk.raw", "./disk.raw"),
            ("disk.raw", "soft"),
            ("disk.raw", "hard"),
            ("soft", "disk.raw"),
            ("hard", "disk.raw"),
            ("/proc/self/cwd/disk.raw", "disk.raw"),
            ("disk.raw", "/proc/self/cwd/./disk.raw"),
            ("/proc/self/fd/7", "disk.raw"),
            ("disk.raw", "/proc/self/fd/7"),
            ("- < disk.raw", "disk.raw"),
            ("/dev/stdin < disk.raw", "hard"),
        ] {
            let line = format!("$IMGTOOL convert --force {source} --to {to} {target} 7< disk.raw");
            refused(dir.path(), &line, 1, &["same file"]);
        }
    }
    for line in [
        "$IMGTOOL convert -n disk.raw --to raw hard",
        "$IMGTOOL convert -n - --to raw disk.raw < disk.raw",
        "$IMGTOOL convert disk.raw --target disk=soft",
        "$IMGTOOL convert disk.raw --to raw - >> hard",
        "$IMGTOOL convert disk.raw --to vma - 1<> disk.raw",
    ] {
        refused(dir.path(), line, 1, &["same file"]);
    }
}

/// A file of an overlay and the file of the layer that stores it have different device and inode numbers.
#[test]
fn treats_an_overlay_file_and_its_layer_file_as_one() {
    require!("strace");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let (first, second) = (path("lower1"), path("lower2"));
    let mounted = Mounted::overlay(&[&first, &second], &path("upper"), &path("work"), &path("merged"));
    let Some(_mounted) = mounted else { return };
    let disk = |name: &str, seed| {
        let image = Image::hole("x", 2 << 20).with(70_000, images::noise(seed, 1 << 20));
        image.write_raw(&path(name));
    };
    disk("lower1/first", 1);
    disk("lower2/second", 2);
    disk("merged/new", 3);
    // Shadowed by the upper layer since it is written.
    disk("lower2/copied", 4);
    std::fs::File::options().append(true).open(path("merged/copied")).unwrap().set_len(3 << 20).unwrap();
    std::fs::create_dir(path("bound")).unwrap();
    oracles::run("mount", &["--bind", text(&path("merged")), text(&path("bound"))]);
    let bound = Unmount(path("bound"));
    for (source, target) in [
        ("merged/new", "upper/new"),
        ("upper/new", "merged/new"),
        ("bound/new", "upper/new"),
        ("upper/new", "bound/new"),
        ("merged/copied", "upper/copied"),
        ("upper/copied", "merged/copied"),
        ("merged/first", "lower1/first"),
        ("merged/second", "lower2/second"),
        ("- < merged/new", "upper/new"),
        ("- < upper/new", "merged/new"),
    ] {
        for line in [
            format!("$IMGTOOL convert -f raw -n --force {source} --to raw {target}"),
            format!("$IMGTOOL convert -f raw --force {source} --to qcow2 {target}"),
        ] {
            refused(dir.path(), &line, 1, &["change the source"]);
        }
    }
    refused(
        dir.path(),
        "$IMGTOOL create -f qcow2 --force -b ../merged/new -F raw upper/new",
        1,
        &["change the source"],
    );
    refused(
        dir.path(),
        "$IMGTOOL convert -f raw merged/new --to raw - 1<> upper/new",
        1,
        &["change the source"],
    );
    // A loop device over one of the two leads to the other as well.
    for (under, other) in
        [("merged/new", "upper/new"), ("upper/new", "merged/new"), ("merged/copied", "upper/copied")]
    {
        let device = LoopDevice::over(&path(under));
        for (source, target) in [(other, text(device.path())), (text(device.path()), other)] {
            let line = format!("$IMGTOOL convert -f raw -n {source} --to raw {target}");
            refused(dir.path(), &line, 1, &["source"]);
        }
    }
    // Another file of the same overlay is another file, and a write to the overlay leaves the lower layers.
    imgtool(["convert", "-f", "raw", "-n", "merged/new", "--to", "raw", "upper/copied", "--force"])
        .within(dir.path())
        .ok();
    let before = std::fs::read(path("lower1/first")).unwrap();
    imgtool(["convert", "-f", "raw", "-n", "upper/new", "--to", "raw", "merged/first"])
        .within(dir.path())
        .ok();
    assert!(std::fs::read(path("lower1/first")).unwrap() == before);
    drop(bound);
}

/// The program notes that it compared nothing if it can't see the layers of an overlay.
#[test]
fn notes_overlay_layers_that_it_can_not_see() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let (lower, upper) = (path("layers/lower"), path("layers/upper"));
    let mounted = Mounted::overlay(&[&lower], &upper, &path("layers/work"), &path("merged"));
    let Some(_mounted) = mounted else { return };
    std::fs::write(path("merged/old"), vec![1; 1 << 20]).unwrap();
    std::fs::write(path("disk.raw"), vec![2; 1 << 20]).unwrap();
    let line = ["convert", "-f", "raw", "-n", "disk.raw", "--to", "raw", "merged/old"];
    assert!(!imgtool(line).within(dir.path()).ok().stderr.contains("could be the source"));
    // The path of the layers leads elsewhere from here on, as in a container.
    std::fs::rename(path("layers"), path("moved")).unwrap();
    imgtool(line).within(dir.path()).ok().says("merged/old could be the source disk.raw");
    std::fs::write(path("merged/other"), vec![3; 1 << 20]).unwrap();
    let line = ["convert", "-f", "raw", "-n", "merged/other", "--to", "raw", "merged/old"];
    assert!(!imgtool(line).within(dir.path()).ok().stderr.contains("could be the source"));
    let line = ["convert", "-f", "raw", "disk.raw", "--to", "raw", "merged/new"];
    assert!(!imgtool(line).within(dir.path()).ok().stderr.contains("could be the source"));
}

/// A mount point that is unmounted when dropped.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn refuses_backing_images_and_data_files_as_targets() {
    require!("strace", "qemu-img");
    let dir = with_image();
    for line in [
        "convert -q -f raw -O qcow2 disk.raw base.qcow2",
        "create -q -f qcow2 -F qcow2 -b base.qcow2 middle.qcow2",
        "create -q -f qcow2 -F qcow2 -b middle.qcow2 top.qcow2",
        "convert -q -f raw -O qcow2 -o data_file=data.bin disk.raw external.qcow2",
    ] {
        let done = Command::new("qemu-img").args(line.split(' ')).current_dir(dir.path()).status();
        assert!(done.is_ok_and(|status| status.success()), "{line}");
    }
    for line in [
        "$IMGTOOL convert --force --allow-external chain top.qcow2 --to raw middle.qcow2",
        "$IMGTOOL convert --force --allow-external chain top.qcow2 --to raw base.qcow2",
        "$IMGTOOL convert --force --allow-external chain external.qcow2 --to raw data.bin",
        "$IMGTOOL convert --force --to qcow2 -B base.qcow2 -F qcow2 disk.raw base.qcow2",
    ] {
        refused(dir.path(), line, 1, &["same file"]);
    }
}

#[test]
fn refuses_one_file_as_two_targets() {
    require!("strace");
    let dir = tempdir();
    std::fs::write(dir.path().join("old"), b"old").unwrap();
    std::fs::hard_link(dir.path().join("old"), dir.path().join("same")).unwrap();
    symlink("old", dir.path().join("link")).unwrap();
    let source = fixture("two-disks.vma.zst");
    for (a, b) in [("new", "new"), ("new", "./new"), ("old", "same"), ("old", "link"), ("link", "same")] {
        let line = format!(
            "$IMGTOOL convert --force '{}' --to qcow2 --target drive-scsi0={a},format=qcow2 --target drive-efidisk0={b},format=qcow2",
            text(&source)
        );
        refused(dir.path(), &line, 2, &["two outputs"]);
    }
}

#[test]
fn refuses_existing_outputs_before_creating_any() {
    require!("strace");
    let dir = tempdir();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let source = fixture("two-disks.vma.zst");
    for taken in ["drive-efidisk0.raw", "drive-scsi0.raw", "qemu-server.conf"] {
        std::fs::write(out.join(taken), b"precious").unwrap();
        refused(
            dir.path(),
            &format!("$IMGTOOL convert '{}' --to raw out", text(&source)),
            1,
            &[taken, "already exists"],
        );
        std::fs::remove_file(out.join(taken)).unwrap();
    }
}

#[test]
fn treats_a_loop_device_and_its_file_as_one() {
    require!("strace");
    if !loop_devices() {
        return;
    }
    let dir = with_image();
    let device = LoopDevice::over(&dir.path().join("disk.raw"));
    let device = text(device.path());
    for line in [
        format!("$IMGTOOL convert --force {device} --to raw disk.raw"),
        format!("$IMGTOOL convert --force {device} --to qcow2 disk.raw"),
        format!("$IMGTOOL convert -n --force disk.raw --to raw {device}"),
        format!("$IMGTOOL convert -n --force disk.raw --to qcow2 {device}"),
    ] {
        refused(dir.path(), &line, 1, &["change the source"]);
    }
    refused(
        dir.path(),
        &format!("$IMGTOOL convert -n --force {device} --to raw {device}"),
        1,
        &["same file"],
    );
}

#[test]
fn partition_overlaps_its_disk_but_not_another_partition() {
    require!("strace", "addpart");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let image = Image::hole("disk", 4 << 20).with(1 << 20, images::noise(1, 1 << 20));
    image.write_raw(&dir.path().join("disk.raw"));
    let disk = LoopDevice::with_partitions(&dir.path().join("disk.raw"), &[(2048, 2048), (4096, 2048)]);
    let disk = text(disk.path());
    let (first, second) = (format!("{disk}p1"), format!("{disk}p2"));
    if !Path::new(&second).exists() {
        oracles::unable("nobody makes device files for partitions here", false);
        return;
    }
    for (source, target) in [(&*first, disk), (disk, &first), (&first, "disk.raw"), ("disk.raw", &first)] {
        let line = format!("$IMGTOOL convert -f raw -n --force {source} --to raw {target}");
        refused(dir.path(), &line, 1, &["change the source"]);
    }
    refused(
        dir.path(),
        &format!("$IMGTOOL convert -f raw -n --force {first} --to raw {first}"),
        1,
        &["same file"],
    );
    // Two partitions of one disk share nothing.
    imgtool(["convert", "-f", "raw", "-n", &first, "--to", "raw", &second]).ok();
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&second).unwrap());
}
