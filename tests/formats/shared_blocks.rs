//! File systems whose files can share blocks: outputs have the same bytes as elsewhere, and share equal
//! blocks with the source.

use std::path::Path;

use imgtool_testing::images::{Image, noise, prose};
use imgtool_testing::{oracles, require, sha256_file, tempdir, text};

use crate::support::devices::{LoopDevice, Mounted, loop_devices};
use crate::support::imgtool;

/// True if `filefrag` reports blocks that the file shares with another file.
fn shares_blocks(path: &Path) -> bool {
    let output = oracles::run("filefrag", &["-v", text(path)]);
    String::from_utf8_lossy(&output.stdout).contains("shared")
}

fn image() -> Image {
    Image::hole("noise between holes", 24 << 20)
        .with(0, noise(1, 3 << 20))
        .with((5 << 20) + 4096, noise(2, (2 << 20) + 100))
        .with(11 << 20, prose(3, 1 << 20))
        .with(20 << 20, noise(4, 4 << 20))
}

#[test]
fn block_sharing_does_not_change_the_content() {
    require!("mkfs.xfs", "mount", "filefrag", "qemu-img");
    if !loop_devices() {
        return;
    }
    let dir = tempdir();
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(400 << 20).unwrap();
    let device = LoopDevice::over(&disk);
    let mounted = dir.path().join("xfs");
    let _mounted = Mounted::xfs(&device, &mounted);
    let (here, there) = (dir.path().join("plain"), mounted.join("work"));
    for place in [&here, &there] {
        std::fs::create_dir(place).unwrap();
        image().write_raw(&place.join("a.raw"));
    }
    // Source, its format, target, options, and whether source and target can share blocks.
    let conversions: [(&str, &str, &str, &[&str], bool); 10] = [
        ("a.raw", "raw", "b.raw", &[], true),
        ("a.raw", "raw", "a.qcow2", &["--to", "qcow2"], true),
        ("a.raw", "raw", "small.qcow2", &["--to", "qcow2", "-o", "cluster_size=512"], false),
        ("a.raw", "raw", "z.qcow2", &["-c", "--to", "qcow2"], false),
        ("a.raw", "raw", "a.vhdx", &["--to", "vhdx"], true),
        ("a.qcow2", "qcow2", "c.raw", &[], true),
        ("a.qcow2", "qcow2", "c.vhdx", &["--to", "vhdx"], true),
        ("a.vhdx", "vhdx", "d.qcow2", &["--to", "qcow2", "-o", "extended_l2=on"], true),
        ("z.qcow2", "qcow2", "e.raw", &[], false),
        ("small.qcow2", "qcow2", "f.qcow2", &["--to", "qcow2"], false),
    ];
    for (source, format, target, options, shared) in conversions {
        for place in [&here, &there] {
            let (source, target) = (place.join(source), place.join(target));
            imgtool(["convert", "-f", format, text(&source), text(&target)]).args(options).ok();
        }
        let (plain, sharing) = (here.join(target), there.join(target));
        assert_eq!(sha256_file(&plain), sha256_file(&sharing), "{source} to {target}");
        oracles::run("sync", &["-f", text(&sharing)]);
        if shared {
            assert!(shares_blocks(&sharing), "{source} to {target} shares nothing");
        }
        if target.ends_with(".qcow2") {
            oracles::qemu_check(&sharing, "qcow2");
        }
    }
}
