//! Several sources as one disk (--join), beside `qemu-img convert A B DEST`.

use std::path::Path;

use imgtool_testing::images::noise;
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{names, require, sha256_file, snapshot, tempdir, text};

use crate::support::imgtool;

/// Makes disks of odd lengths, with holes, in several formats.
fn scene(directory: &Path) {
    let raw = |name: &str, len: usize| {
        let mut bytes = noise(len as u64, len);
        bytes[len / 3..len / 2].fill(0);
        std::fs::write(directory.join(name), bytes).unwrap();
    };
    raw("a.raw", 700);
    raw("b.raw", 1025);
    raw("c.raw", (2 << 20) + 70_001);
    raw("d.raw", 3 << 20);
    std::fs::write(directory.join("empty.raw"), "").unwrap();
    run_in("qemu-img", directory, &["convert", "-O", "qcow2", "-c", "d.raw", "d.qcow2"]);
    run_in("qemu-img", directory, &["convert", "-O", "vmdk", "c.raw", "c.vmdk"]);
    std::fs::File::create(directory.join("hole.raw")).unwrap().set_len(5 << 20).unwrap();
}

#[test]
fn joins_sources_like_qemu_img() {
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path());
    for sources in [
        &["a.raw", "b.raw"][..],
        &["b.raw", "a.raw", "a.raw"],
        &["c.raw", "hole.raw", "d.qcow2"],
        &["d.qcow2", "c.vmdk", "empty.raw", "b.raw"],
        &["c.raw"],
    ] {
        for format in ["raw", "qcow2", "vhdx"] {
            let line = |target| [&["convert", "-O", format], sources, &[target]].concat();
            run_in("qemu-img", dir.path(), &line("theirs"));
            let ours = imgtool(line("ours")).args(["--join", "--verify"]).within(dir.path());
            ours.ok();
            run_in("qemu-img", dir.path(), &["compare", "-f", format, "-F", format, "theirs", "ours"]);
            if format == "raw" {
                assert_eq!(sha256_file(&dir.path().join("theirs")), sha256_file(&dir.path().join("ours")));
            }
            std::fs::remove_file(dir.path().join("ours")).unwrap();
        }
    }
}

/// A pipe is copied to temporary storage first; the bytes are the same, and so they are for all numbers of threads.
#[test]
fn the_output_does_not_depend_on_the_way_in() {
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path());
    let line = ["convert", "--join", "--to", "qcow2", "c.raw", "d.raw", "x.qcow2"];
    imgtool(line).within(dir.path()).ok();
    for threads in ["1", "3"] {
        let line = ["convert", "--join", "--to", "qcow2", "-m", threads, "-", "d.raw", "y.qcow2"];
        imgtool(line).pipe_from(&dir.path().join("c.raw")).within(dir.path()).ok();
        assert_eq!(sha256_file(&dir.path().join("x.qcow2")), sha256_file(&dir.path().join("y.qcow2")));
        std::fs::remove_file(dir.path().join("y.qcow2")).unwrap();
    }
}

#[test]
fn what_can_not_be_joined_is_refused() {
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path());
    imgtool(["convert", "x=a.raw", "y=b.raw", "two.vma"]).within(dir.path()).ok();
    std::fs::copy(dir.path().join("d.qcow2"), dir.path().join("base.qcow2")).unwrap();
    let before = snapshot(dir.path());
    let run = |line: &[&str]| imgtool([&["convert", "--join"], line].concat()).within(dir.path()).go();
    // As for qemu-img.
    for line in [
        &["-l", "s", "d.qcow2", "d.qcow2", "x.raw"][..],
        &["-B", "base.qcow2", "-F", "qcow2", "-O", "qcow2", "a.raw", "b.raw", "x.qcow2"],
    ] {
        assert_eq!(try_run_in("qemu-img", dir.path(), &[&["convert"], line].concat()).0, 1);
        run(line).exits(2).says("joined");
    }
    run(&["two.vma", "a.raw", "x.raw"]).exits(1).says("an image to join has 2 devices");
    run(&["--bitmaps", "-O", "qcow2", "d.qcow2", "d.qcow2", "x.qcow2"]).exits(2).says("bitmaps");
    run(&["a.raw", "missing.raw", "x.raw"]).exits(1).says("missing.raw");
    run(&["--force", "a.raw", "b.raw", "b.raw"]).exits(1).says("same file");
    // Without the flag, nothing is joined, and the flag is named.
    imgtool(["convert", "a.raw", "b.raw", "x.raw"]).within(dir.path()).go().exits(2).says("--join");
    // Damage is reported in its file.
    let cut = std::fs::read(dir.path().join("d.qcow2")).unwrap();
    std::fs::write(dir.path().join("cut.qcow2"), &cut[..cut.len() / 2]).unwrap();
    run(&["a.raw", "cut.qcow2", "x.raw"]).exits(1).says("cut.qcow2");
    std::fs::remove_file(dir.path().join("cut.qcow2")).unwrap();
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_joined_disk_goes_into_archives_and_devices_that_exist() {
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path());
    let run = |line: &[&str]| imgtool(line).within(dir.path()).ok();
    run_in("qemu-img", dir.path(), &["convert", "c.raw", "d.raw", "expected.raw"]);
    run(&["convert", "--join", "c.raw", "d.raw", "vm.vma"]);
    run(&["compare", "vm.vma", "expected.raw"]);
    let len = std::fs::metadata(dir.path().join("expected.raw")).unwrap().len();
    std::fs::write(dir.path().join("there"), vec![7; len as usize]).unwrap();
    run(&["convert", "--join", "-n", "-O", "raw", "c.raw", "d.raw", text(&dir.path().join("there"))]);
    assert_eq!(sha256_file(&dir.path().join("there")), sha256_file(&dir.path().join("expected.raw")));
    assert!(names(dir.path()).iter().all(|name| !name.contains("partial")));
}
