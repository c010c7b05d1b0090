//! Images of this driver, read by qcow2-rs, which shares no code with QEMU.

use std::process::Command;
use std::time::{Duration, Instant};

use imgtool_testing::conformance as laws;

use crate::variants::{Variant, content_of, disk, write_variant};

/// Environment variable with the directory of the child's images.
const IMAGES: &str = "IMGTOOL_TEST_QCOW2_RS_IMAGES";

/// Time limit of the child, which reads 216 MiB.
const TIME_LIMIT: Duration = Duration::from_secs(200);

#[test]
fn qcow2_rs_reads_the_same() {
    let directory = laws::scratch();
    let image = disk();
    let mut number = 0;
    // qcow2-rs does not support zstd, extended L2 entries, data files and backing files other than qcow2, and
    // fails on clusters below 4 KiB.
    for shape in Variant::shapes().into_iter().filter(|v| v.cluster_size >= 4096 && !v.extended_l2) {
        for (compression, preallocation) in [(None, "off"), (None, "metadata"), (Some("zlib"), "off")] {
            let variant = Variant { compression, preallocation, ..shape };
            write_variant(directory.path(), &variant, &image);
            std::fs::rename(directory.path().join("x"), directory.path().join(format!("{number}.qcow2")))
                .unwrap();
            println!("{number}: {variant:?}");
            number += 1;
        }
    }
    assert_eq!(number, 72);
    // In a child process, which can be killed if it hangs.
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "qcow2_rs::child_reads_the_images", "--ignored", "--nocapture", "--test-threads=1"])
        .env(IMAGES, directory.path())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if started.elapsed() > TIME_LIMIT => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("qcow2-rs did not finish within {TIME_LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert!(status.success(), "qcow2-rs: {status}");
    let read = std::fs::read_to_string(directory.path().join("read")).unwrap();
    assert_eq!(read.lines().count(), number);
}

#[test]
#[ignore = "run by qcow2_rs_reads_the_same, in a child process"]
fn child_reads_the_images() {
    let Some(directory) = std::env::var_os(IMAGES).map(std::path::PathBuf::from) else { return };
    let expected = content_of(&disk());
    let mut read = String::new();
    for entry in std::fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        let params = ::qcow2_rs::dev::Qcow2DevParams::new(9, None, None, true, false);
        let device = ::qcow2_rs::utils::qcow2_setup_dev_sync(&path, &params).unwrap();
        assert_eq!(device.info.virtual_size(), expected.len() as u64, "{}", path.display());
        let mut theirs = ::qcow2_rs::helpers::Qcow2IoBuf::<u8>::new(expected.len());
        futures::executor::block_on(async {
            device.qcow2_prep_io().await.unwrap();
            assert_eq!(device.read_at(&mut theirs, 0).await.unwrap(), expected.len());
        });
        assert_eq!(theirs.iter().zip(&expected).position(|(a, b)| a != b), None, "{}", path.display());
        read.push_str(&format!("{}\n", path.display()));
    }
    std::fs::write(directory.join("read"), read).unwrap();
}
