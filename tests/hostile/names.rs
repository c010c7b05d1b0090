//! Names in an image never lead out of the directory, never follow a link, and never reach a terminal
//! unescaped.

use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;
use std::process::Command;

use imgtool_core::error::is_hidden;
use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{fixture, names, require, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::Outcome;

fn small(name: &'static str) -> Image {
    Image::hole(name, 2 * 65_536).with(4096, images::noise(1, 4096))
}

/// Returns names that nobody would give to a disk.
fn odd_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "../escaped",
        "../../escaped",
        "/escaped",
        "//escaped",
        "a/../../escaped",
        "..",
        ".",
        "",
        " ",
        "a/b/c",
        "a\nb",
        "a\rb",
        "\x1b[2J\x1b]0;owned\x07",
        "a\tb",
        "\u{9b}2J",
        "\u{7f}",
        "x\u{202e}war.x",
        "\u{200f}",
        "a\u{61c}b\u{2028}c",
        "sda\u{200b}\u{ad}\u{feff}",
        "\u{e0001}\u{e0041}\u{e007f}x",
        ".hidden",
        "-",
        "--force",
        "con",
        "NUL",
        "aux.raw",
        "c:\\windows\\x",
        "\\\\server\\share\\x",
        "~root",
        "$(id)",
        "`id`",
        "a;b",
        "%s%n",
        "*",
        "ö",
        "vmstate.bin",
        ".x.partial-abcdef",
        "qemu-server.conf",
    ]
    .map(str::to_owned)
    .to_vec();
    names.extend(["x".repeat(255), "y".repeat(4000), "../".repeat(80), "ä".repeat(200)]);
    names
}

/// Asserts that the output contains no character that controls a terminal.
#[track_caller]
fn harmless(run: &Outcome) {
    let said = run.text() + &run.stderr;
    let bad = said.chars().find(|c| is_hidden(*c) && *c != '\n');
    assert!(bad.is_none(), "{}: {bad:?} in {said:?}", run.command);
    assert!(!said.contains("panicked"), "{}: {said}", run.command);
}

/// The characters that are escaped are those to which Unicode gives the categories Cc, Cf, Zl and Zp.
#[test]
fn hidden_characters_are_those_of_unicode() {
    require!("python3");
    let script =
        "import sys, unicodedata as u\nfor c in range(sys.maxunicode + 1): print(u.category(chr(c)))";
    let output = Command::new("python3").args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let categories = String::from_utf8(output.stdout).unwrap();
    for (number, category) in (0u32..).zip(categories.lines()) {
        let Some(c) = char::from_u32(number) else { continue };
        // An older version of Unicode has fewer characters: Cn is an unassigned one.
        if category != "Cn" {
            assert_eq!(is_hidden(c), matches!(category, "Cc" | "Cf" | "Zl" | "Zp"), "{c:?} is {category}");
        }
    }
}

#[test]
fn odd_names_are_confined_and_escaped() {
    let refused = names_that_a_new_archive_refuses();
    for name in odd_names() {
        let dir = tempdir();
        let deep = dir.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let archive = Archive::of([(&*name, small("one")), ("drive-scsi0", small("two"))]);
        let archive =
            if name.contains('\0') || name.is_empty() { archive } else { archive.config(&name, b"x: y\n") };
        std::fs::write(deep.join("x.vma"), archive.build().bytes).unwrap();
        let before = snapshot(dir.path());
        for verb in ["info", "map", "check", "checksum"] {
            for output in ["human", "json"] {
                harmless(&imgtool([verb, "--output", output, "x.vma"]).within(&deep).ok());
            }
        }
        harmless(&imgtool(["map", "--output", "svg", "x.vma"]).within(&deep).ok());
        harmless(&imgtool(["compare", "x.vma", "x.vma"]).within(&deep).ok());
        harmless(&imgtool(["vma", "list", "x.vma"]).within(&deep).ok());
        harmless(&imgtool(["vma", "verify", "-v", "x.vma"]).within(&deep).ok());
        harmless(
            &imgtool(["convert", "x.vma", "--to", "vma", "no/such/directory/x.vma"])
                .within(&deep)
                .go()
                .exits(1),
        );
        assert_eq!(snapshot(dir.path()), before, "{name:?}");
        for line in [
            ["convert", "--progress", "json", "x.vma", "--to", "qcow2", "out/"].as_slice(),
            ["vma", "extract", "-v", "x.vma", "out"].as_slice(),
            ["convert", "--verify", "x.vma", "--to", "vma", "out.vma"].as_slice(),
        ] {
            let run = imgtool(line).within(&deep).go();
            harmless(&run);
            // Readers of archives can't extract names longer than 242 bytes.
            if line.contains(&"out.vma") && (refused.contains(&name) || name.len() > 242) {
                run.exits(2).says("the configuration name");
                continue;
            }
            run.exits(0);
            let after = snapshot(dir.path());
            let new: Vec<&String> = after.keys().filter(|path| !before.contains_key(*path)).collect();
            assert!(new.iter().all(|path| path.starts_with("a/b/out")), "{name:?}: {new:?}");
            let made: Vec<String> = names(&deep).into_iter().filter(|name| name != "x.vma").collect();
            assert_eq!(made, [line.last().unwrap().trim_end_matches('/')], "{name:?}");
            if deep.join("out").is_dir() {
                let files = names(&deep.join("out"));
                assert!(files.len() >= 2, "{name:?}: {files:?}");
                assert!(
                    // `vma extract` keeps a leading dot, like the vma program.
                    files.iter().all(|file| line[0] == "vma" || !file.starts_with('.')),
                    "{files:?}"
                );
                std::fs::remove_dir_all(deep.join("out")).unwrap();
            } else {
                std::fs::remove_file(deep.join("out.vma")).unwrap();
            }
        }
    }
}

/// Returns the names that no configuration file of a new archive may have.
fn names_that_a_new_archive_refuses() -> Vec<String> {
    let short = [
        "..",
        ".",
        "a\nb",
        "a\rb",
        "\x1b[2J\x1b]0;owned\x07",
        "a\tb",
        "\u{9b}2J",
        "\u{7f}",
        "c:\\windows\\x",
        "\\\\server\\share\\x",
    ];
    let long = ["y".repeat(4000), "../".repeat(80), "ä".repeat(200)];
    short.map(str::to_owned).into_iter().chain(long).collect()
}

#[test]
fn writes_254_equally_named_disks_to_254_files() {
    let dir = tempdir();
    let name = "same";
    let archive = Archive::of((0..254).map(|_| (name, Image::hole("x", 65_536)))).build();
    std::fs::write(dir.path().join("x.vma"), archive.bytes).unwrap();
    imgtool(["convert", "x.vma", "--to", "raw", "out/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("out")).len(), 254);
}

/// Creates a link, a directory or a special file at a path.
type Plant<'a> = &'a dyn Fn(&Path);

/// Links and special files that the author of an archive may have planted in the target directory are
/// refused, even with --force, and stay unchanged.
#[test]
fn refuses_planted_links_and_special_files() {
    let dir = tempdir();
    let victim = dir.path().join("victim");
    std::fs::write(&victim, b"precious").unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let source = fixture("two-disks.vma.zst");
    for planted in ["drive-efidisk0.raw", "drive-scsi0.raw", "qemu-server.conf"] {
        let place = out.join(planted);
        let kinds: [(&str, Plant); 6] = [
            ("link to a file", &|place| symlink(&victim, place).unwrap()),
            ("relative link", &|place| symlink("../victim", place).unwrap()),
            ("link to nowhere", &|place| symlink("../not-yet", place).unwrap()),
            ("link to a device", &|place| symlink("/dev/null", place).unwrap()),
            ("directory", &|place| std::fs::create_dir(place).unwrap()),
            ("pipe", &|place| assert!(Command::new("mkfifo").arg(place).status().unwrap().success())),
        ];
        for (kind, plant) in kinds {
            plant(&place);
            for force in [false, true] {
                let line = ["convert", text(&source), "--to", "raw", text(&out)];
                let run = imgtool(line).args(force.then_some("--force")).go().exits(1);
                run.says(planted);
                assert_eq!(std::fs::read(&victim).unwrap(), b"precious", "{kind}");
                assert_eq!(names(&out), [planted], "{kind}");
                assert_eq!(names(dir.path()), ["out", "victim"], "{kind}");
            }
            let meta = std::fs::symlink_metadata(&place).unwrap();
            assert_eq!(meta.file_type().is_fifo(), kind == "pipe");
            if meta.is_dir() { std::fs::remove_dir(&place) } else { std::fs::remove_file(&place) }.unwrap();
        }
        // A hard link to another file: the program replaces the name and does not write to the file.
        std::fs::hard_link(&victim, &place).unwrap();
        imgtool(["convert", "--force", text(&source), "--to", "raw", text(&out)]).ok();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        names(&out).iter().for_each(|name| std::fs::remove_file(out.join(name)).unwrap());
    }
}

/// A user who names a link wants its target to be written.
#[test]
fn follows_a_link_named_by_the_user() {
    let dir = tempdir();
    small("x").write_raw(&dir.path().join("x.raw"));
    std::fs::write(dir.path().join("file"), b"old").unwrap();
    symlink("file", dir.path().join("link")).unwrap();
    imgtool(["convert", "--force", "x.raw", "--to", "raw", "link"]).within(dir.path()).ok();
    assert!(std::fs::symlink_metadata(dir.path().join("link")).unwrap().is_symlink());
    imgtool_testing::assert_same(&dir.path().join("x.raw"), &dir.path().join("file"), "link");
}

#[test]
fn names_from_an_archive_stay_in_the_output_directory() {
    let disk = || Image::hole("d", 65_536).with(0, images::noise(1, 4096));
    for name in ["../evil", "/tmp/evil-absolute", "a/b", "..", ".", "", "x\ny", "\u{1b}[2Jz", "-rf"] {
        let dir = tempdir();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let archive = Archive::of([(name, disk())]).config("../evil.conf", b"x").build();
        let source = inner.join("vm.vma");
        std::fs::write(&source, archive.bytes).unwrap();
        harmless(&imgtool(["convert", text(&source), "--to", "raw", text(&inner.join("out/"))]).ok());
        assert_eq!(names(dir.path()), ["inner"], "{name:?} left the directory");
        let beside: Vec<String> = names(&inner).into_iter().filter(|name| name != "out").collect();
        assert_eq!(beside, ["vm.vma"], "{name:?} left the directory");
        assert!(!std::path::Path::new("/tmp/evil-absolute.raw").exists());
    }
}

#[test]
fn devices_with_equal_names_do_not_overwrite_each_other() {
    let disk = |seed| Image::hole("d", 65_536).with(0, images::noise(seed, 4096));
    let dir = tempdir();
    let archive = Archive::of([("same", disk(1)), ("same", disk(2))]).build();
    let source = dir.path().join("vm.vma");
    std::fs::write(&source, archive.bytes).unwrap();
    let out = dir.path().join("out");
    imgtool(["convert", text(&source), "--to", "raw", text(&out)]).ok();
    assert_eq!(names(&out), ["same-2.raw", "same.raw"]);
    let contents: std::collections::BTreeSet<String> = snapshot(&out).into_values().collect();
    assert_eq!(contents.len(), 2);
}
