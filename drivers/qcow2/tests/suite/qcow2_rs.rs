//! Images of this driver, read by qcow2-rs, which shares no code with QEMU.
//!
//! The reader is a program in `oracles/qcow2-rs`, a workspace of its own. The test builds it.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use imgtool_testing::conformance as laws;
use imgtool_testing::oracles;

use crate::variants::{Variant, content_of, disk, write_variant};

/// Time limit of the reader, which reads 216 MiB.
const TIME_LIMIT: Duration = Duration::from_secs(200);

#[test]
fn qcow2_rs_reads_the_same() {
    let Some(reader) = build_reader() else { return };
    let directory = laws::scratch();
    let image = disk();
    let expected = directory.path().join("expected.raw");
    std::fs::write(&expected, content_of(&image)).unwrap();
    let mut images = Vec::new();
    // qcow2-rs does not support zstd, extended L2 entries, data files and backing files other than qcow2, and
    // fails on clusters below 4 KiB.
    for shape in Variant::shapes().into_iter().filter(|v| v.cluster_size >= 4096 && !v.extended_l2) {
        for (compression, preallocation) in [(None, "off"), (None, "metadata"), (Some("zlib"), "off")] {
            let variant = Variant { compression, preallocation, ..shape };
            write_variant(directory.path(), &variant, &image);
            let path = directory.path().join(format!("{}.qcow2", images.len()));
            std::fs::rename(directory.path().join("x"), &path).unwrap();
            println!("{}: {variant:?}", images.len());
            images.push(path);
        }
    }
    assert_eq!(images.len(), 72);
    // A file, not a pipe, which nobody would empty while the reader runs.
    let read = directory.path().join("read");
    let child = Command::new(reader)
        .arg(expected)
        .args(&images)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&read).unwrap())
        .spawn()
        .unwrap();
    let status = wait(child);
    assert!(status.success(), "qcow2-rs: {status}");
    let read: Vec<PathBuf> = std::fs::read_to_string(&read).unwrap().lines().map(PathBuf::from).collect();
    assert_eq!(read, images);
}

/// Builds the reader and returns its path. If it cannot be built, for example without a network, reports the
/// test as skipped, or fails it with `CI` set.
fn build_reader() -> Option<PathBuf> {
    let target = concat!(env!("CARGO_TARGET_TMPDIR"), "/qcow2-rs");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let build = Command::new(cargo)
        .args(["build", "--quiet", "--locked", "--target-dir", target, "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../oracles/qcow2-rs/Cargo.toml"))
        .output()
        .unwrap();
    if !build.status.success() {
        let why = String::from_utf8_lossy(&build.stderr);
        oracles::unable(&format!("cannot build oracles/qcow2-rs: {}", why.trim_end()), true);
        return None;
    }
    Some(PathBuf::from(target).join("debug/imgtool-oracle-qcow2-rs"))
}

/// Waits for the reader. Kills it if it exceeds the time limit: qcow2-rs may hang.
fn wait(mut child: Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status,
            None if started.elapsed() > TIME_LIMIT => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("qcow2-rs did not finish within {TIME_LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
