//! Names with a protocol, as qemu-img knows them.

use imgtool_testing::{assert_same, names, oracles, require, snapshot};

use super::with_disk;
use crate::support::imgtool;

#[test]
fn file_names_a_file() {
    let dir = with_disk();
    let path = |name: &str| dir.path().join(name);
    imgtool(["convert", "file:disk.raw", "--to", "raw", "file:o.raw"]).within(dir.path()).ok();
    imgtool(["convert", "x=file:disk.raw", "--target", "x=file:t.raw"]).within(dir.path()).ok();
    let absolute = format!("file:{}", path("a.raw").display());
    imgtool(["convert", "disk.raw", &absolute]).within(dir.path()).ok();
    imgtool(["create", "-f", "qcow2", "file:new.qcow2", "1M"]).within(dir.path()).ok();
    imgtool(["convert", "disk.raw", "--to", "qcow2", "file:there/"]).within(dir.path()).ok();
    assert_eq!(names(dir.path()), ["a.raw", "disk.raw", "new.qcow2", "o.raw", "t.raw", "there"]);
    for name in ["o.raw", "t.raw", "a.raw"] {
        assert_same(&path("disk.raw"), &path(name), name);
    }
    for line in ["info", "map", "checksum", "measure -O qcow2"] {
        let line = line.split(' ').chain(["file:disk.raw"]);
        imgtool(line).within(dir.path()).ok();
    }
    imgtool(["check", "file:new.qcow2"]).within(dir.path()).ok();
    imgtool(["compare", "file:disk.raw", "file:o.raw"]).within(dir.path()).ok();
    // A source is not its own target.
    let run = imgtool(["convert", "--force", "disk.raw", "--to", "raw", "file:disk.raw"]).within(dir.path());
    run.go().exits(1).says("same file");
    // A file that is really called so.
    std::fs::rename(path("o.raw"), path("file:o.raw")).unwrap();
    imgtool(["convert", "./file:o.raw", "--to", "raw", "./file:p.raw"]).within(dir.path()).ok();
    assert_same(&path("disk.raw"), &path("file:p.raw"), "./file:");
    imgtool(["info", "file:o.raw"]).within(dir.path()).go().exits(1).says("o.raw");
}

#[test]
fn refuses_other_protocols_by_name() {
    let dir = with_disk();
    let before = snapshot(dir.path());
    for name in ["nbd:localhost:10809", "host_device:/dev/null", "ssh:x"] {
        let protocol = &name[..=name.find(':').unwrap()];
        for line in [
            &["convert", name, "--to", "raw", "x.raw"][..],
            &["convert", "disk.raw", "--to", "raw", name],
            &["create", "-f", "raw", name, "1M"],
            &["info", name],
            &["map", name],
            &["measure", "-O", "raw", name],
            &["checksum", name],
            &["compare", "disk.raw", name],
        ] {
            imgtool(line).within(dir.path()).go().exits(2).says(&format!("{protocol} is not supported"));
            assert_eq!(snapshot(dir.path()), before, "{line:?}");
        }
    }
    let run = imgtool(["convert", "x=nbd:localhost:1", "--target", "x=y.raw"]).within(dir.path()).go();
    run.exits(2).says("nbd: is not supported");
    // Colons elsewhere are part of a name.
    std::fs::rename(dir.path().join("disk.raw"), dir.path().join("vm:1.raw")).unwrap();
    imgtool(["convert", "vm:1.raw", "--to", "raw", "copy:1.raw"]).within(dir.path()).ok();
}

#[test]
fn a_backing_chain_without_end_is_an_error() {
    require!("qemu-img");
    let dir = with_disk();
    let make = |args: &[&str]| drop(oracles::run_in("qemu-img", dir.path(), args));
    make(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    make(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    make(&["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]);
    make(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "json:{\"driver\":\"null-co\"}",
        "-F",
        "raw",
        "j.qcow2",
        "1M",
    ]);
    make(&["create", "-q", "-u", "-f", "qcow2", "-b", "gone.qcow2", "-F", "qcow2", "g.qcow2", "1M"]);
    for (image, shown, words) in [
        ("b.qcow2", &["b.qcow2", "a.qcow2"][..], "leads back to an image of the same chain"),
        ("j.qcow2", &["j.qcow2"], "is not a plain file name"),
        ("g.qcow2", &["g.qcow2"], "gone.qcow2"),
    ] {
        let line = ["info", "--backing-chain", "--allow-external", "chain", "--output", "json", image];
        let run = imgtool(line).within(dir.path()).go().exits(1).says(words);
        let json = run.json();
        let found: Vec<&str> =
            json.as_array().unwrap().iter().map(|image| image["filename"].as_str().unwrap()).collect();
        assert_eq!(found, shown, "{image}");
        let line = ["info", "--backing-chain", "--allow-external", "chain", image];
        let text = imgtool(line).within(dir.path()).go().exits(1).says(words).text();
        assert!(text.contains("the rest of the chain is not shown"), "{text}");
    }
    // Without permission, the chain ends with a note.
    imgtool(["info", "--backing-chain", "b.qcow2"]).within(dir.path()).ok();
}
