//! Names of outputs: valid targets, and files that are never overwritten.

use imgtool_testing::{assert_same, names, snapshot};

use super::with_disk;
use crate::support::imgtool;

#[test]
fn refuses_two_sources_for_one_qcow2_image() {
    let dir = with_disk();
    std::fs::copy(dir.path().join("disk.raw"), dir.path().join("other.raw")).unwrap();
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "disk.raw", "other.raw", "--to", "qcow2", "out.qcow2"]);
    run.within(dir.path()).go().exits(2).says("2 sources do not go into one qcow2 image");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn refuses_to_overwrite_without_force() {
    let dir = with_disk();
    std::fs::write(dir.path().join("out"), b"precious").unwrap();
    let before = snapshot(dir.path());
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let line = ["convert", "disk.raw", "--to", format, "out"];
        imgtool(line).within(dir.path()).go().exits(1).says("out");
        assert_eq!(snapshot(dir.path()), before, "{format}");
    }
    imgtool(["convert", "--force", "disk.raw", "--to", "raw", "out"]).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("out"), "--force");
}

#[test]
fn refuses_to_overwrite_the_source_even_with_force() {
    let dir = with_disk();
    std::fs::hard_link(dir.path().join("disk.raw"), dir.path().join("link.raw")).unwrap();
    std::os::unix::fs::symlink("disk.raw", dir.path().join("symlink.raw")).unwrap();
    let before = snapshot(dir.path());
    for target in ["disk.raw", "./disk.raw", "link.raw", "symlink.raw"] {
        let line = ["convert", "--force", "disk.raw", "--to", "qcow2", target];
        imgtool(line).within(dir.path()).go().exits(1);
        assert_eq!(snapshot(dir.path()), before, "{target}");
    }
}

#[test]
fn names_a_disk_in_a_directory_after_its_source() {
    let dir = with_disk();
    std::fs::create_dir(dir.path().join("there")).unwrap();
    imgtool(["convert", "disk.raw", "--to", "qcow2", "there"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("there")), ["disk.qcow2"]);
    imgtool(["convert", "disk.raw", "--to", "vhdx", "new/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("new")), ["disk.vhdx"]);
}

#[test]
fn infers_the_format_from_the_target_extension() {
    let dir = with_disk();
    for (name, format) in [("a.qcow2", "qcow2"), ("a.vhdx", "vhdx"), ("a.vma", "vma"), ("a.raw", "raw")] {
        imgtool(["convert", "disk.raw", name]).within(dir.path()).ok();
        let info = imgtool(["info", "--output", "json", name]).within(dir.path()).ok().json();
        assert_eq!(info["format"], format);
    }
}
