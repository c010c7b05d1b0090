//! `imgtool vma` where the transcripts of the reference program show nothing: what may stand on the
//! command line, in a map, and behind `exec:`; and what the program refuses, in its words.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::archive::Archive;
use crate::support::images::{self, Image, noise};
use crate::support::oracles::{self, require};
use crate::support::run::{Outcome, PROGRAM};
use crate::support::{fixture, imgtool, names, sha256_file, snapshot, tempdir, text};

const SCSI: &str = "2eb0f4945306c46775684ae3e6b0f9c401fea1cbfb4ff3c2d6cbe6b8745326f3";
const EFI: &str = "a0fd2cf34e841d0d1e7f30367fc2b547c952d35ae30d9003b2890c10b61d82c9";
const USAGE: &str = "usage: vma COMMAND";

/// Runs `imgtool vma …` in a directory; words are separated by blanks.
fn vma(directory: &Path, line: &str) -> Outcome {
    imgtool(["vma"]).args(line.split(' ')).within(directory).go()
}

/// A directory with the archive of two disks and a small disk.
fn scene() -> tempfile::TempDir {
    let dir = tempdir();
    let (from, to) = (fixture("two-disks.vma.zst"), dir.path().join("a.vma"));
    imgtool(["convert", "-q", "-f", "raw", "--to", "raw", text(&from), text(&to)]).ok();
    std::fs::write(dir.path().join("d.raw"), noise(3, 70_000)).unwrap();
    dir
}

#[test]
fn usage_is_on_standard_output_with_exit_code_1() {
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
fn options_may_come_behind_and_twice() {
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
fn create_takes_disks_with_their_format() {
    require!("qemu-img");
    let dir = scene();
    oracles::run(
        "qemu-img",
        &["convert", "-O", "qcow2", text(&dir.path().join("d.raw")), text(&dir.path().join("d.qcow2"))],
    );
    let qcow2_len = std::fs::metadata(dir.path().join("d.qcow2")).unwrap().len();
    // As raw the image file itself is the disk.
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
    // Without -d too, and a format that it is not.
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
fn the_limits_of_an_archive_are_the_programs() {
    let dir = scene();
    let path = dir.path();
    std::fs::write(path.join("empty"), b"").unwrap();
    std::fs::write(path.join("small"), vec![1; 512]).unwrap();
    std::fs::write(path.join("64k"), vec![b'c'; 65_536]).unwrap();
    for index in 0..257 {
        let len = if index < 9 { 65_535 } else { index };
        std::fs::write(path.join(format!("c{index}")), vec![b'c'; len]).unwrap();
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
        ("create x a=small a=small".to_owned(), "two devices are called 'a'"),
        ("create x ../a=small".to_owned(), "A-Z a-z 0-9 . _ -"),
        ("create x =small".to_owned(), "is empty"),
        (format!("create x {}=small", "n".repeat(243)), "243 bytes long"),
        ("create nodir/x a=small".to_owned(), "No such file or directory"),
        ("create x -c nothere".to_owned(), "nothere"),
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
    ] {
        vma(path, &line).exits(0);
        vma(path, &format!("verify {archive}")).exits(0);
    }
    assert_eq!(vma(path, "list ok1").text().lines().count(), 255);
    // Nothing at all is an archive too, of which `verify -v` has something to say.
    assert!(vma(path, "verify -v ok5").text().ends_with("vma archive contains no image data\n"));
}

#[test]
fn a_fifo_takes_an_archive_if_somebody_reads_it() {
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
fn a_command_that_stops_reading_or_fails_is_an_error() {
    let dir = scene();
    std::fs::write(dir.path().join("d.raw"), noise(4, 3 << 20)).unwrap();
    let create = |command: &str| imgtool(["vma", "create", command, "d.raw"]).within(dir.path()).go();
    create("exec:cat > ok.vma").exits(0);
    vma(dir.path(), "verify ok.vma").exits(0);
    // What the command writes is its own.
    create("exec:cat > bad.vma; exit 3").ends_with(1).says("exit status: 3");
    create("exec:head -c 100 > /dev/null").exits(1).says("Broken pipe");
    create("exec:kill -9 $$").exits(1);
    create("exec:nosuchcommand-x").exits(1).says("exit status: 127");
}

/// A target full of old bytes.
fn target(directory: &Path, name: &str, size: usize) {
    std::fs::write(directory.join(name), vec![0x55; size]).unwrap();
}

#[test]
fn every_option_of_a_map_line_is_taken() {
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
        target(dir.path(), "t.raw", 540_672);
        std::fs::write(dir.path().join("map"), format!("skip=drive-scsi0\n{line}\n")).unwrap();
        vma(dir.path(), "extract -r map a.vma out").exits(0);
        assert_eq!(sha256_file(&dir.path().join("t.raw")), EFI, "{line}");
        assert_eq!(names(&dir.path().join("out")), ["qemu-server.conf", "qemu-server.fw"]);
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
    // 0: the target is taken to be zero, so old bytes stay where the disk is.
    target(dir.path(), "t.raw", 540_672);
    std::fs::write(dir.path().join("map"), "0:drive-efidisk0=t.raw\n").unwrap();
    vma(dir.path(), "extract -d drive-efidisk0 -r map a.vma out").exits(0);
    let bytes = std::fs::read(dir.path().join("t.raw")).unwrap();
    assert!(bytes.iter().filter(|byte| **byte == 0x55).count() > 500_000);
    assert_ne!(sha256_file(&dir.path().join("t.raw")), EFI);
}

#[test]
fn a_map_that_is_wrong_is_told_in_the_programs_words_and_leaves_nothing() {
    let dir = scene();
    target(dir.path(), "t.raw", 540_672);
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
    // A pipe, which would be waited for.
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
fn whoever_writes_the_map_sees_list_and_configurations_first() {
    let dir = scene();
    target(dir.path(), "t.raw", 540_672);
    oracles::run("mkfifo", &[text(&dir.path().join("map"))]);
    // From a pipe, as restore tools do after decompressing.
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
fn an_image_that_a_map_names_is_made_anew_with_its_size() {
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
        vma(dir.path(), "extract -r map a.vma out").exits(0).says("image was made anew");
        let info = oracles::qemu_info(&image, format);
        assert_eq!(info["virtual-size"], size, "{format}");
        if create.starts_with("cluster_size") {
            assert_eq!(info["cluster-size"], 4096);
        }
        let raw = dir.path().join("back.raw");
        oracles::run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&image), text(&raw)]);
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(crate::support::sha256(&bytes[..5_255_168]), SCSI, "{format}");
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
    let before = sha256_file(&image);
    vma(dir.path(), "extract -r map a.vma out").exits(1).says("internal snapshots, which would be lost");
    assert_eq!(sha256_file(&image), before);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn names_are_files_as_the_program_makes_them() {
    let dir = tempdir();
    let disk = |seed| Image::hole("d", 4096).with(0, noise(seed, 4096));
    let long = "n".repeat(242);
    let archive = Archive::of([
        ("Disk", disk(1)),
        ("disk", disk(2)),
        (".hidden", disk(3)),
        (&*long, disk(4)),
        ("_", disk(5)),
    ])
    .config(".conf", b"1")
    .config("A.conf", b"2")
    .config("a.conf", b"3")
    .config("..", b"4")
    .config("a.conf", b"5")
    .config("tmp-disk-disk.raw", b"6")
    .config("vmstate.bin", b"7")
    .build();
    std::fs::write(dir.path().join("a.vma"), archive.bytes).unwrap();
    let run = vma(dir.path(), "extract a.vma d").exits(0);
    let mut expected =
        [".conf", "A.conf", "a.conf", "config", "a-2.conf", "tmp-disk-disk.raw", "vmstate.bin"]
            .map(str::to_owned)
            .to_vec();
    expected.extend(["Disk", "disk", ".hidden", &long, "_"].map(|name| format!("disk-{name}.raw")));
    expected.sort_unstable();
    assert_eq!(names(&dir.path().join("d")), expected);
    let notes: Vec<&str> = run.stderr.lines().collect();
    assert_eq!(
        notes,
        [
            "vma: note: configuration '..' is written as 'config'",
            "vma: note: configuration 'a.conf' is written as 'a-2.conf'"
        ]
    );
}

#[test]
fn names_do_not_forge_lines() {
    let dir = tempdir();
    let disk = Image::hole("d", 4096).with(0, images::noise(1, 4096));
    let archive = Archive::of([("a\nDEV: dev_id=9 size: 1 devname: b\x1b[2J", disk)])
        .config("c\nCTIME: never", b"1")
        .build();
    std::fs::write(dir.path().join("a.vma"), archive.bytes).unwrap();
    for line in ["list a.vma", "verify -v a.vma", "extract a.vma d"] {
        let run = vma(dir.path(), line).exits(0);
        let text = run.text() + &run.stderr;
        assert!(
            !text.contains('\x1b') && !text.contains("\nDEV: dev_id=9") && !text.contains("\nCTIME: never"),
            "{text}"
        );
    }
}
