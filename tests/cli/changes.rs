//! `check -r` and `resize`, which change an image in place.

use imgtool_testing::oracles::{qemu_info, run_in};
use imgtool_testing::{require, tempdir};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

#[test]
fn resize_takes_sizes_and_differences() {
    require!("qemu-img", "qemu-io");
    for format in ["qcow2", "raw"] {
        let dir = tempdir();
        run_in("qemu-img", dir.path(), &["create", "-q", "-f", format, "x", "10M"]);
        run_in("qemu-io", dir.path(), &["-f", format, "-c", "write -P 3 4M 1M", "x"]);
        let size = || qemu_info(&dir.path().join("x"), format)["virtual-size"].as_u64().unwrap() >> 20;
        let resize = |line: &[&str]| imgtool(["resize", "x"]).args(line).within(dir.path()).go();
        resize(&["20M"]).exits(0);
        assert_eq!(size(), 20);
        resize(&["+4M"]).exits(0);
        assert_eq!(size(), 24);
        resize(&["-8M"]).exits(0);
        assert_eq!(size(), 16);
        resize(&["4608k"]).exits(1).says("--shrink");
        assert_eq!(size(), 16);
        resize(&["4M", "--shrink"]).exits(0);
        assert_eq!(size(), 4);
        resize(&["--", "-5M"]).exits(2).says("can't change by that much");
        resize(&["lots"]).exits(2).says("expected a size");
    }
}

#[test]
fn other_formats_keep_their_size() {
    require!("qemu-img");
    let dir = tempdir();
    run_in("qemu-img", dir.path(), &["create", "-q", "-f", "vhdx", "x", "10M"]);
    imgtool(["resize", "x", "20M"]).within(dir.path()).go().exits(1).says("vhdx images can't be resized");
}

#[test]
fn check_repairs_leaks() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    run_in("qemu-img", dir.path(), &["create", "-q", "-f", "qcow2", "x", "10M"]);
    run_in("qemu-io", dir.path(), &["-c", "write -P 3 4M 1M", "x"]);
    let path = dir.path().join("x");
    let mut image = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    // Clusters 40 and 41 are not in use, but in the file.
    image.resize(50 << 16, 0);
    image[block + 81] = 1;
    image[block + 83] = 1;
    std::fs::write(&path, &image).unwrap();
    imgtool(["check", "x"]).within(dir.path()).go().exits(3);
    let said = imgtool(["check", "-r", "leaks", "x"]).within(dir.path()).ok().text();
    assert!(said.contains("2 leaked clusters"), "{said}");
    run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", "x"]);
    std::fs::write(&path, &image).unwrap();
    let found = imgtool(["check", "-r", "all", "--output", "json", "x"]).within(dir.path()).ok().json();
    assert_eq!((&found["leaks-fixed"], &found["corruptions-fixed"]), (&2.into(), &0.into()));
    imgtool(["check", "-r", "leaks", "x.raw"]).within(dir.path()).go().exits(1);
}

/// A refcount that falls to one makes the copied flag of its entry wrong.
#[test]
fn leaks_of_a_lost_snapshot_are_repaired_without_new_errors() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    run_in("qemu-img", dir.path(), &["create", "-q", "-f", "qcow2", "x", "10M"]);
    run_in("qemu-io", dir.path(), &["-c", "write -P 3 4M 1M", "x"]);
    run_in("qemu-img", dir.path(), &["snapshot", "-c", "lost", "x"]);
    let path = dir.path().join("x");
    let mut image = std::fs::read(&path).unwrap();
    // Number of snapshots.
    image[60..64].fill(0);
    // An autoclear feature that nobody knows.
    image[88] |= 0x80;
    std::fs::write(&path, &image).unwrap();
    imgtool(["check", "x"]).within(dir.path()).go().exits(3);
    imgtool(["check", "-r", "leaks", "x"]).within(dir.path()).ok();
    run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", "x"]);
    run_in("qemu-io", dir.path(), &["-c", "read -P 3 4M 1M", "x"]);
    assert_eq!(std::fs::read(&path).unwrap()[88], 0);
    std::fs::write(&path, &image).unwrap();
    std::fs::write(dir.path().join("y"), &image).unwrap();
    imgtool(["resize", "y", "+1M"]).within(dir.path()).go();
    assert_eq!(std::fs::read(dir.path().join("y")).unwrap()[88], 0);
}

/// A failed allocation leaves the file as it was, so that a second try does not take its length for a success.
#[test]
fn a_resize_without_enough_space_changes_nothing() {
    require!("strace");
    let dir = tempdir();
    std::fs::write(dir.path().join("x"), b"secret").unwrap();
    let line = ["-f", "-o", "/dev/null", "-e", "inject=fallocate:error=ENOSPC", PROGRAM, "resize"];
    let output = std::process::Command::new("strace")
        .args(line)
        .args(["-f", "raw", "--preallocation=falloc", "x", "10M"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("No space left"), "{said}");
    assert_eq!(std::fs::read(dir.path().join("x")).unwrap(), b"secret");
}
