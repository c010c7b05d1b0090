//! The same input gives the same bytes, with any number of threads.

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{fixture, snapshot, tempdir, text};

use crate::support::imgtool;

/// Converts with 1, 2, 7 and again 7 threads; all outputs must have the same bytes.
fn same_with_any_threads(source: &str, options: &[&str]) {
    let dir = tempdir();
    let mut outputs = Vec::new();
    // The trailing slash makes the target a directory, the same one each time: a domain has the paths of its disks.
    let out = format!("{}/out/", text(dir.path()));
    for threads in ["1", "2", "7", "7"] {
        imgtool(["convert", "--threads", threads, source]).args(options).args([&out]).ok();
        outputs.push(snapshot(out.as_ref()));
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(!outputs[0].is_empty());
    for (round, output) in outputs.iter().enumerate() {
        assert_eq!(*output, outputs[0], "{options:?}: round {round}");
    }
}

/// Returns a raw image of 24 MiB with all kinds of content.
fn mixed() -> Image {
    images::all().into_iter().find(|image| image.name == "prose-and-holes").unwrap()
}

fn raw_to(options: &[&str]) {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    mixed().write_raw(&raw);
    same_with_any_threads(text(&raw), options);
}

#[test]
fn raw_output_does_not_depend_on_threads() {
    raw_to(&["--to", "raw"]);
}

#[test]
fn qcow2_output_does_not_depend_on_threads() {
    raw_to(&["--to", "qcow2"]);
}

#[test]
fn small_cluster_qcow2_output_does_not_depend_on_threads() {
    raw_to(&["--to", "qcow2", "-o", "cluster_size=512"]);
}

#[test]
fn compressed_qcow2_output_does_not_depend_on_threads() {
    raw_to(&["--to", "qcow2", "-c"]);
    raw_to(&["--to", "qcow2", "--compress=zstd"]);
}

#[test]
fn vhdx_output_does_not_depend_on_threads() {
    raw_to(&["--to", "vhdx"]);
}

#[test]
fn vma_output_does_not_depend_on_threads() {
    raw_to(&["--to", "vma"]);
}

#[test]
fn shuffled_archive_output_does_not_depend_on_threads() {
    let dir = tempdir();
    let other = Image::hole("other", 5_000_192).with(1_000_000, images::noise(8, 3_000_000));
    let archive = Archive::of([("drive-scsi0", mixed()), ("drive-scsi1", other)]).shuffled(4).build();
    let path = dir.path().join("vm.vma");
    std::fs::write(&path, archive.bytes).unwrap();
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        same_with_any_threads(text(&path), &["--to", format]);
    }
}

#[test]
fn compressed_archive_output_does_not_depend_on_threads() {
    for format in ["raw", "qcow2", "vhdx"] {
        same_with_any_threads(text(&fixture("two-disks.vma.zst")), &["--to", format]);
    }
}
