//! Maps of `imgtool vma extract -r`: disks into existing targets, with the messages of the vma program.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use imgtool_testing::{fixture, names, oracles, require, sha256, sha256_file, snapshot, text};

use super::{EFI, LIST, SCSI, scene, target, two_disks, vma, without_time};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

#[test]
fn accepts_every_option_of_a_map_line() {
    let dir = scene();
    for line in [
        "1:drive-efidisk0=t.raw",
        "format=raw:1:drive-efidisk0=t.raw",
        "throttling.bps=0x10000000:1:drive-efidisk0=t.raw",
        "throttling.bps=010000000000:throttling.group=g:1:drive-efidisk0=t.raw",
        "cache=none:1:drive-efidisk0=t.raw",
        "cache=off:format=raw:throttling.group=:throttling.bps=0:1:drive-efidisk0=t.raw",
        "cache=writeback:1:drive-efidisk0=t.raw\n1:unknown-device=nowhere\nskip=unknown2",
        "cache=directsync:1:drive-efidisk0=t.raw\ndone\nnonsense that is not read",
        "cache=unsafe:1:drive-efidisk0=t.raw\n\nnonsense that is not read",
        "skip=drive-efidisk0\n1:drive-efidisk0=nowhere\ncache=writethrough:1:drive-efidisk0=t.raw",
    ] {
        target(dir.path(), "t.raw", 540_672, 0x55);
        std::fs::write(dir.path().join("map"), format!("skip=drive-scsi0\n{line}\n")).unwrap();
        vma(dir.path(), "extract -r map a.vma out").exits(0);
        assert_eq!(sha256_file(&dir.path().join("t.raw")), EFI, "{line}");
        assert_eq!(names(&dir.path().join("out")), ["qemu-server.conf", "qemu-server.fw"]);
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
    // With 0, the target counts as zero, so old bytes stay where the disk is zero.
    target(dir.path(), "t.raw", 540_672, 0x55);
    std::fs::write(dir.path().join("map"), "0:drive-efidisk0=t.raw\n").unwrap();
    vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out").exits(0);
    let bytes = std::fs::read(dir.path().join("t.raw")).unwrap();
    assert!(bytes.iter().filter(|byte| **byte == 0x55).count() > 500_000);
    assert_ne!(sha256_file(&dir.path().join("t.raw")), EFI);
}

#[test]
fn invalid_maps_get_the_reference_messages() {
    let dir = scene();
    target(dir.path(), "t.raw", 540_672, 0x55);
    std::fs::write(dir.path().join("map"), "").unwrap();
    let before = snapshot(dir.path());
    for (map, words) in [
        (
            "format=raw:format=raw:1:drive-efidisk0=t.raw",
            "read map failed - duplicate value for option 'format'",
        ),
        (
            "cache=none:cache=off:1:drive-efidisk0=t.raw",
            "read map failed - duplicate value for option 'cache'",
        ),
        ("throttling.bps=1", "read map failed - option 'throttling.bps' not terminated ('throttling.bps=1')"),
        ("throttling.bps=ten:1:drive-efidisk0=t.raw", "read map failed - not a number: ten"),
        (
            "throttling.bps=99999999999999999999:1:drive-efidisk0=t.raw",
            "read map failed - not a number: 99999999999999999999",
        ),
        ("cache=big:1:drive-efidisk0=t.raw", "read map failed - invalid cache option: big"),
        ("2:drive-efidisk0=t.raw", "read map failed - parse error ('2:drive-efidisk0=t.raw')"),
        ("1:t.raw", "read map failed - no dev name specified"),
        ("skip", "read map failed - option 'skip' has no value"),
        ("1:drive-efidisk0=nothere.raw", "vma: can't open file nothere.raw - No such file or directory"),
        ("format=x:1:drive-efidisk0=t.raw", "vma: can't open file t.raw - Unknown driver 'x'"),
        ("done\n1:drive-efidisk0=t.raw", "vma: no device name mapping for drive-efidisk0"),
        ("\n1:drive-efidisk0=t.raw", "vma: no device name mapping for drive-efidisk0"),
        ("1:drive-efidisk0=t.raw\r", "vma: can't open file"),
    ] {
        std::fs::write(dir.path().join("map"), format!("{map}\n")).unwrap();
        vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out").exits(1).says(words);
        std::fs::write(dir.path().join("map"), "").unwrap();
        assert_eq!(snapshot(dir.path()), before, "{map}");
    }
    vma(dir.path(), "extract -r nomap a.vma out").exits(1).says("vma: can't open file nomap - No such file");
    assert_eq!(snapshot(dir.path()), before);
    // A pipe, on which the program would wait.
    oracles::run("mkfifo", &[text(&dir.path().join("pipe.raw"))]);
    std::fs::write(dir.path().join("map"), "format=raw:1:drive-efidisk0=pipe.raw\n").unwrap();
    let refused = vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out").exits(1);
    refused.says("is neither a regular file nor a block device");
    assert!(!dir.path().join("out").exists());
    // Two disks into one target.
    std::fs::write(dir.path().join("map"), "1:drive-efidisk0=t.raw\n1:drive-scsi0=./t.raw\n").unwrap();
    vma(dir.path(), "extract -r map a.vma out").exits(1);
    assert!(std::fs::read(dir.path().join("t.raw")).unwrap().iter().all(|byte| *byte == 0x55));
}

#[test]
fn writes_list_and_configurations_before_reading_the_map() {
    let dir = scene();
    target(dir.path(), "t.raw", 540_672, 0x55);
    oracles::run("mkfifo", &[text(&dir.path().join("map"))]);
    // From a pipe, like restore tools after decompressing.
    let mut program = Command::new(PROGRAM)
        .args(["vma", "extract", "-v", "-r", "map", "-", "out"])
        .current_dir(dir.path())
        .stdin(std::fs::File::open(dir.path().join("a.vma")).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(program.stdout.take().unwrap()));
    let list: Vec<String> = lines.by_ref().take(5).map(Result::unwrap).collect();
    assert!(
        list[0].starts_with("CFG: ")
            && list[3].starts_with("DEV: dev_id=2 ")
            && list[4].starts_with("CTIME: ")
    );
    let config = std::fs::read(dir.path().join("out/qemu-server.conf")).unwrap();
    assert_eq!(config, std::fs::read(fixture("qemu-server.conf")).unwrap());
    std::fs::write(dir.path().join("map"), "1:drive-efidisk0=t.raw\nskip=drive-scsi0\ndone\n").unwrap();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert!(program.wait().unwrap().success());
    assert_eq!(sha256_file(&dir.path().join("t.raw")), EFI);
    let percents = rest.iter().filter(|line| line.starts_with("progress ")).count();
    assert!(percents == 9 && rest[8].starts_with("progress 100% (read 589824 bytes"), "{rest:?}");
}

#[test]
fn writes_into_mapped_images() {
    require!("qemu-img");
    let dir = scene();
    for (format, create, more) in
        [("qcow2", "cluster_size=4k", 0), ("qcow2", "compat=1.1", 4 << 20), ("vhdx", "", 0)]
    {
        let size = if format == "vhdx" { 5_255_168 } else { 5_255_168 + more };
        let image = dir.path().join("image");
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", format];
        if !create.is_empty() {
            args.extend(["-o", create]);
        }
        args.extend([text(&image), &size_text]);
        oracles::run("qemu-img", &args);
        std::fs::write(dir.path().join("map"), "skip=drive-efidisk0\n1:drive-scsi0=image\n").unwrap();
        let before = std::fs::metadata(&image).unwrap().ino();
        let said = vma(dir.path(), "extract -r map a.vma out").exits(0).text();
        assert_eq!(std::fs::metadata(&image).unwrap().ino(), before, "the same file");
        assert!(!said.contains("note"), "{said}");
        let info = oracles::qemu_info(&image, format);
        assert_eq!(info["virtual-size"], size, "{format}");
        if create.starts_with("cluster_size") {
            assert_eq!(info["cluster-size"], 4096);
        }
        let raw = dir.path().join("back.raw");
        oracles::run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&image), text(&raw)]);
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(sha256(&bytes[..5_255_168]), SCSI, "{format}");
        assert!(bytes[5_255_168..].iter().all(|byte| *byte == 0));
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
    let image = dir.path().join("image");
    std::fs::remove_file(&image).unwrap();
    for (size, words) in
        [("5254656", "unexpected size 5254656 != 5255168"), ("9449984", "unexpected size 9449984 != 5255168")]
    {
        oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), size]);
        let before = sha256_file(&image);
        vma(dir.path(), "extract -r map a.vma out").exits(1).says(words);
        assert_eq!(sha256_file(&image), before);
    }
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "5255168"]);
    oracles::run("qemu-img", &["snapshot", "-c", "kept", text(&image)]);
    vma(dir.path(), "extract -r map a.vma out").exits(0);
    let info = oracles::qemu_info(&image, "qcow2");
    assert_eq!(info["snapshots"][0]["name"], "kept");
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    std::fs::remove_file(&image).unwrap();
    oracles::run("qemu-img", &["create", "-q", "-f", "vdi", text(&image), "5255168"]);
    let before = sha256_file(&image);
    vma(dir.path(), "extract -r map a.vma out")
        .exits(1)
        .says("a vdi image that exists can't be written into");
    assert_eq!(sha256_file(&image), before);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn writes_mapped_disks_into_existing_files() {
    let (dir, archive) = two_disks();
    let scsi = target(dir.path(), "t1.raw", 5_255_168, 0);
    let efi = target(dir.path(), "t2.raw", 540_672 + (4 << 20), 0xaa);
    std::fs::write(
        dir.path().join("map"),
        "format=raw:0:drive-scsi0=t1.raw\nformat=raw:1:drive-efidisk0=t2.raw\ndone\n",
    )
    .unwrap();
    let run = imgtool(["vma", "extract", "-r", "map", archive, "d"]).within(dir.path()).ok();
    assert_eq!(without_time(&run.text()), LIST);
    assert_eq!(names(&dir.path().join("d")), ["qemu-server.conf", "qemu-server.fw"]);
    assert_eq!(sha256_file(&scsi), SCSI);
    let bytes = std::fs::read(&efi).unwrap();
    assert_eq!(sha256(&bytes[..540_672]), EFI);
    assert!(bytes[540_672..].iter().all(|byte| *byte == 0xaa), "the tail was touched");
}

#[test]
fn refuses_a_mismatched_map_before_writing() {
    let (dir, archive) = two_disks();
    let scsi = target(dir.path(), "t1.raw", 5_255_168, 0x55);
    for (map, words) in [
        ("1:drive-scsi0=t1.raw\n1:drive-efidisk0=short.raw\n", "unexpected size 540160 != 540672"),
        ("1:drive-scsi0=t1.raw\n1:drive-efidisk0=long.raw\n", "unexpected size 4735488 != 540672"),
        ("1:drive-scsi0=t1.raw\n", "vma: no device name mapping for drive-efidisk0"),
        ("1:drive-scsi0=t1.raw\nnonsense\n", "read map failed - parse error ('nonsense')"),
    ] {
        target(dir.path(), "short.raw", 540_160, 0);
        target(dir.path(), "long.raw", 4_735_488, 0);
        std::fs::write(dir.path().join("map"), map).unwrap();
        imgtool(["vma", "extract", "-r", "map", archive, "d"]).within(dir.path()).go().exits(1).says(words);
        assert!(std::fs::read(&scsi).unwrap().iter().all(|byte| *byte == 0x55), "{map}");
        assert!(!dir.path().join("d").exists(), "{map}: something is left");
    }
}

#[test]
fn map_may_skip_disks_and_target_images() {
    let (dir, archive) = two_disks();
    imgtool(["create", "-f", "qcow2", "t.qcow2", "5255168"]).within(dir.path()).ok();
    std::fs::write(dir.path().join("map"), "skip=drive-efidisk0\ncache=none:0:drive-scsi0=t.qcow2\n\n")
        .unwrap();
    imgtool(["vma", "extract", "-r", "map", archive, "d"]).within(dir.path()).ok();
    let digest = imgtool(["checksum", "-f", "qcow2", "t.qcow2"]).within(dir.path()).ok().text();
    assert!(digest.starts_with(SCSI), "{digest}");
}
