//! `imgtool vma` beyond the transcripts of the reference program: arguments, maps, `exec:`, and the
//! messages of refusals.

use std::io::Read;
use std::process::{Command, Stdio};

use imgtool_testing::images::noise;
use imgtool_testing::{names, oracles, require, snapshot, text};

use super::{scene, vma};
use crate::support::imgtool;

const USAGE: &str = "usage: vma COMMAND";

#[test]
fn prints_usage_to_standard_output_and_exits_1() {
    let dir = scene();
    for line in [
        "",
        "nonsense",
        "list",
        "list a.vma b",
        "list -v a.vma",
        "config",
        "config a.vma b",
        "create",
        "extract a.vma",
        "extract a.vma d e",
        "extract -x a.vma d",
        "verify",
        "verify a.vma b",
        "verify -r m a.vma",
    ] {
        let args: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let run = imgtool(["vma"]).args(args).within(dir.path()).go().exits(1);
        assert!(run.text().starts_with(USAGE) && run.stderr.is_empty(), "{line}: {}", run.stderr);
    }
    assert_eq!(names(dir.path()), ["a.vma", "d.raw"]);
}

#[test]
fn options_may_follow_arguments_and_repeat() {
    let dir = scene();
    vma(dir.path(), "config a.vma -c nope -c qemu-server.fw").exits(0);
    vma(dir.path(), "config -c -x a.vma").exits(255);
    vma(dir.path(), "verify a.vma -v -v").exits(0);
    vma(dir.path(), "extract a.vma out -v -d x -v -d drive-efidisk0").exits(0);
    assert_eq!(
        names(&dir.path().join("out")),
        ["disk-drive-efidisk0.raw", "qemu-server.conf", "qemu-server.fw"]
    );
    std::fs::write(dir.path().join("c1"), b"1").unwrap();
    std::fs::write(dir.path().join("c2"), b"").unwrap();
    vma(dir.path(), "create b.vma d.raw -c c1 x=d.raw -c c2 d.raw").exits(0);
    let list = vma(dir.path(), "list b.vma").exits(0).text();
    let expected = "CFG: size: 1 name: c1\nCFG: size: 0 name: c2\nDEV: dev_id=1 size: 70144 devname: disk0\n\
                    DEV: dev_id=2 size: 70144 devname: x\nDEV: dev_id=3 size: 70144 devname: disk2\nCTIME: ";
    assert!(list.starts_with(expected), "{list}");
}

#[test]
fn create_accepts_a_format_for_each_disk() {
    require!("qemu-img");
    let dir = scene();
    oracles::run(
        "qemu-img",
        &["convert", "-O", "qcow2", text(&dir.path().join("d.raw")), text(&dir.path().join("d.qcow2"))],
    );
    let qcow2_len = std::fs::metadata(dir.path().join("d.qcow2")).unwrap().len();
    // As raw, the image file itself is the disk.
    vma(dir.path(), "create b.vma -d format=qcow2:a=d.qcow2 -d format=raw:b=d.qcow2 -d format=qcow2:d.qcow2")
        .exits(0);
    let list = vma(dir.path(), "list b.vma").exits(0).text();
    for line in [
        "DEV: dev_id=1 size: 70144 devname: a".to_owned(),
        format!("DEV: dev_id=2 size: {qcow2_len} devname: b"),
        "DEV: dev_id=3 size: 70144 devname: disk2".to_owned(),
    ] {
        assert!(list.contains(&line), "no {line} in\n{list}");
    }
    // Without -d, and with a format that is wrong.
    vma(dir.path(), "create c.vma format=raw:b=d.qcow2 d.qcow2").exits(0);
    assert!(vma(dir.path(), "list c.vma").text().contains(&format!("size: {qcow2_len} devname: b")));
    vma(dir.path(), "create e.vma -d format=qcow2:a=d.raw").exits(1).says("vma: bdrv_open 'd.raw' failed");
    vma(dir.path(), "create e.vma -d a=d.raw")
        .exits(1)
        .says("vma: No format specified for device: 'a=d.raw'");
    vma(dir.path(), "create e.vma d.raw -d format=raw:a=d.raw")
        .exits(1)
        .says("vma: Unexpected extra argument - specify all devices via '-d'");
    assert!(!dir.path().join("e.vma").exists());
}

#[test]
fn create_enforces_the_archive_limits() {
    let dir = scene();
    let path = dir.path();
    std::fs::write(path.join("empty"), b"").unwrap();
    std::fs::write(path.join("small"), vec![1; 512]).unwrap();
    std::fs::write(path.join("64k"), vec![b'c'; 65_536]).unwrap();
    for index in 0..257 {
        let len = if index < 9 { 65_535 } else { index };
        std::fs::write(path.join(format!("c{index}")), vec![b'c'; len]).unwrap();
    }
    let (long, longest) = ("n".repeat(243), "n".repeat(242));
    for name in [&long, &longest] {
        std::fs::write(path.join(name), b"c").unwrap();
    }
    let before = snapshot(path);
    let disks = |count: usize| (0..count).map(|n| format!(" d{n}=small")).collect::<String>();
    let configs = |range: std::ops::Range<usize>| range.map(|n| format!(" -c c{n}")).collect::<String>();
    for (line, words) in [
        (format!("create x{}", disks(255)), "vma: vma_writer_register_stream 'd254' failed"),
        ("create x a=empty".to_owned(), "vma: vma_writer_register_stream 'a' failed"),
        ("create x -c 64k".to_owned(), "vma: Unable to append config data 64k (len = 65536)"),
        (format!("create x{}", configs(0..9)), "524288"),
        (format!("create x{}", configs(0..257)), "at most 256"),
        ("create x a=small a=small".to_owned(), "two devices are named 'a'"),
        ("create x ../a=small".to_owned(), "A-Z a-z 0-9 . _ -"),
        ("create x =small".to_owned(), "is empty"),
        (format!("create x {}=small", "n".repeat(243)), "243 bytes long"),
        ("create nodir/x a=small".to_owned(), "No such file or directory"),
        ("create x -c nothere".to_owned(), "nothere"),
        (format!("create x -c {long}"), "is longer than 242 bytes"),
    ] {
        vma(path, &line).exits(1).says(words);
        assert_eq!(snapshot(path), before, "{words}");
    }
    for (archive, line) in [
        ("ok1", format!("create ok1{}", disks(254))),
        ("ok2", format!("create ok2{}", configs(0..7))),
        ("ok3", format!("create ok3{}", configs(9..257).replace("c9 ", "c0 "))),
        ("ok4", format!("create ok4 {}=small", "n".repeat(242))),
        ("ok5", "create ok5".to_owned()),
        ("ok6", format!("create ok6 -c {longest}")),
    ] {
        vma(path, &line).exits(0);
        vma(path, &format!("verify {archive}")).exits(0);
    }
    assert_eq!(vma(path, "list ok1").text().lines().count(), 255);
    // An archive without disks is valid, and `verify -v` reports on it.
    assert!(vma(path, "verify -v ok5").text().ends_with("vma archive contains no image data\n"));
}

#[test]
fn writes_to_a_fifo_only_if_it_has_a_reader() {
    let dir = scene();
    oracles::run("mkfifo", &[text(&dir.path().join("fifo"))]);
    vma(dir.path(), "create fifo d.raw")
        .exits(1)
        .says("vma: can't open file fifo - No such device or address");
    assert!(std::fs::symlink_metadata(dir.path().join("fifo")).is_ok(), "the FIFO stays");
    for verb in ["vma", "convert"] {
        let mut reader =
            Command::new("cat").arg(dir.path().join("fifo")).stdout(Stdio::piped()).spawn().unwrap();
        if verb == "vma" {
            vma(dir.path(), "create fifo a=d.raw").exits(0);
        } else {
            imgtool(["convert", "a=d.raw", "--to", "vma", "fifo"]).within(dir.path()).ok();
        }
        let mut archive = Vec::new();
        reader.stdout.take().unwrap().read_to_end(&mut archive).unwrap();
        reader.wait().unwrap();
        imgtool(["vma", "verify", "-"]).pipe_bytes(archive).ok();
    }
    // /dev/stdout is a pipe here.
    let run = imgtool(["vma", "create", "/dev/stdout", "a=d.raw"]).within(dir.path()).ok();
    imgtool(["vma", "verify", "-"]).pipe_bytes(run.stdout).ok();
    vma(dir.path(), "create - d.raw").exits(0);
    imgtool(["vma", "verify", "./-"]).within(dir.path()).ok();
}

#[test]
fn failed_output_command_is_an_error() {
    let dir = scene();
    std::fs::write(dir.path().join("d.raw"), noise(4, 3 << 20)).unwrap();
    let create = |command: &str| imgtool(["vma", "create", command, "d.raw"]).within(dir.path()).go();
    create("exec:cat > ok.vma").exits(0);
    vma(dir.path(), "verify ok.vma").exits(0);
    // The command's own file stays, even if the command fails.
    create("exec:cat > bad.vma; exit 3").ends_with(1).says("exit status: 3");
    create("exec:head -c 100 > /dev/null").exits(1).says("Broken pipe");
    create("exec:kill -9 $$").exits(1);
    create("exec:nosuchcommand-x").exits(1).says("exit status: 127");
}
