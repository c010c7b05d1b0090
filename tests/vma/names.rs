//! Names from an archive, as `imgtool vma` writes and prints them.

use imgtool_testing::images::{self, Image, noise};
use imgtool_testing::vma::Archive;
use imgtool_testing::{names, tempdir};

use super::vma;
use crate::support::imgtool;

#[test]
fn changes_only_unsafe_or_duplicate_file_names() {
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
fn names_cannot_forge_output_lines() {
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

#[test]
fn names_from_an_archive_stay_in_the_output_directory() {
    let dir = tempdir();
    let disk = |seed| Image::hole("d", 65_536).with(0, images::noise(seed, 4096));
    let archive = Archive::of([("../../up", disk(1)), ("../../up", disk(2))])
        .config("../out.conf", b"x")
        .config("disk-.._.._up.raw", b"y")
        .build();
    std::fs::write(dir.path().join("a.vma"), archive.bytes).unwrap();
    let run = imgtool(["vma", "extract", "a.vma", "d"]).within(dir.path()).ok();
    assert_eq!(names(dir.path()), ["a.vma", "d"]);
    let made = names(&dir.path().join("d"));
    let expected = [".._out.conf", "disk-.._.._up-2.raw", "disk-.._.._up-3.raw", "disk-.._.._up.raw"];
    assert_eq!(made, expected, "each of its own name");
    // The disk gets the name that programs look for; the configuration file gets another.
    let disk = std::fs::read(dir.path().join("d/disk-.._.._up.raw")).unwrap();
    assert!(disk.len() == 65_536 && disk[..4096] == images::noise(1, 4096));
    assert_eq!(std::fs::read(dir.path().join("d/disk-.._.._up-3.raw")).unwrap(), b"y");
    run.says("vma: note: device 1 '../../up' is written to 'disk-.._.._up.raw'")
        .says("vma: note: device 2 '../../up' is written to 'disk-.._.._up-2.raw'")
        .says("vma: note: configuration '../out.conf' is written as '.._out.conf'")
        .says("vma: note: configuration 'disk-.._.._up.raw' is written as 'disk-.._.._up-3.raw'");
}
