//! Persistent bitmaps: `convert --bitmaps`, beside qemu-img, qemu-nbd and nbdinfo.

use std::path::{Path, PathBuf};

use imgtool_testing::{oracles, require, sha256_file, snapshot, tempdir, text};
use serde_json::Value;

use crate::support::imgtool;

/// Name, granularity and state of the bitmaps of [`source`].
const BITMAPS: [(&str, &str, bool); 4] = [
    ("coarse", "1M", true),
    ("fine", "512", true),
    ("disabled", "64k", false),
    ("späte Änderung", "4k", true),
];

fn qemu_io(image: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(image));
    oracles::run("qemu-io", &args);
}

/// Creates an image with bitmaps: of single sectors, of the whole disk, of nothing, and one that is disabled.
fn source(directory: &Path) -> PathBuf {
    let path = directory.join("source.qcow2");
    let image = text(&path);
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", image, "67109376"]);
    qemu_io(&path, &["write -q -P 9 0 1M"]);
    for (name, granularity, _) in &BITMAPS[..3] {
        oracles::run("qemu-img", &["bitmap", "--add", "-g", granularity, image, name]);
    }
    qemu_io(
        &path,
        &["write -q -P 1 3M 512", "write -q -P 2 5000k 3M", "write -q 67108864 512", "discard -q 40M 1M"],
    );
    oracles::run("qemu-img", &["bitmap", "--disable", image, "disabled"]);
    let (name, granularity, _) = BITMAPS[3];
    oracles::run("qemu-img", &["bitmap", "--add", "-g", granularity, image, name]);
    qemu_io(&path, &["write -q -P 3 10M 40M"]);
    path
}

/// Returns the dirty ranges of a bitmap, as nbdinfo sees them.
fn dirty(image: &Path, name: &str) -> Value {
    let map = format!("--map=qemu:dirty-bitmap:{name}");
    let line = [&*map, "--json", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, text(image), "]"];
    serde_json::from_slice(&oracles::run("nbdinfo", &line).stdout).unwrap()
}

fn assert_same_bitmaps(ours: &Path, theirs: &Path) {
    let list =
        |image: &Path| oracles::qemu_info(image, "qcow2")["format-specific"]["data"]["bitmaps"].clone();
    assert_eq!(list(ours), list(theirs));
    for bitmap in list(theirs).as_array().unwrap() {
        let name = bitmap["name"].as_str().unwrap();
        assert_eq!(dirty(ours, name), dirty(theirs, name), "{name}");
    }
}

#[test]
fn copies_bitmaps_as_qemu_img_does() {
    require!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let dir = tempdir();
    let source = source(dir.path());
    let theirs = dir.path().join("theirs.qcow2");
    oracles::run("qemu-img", &["convert", "--bitmaps", "-O", "qcow2", text(&source), text(&theirs)]);
    // qemu-nbd looks for a relative name in its own directory.
    let data_file = format!("data_file={},data_file_raw=on", text(&dir.path().join("beside.raw")));
    for options in [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,extended_l2=on",
        "cluster_size=4k,preallocation=metadata,refcount_bits=64",
        &data_file,
    ] {
        let ours = dir.path().join("ours.qcow2");
        let line = ["convert", "--bitmaps", "--force", "--verify", text(&source), "-o", options, text(&ours)];
        imgtool(line).within(dir.path()).ok().says("4 bitmaps");
        let report = imgtool(line).args(["--output", "json"]).within(dir.path()).ok().json();
        assert_eq!(report["outputs"][0]["bitmaps"], 4);
        assert_same_bitmaps(&ours, &theirs);
        oracles::qemu_check(&ours, "qcow2");
        imgtool(["check", text(&ours)]).ok();
        let first = sha256_file(&ours);
        imgtool(line).args(["--threads", "1"]).within(dir.path()).ok();
        assert_eq!(sha256_file(&ours), first, "{options}");
        // A copy of the copy has the same bitmaps.
        let again = dir.path().join("again.qcow2");
        let allow = ["--allow-external", "chain"];
        imgtool(["convert", "--bitmaps", "--force", "-c"]).args(allow).args([&ours, &again]).ok();
        assert_same_bitmaps(&again, &theirs);
    }
    // Without the flag, none.
    let none = ["convert", "--output", "json", text(&source), "none.qcow2"];
    let report = imgtool(none).within(dir.path()).ok().json();
    assert!(report["outputs"][0].get("bitmaps").is_none());
    let info = oracles::qemu_info(&dir.path().join("none.qcow2"), "qcow2");
    assert!(info["format-specific"]["data"].get("bitmaps").is_none());
}

#[test]
fn copies_bitmaps_of_overlays() {
    require!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let dir = tempdir();
    let base = source(dir.path());
    let overlay = dir.path().join("overlay.qcow2");
    let line = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "source.qcow2", text(&overlay)];
    oracles::run("qemu-img", &line);
    oracles::run("qemu-img", &["bitmap", "--add", text(&overlay), "own"]);
    qemu_io(&overlay, &["write -q -P 7 1M 64k"]);
    let line = ["convert", "--bitmaps", "--allow-external", "chain", "overlay.qcow2"];
    imgtool(line).args(["-B", "source.qcow2", "-F", "qcow2", "new.qcow2"]).within(dir.path()).ok();
    assert_same_bitmaps(&dir.path().join("new.qcow2"), &overlay);
    oracles::qemu_compare(&dir.path().join("new.qcow2"), "qcow2", &overlay, "qcow2");
    assert!(base.exists());
}

/// Marks a bitmap as not saved properly.
fn break_bitmap(image: &Path, name: &str) {
    let mut bytes = std::fs::read(image).unwrap();
    // Type, granularity, length of the name, length of the extra data.
    let tail = [&[0, name.len() as u8, 0, 0, 0, 0], name.as_bytes()].concat();
    let at = bytes.windows(tail.len()).rposition(|window| window == tail).unwrap() - 2;
    bytes[at - 1] |= 1;
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn refuses_broken_bitmaps_unless_told_to_skip_them() {
    require!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let dir = tempdir();
    let source = source(dir.path());
    break_bitmap(&source, "fine");
    let before = snapshot(dir.path());
    let convert = |more: &[&str]| {
        imgtool(["convert", "source.qcow2", "--bitmaps", "-O", "qcow2", "new.qcow2"])
            .args(more)
            .within(dir.path())
    };
    convert(&[]).go().exits(1).says("bitmap 'fine' can't be copied").says("--skip-broken-bitmaps");
    assert_eq!(snapshot(dir.path()), before);
    convert(&["--skip-broken-bitmaps"]).ok().says("bitmap 'fine' was left out");
    let theirs = dir.path().join("theirs.qcow2");
    let line = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", text(&source), text(&theirs)];
    oracles::run("qemu-img", &line);
    assert_same_bitmaps(&dir.path().join("new.qcow2"), &theirs);
}

#[test]
fn refuses_bitmaps_where_there_can_be_none() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    source(dir.path());
    std::fs::write(dir.path().join("disk.raw"), [1; 4096]).unwrap();
    oracles::run("qemu-img", &["snapshot", "-c", "one", text(&dir.path().join("source.qcow2"))]);
    let before = snapshot(dir.path());
    for (line, code, words) in [
        (&["--bitmaps", "disk.raw", "new.qcow2"][..], 1, "raw images have no persistent bitmaps"),
        (&["--bitmaps", "source.qcow2", "new.raw"], 1, "the new raw image can't have persistent bitmaps"),
        (&["--bitmaps", "source.qcow2", "-o", "compat=0.10", "new.qcow2"], 1, "version 3"),
        (&["--bitmaps", "source.qcow2", "source.qcow2", "new/"], 2, "one disk into one image"),
        (&["--bitmaps", "-l", "one", "source.qcow2", "new.qcow2"], 2, "not to a snapshot"),
        (&["--skip-broken-bitmaps", "source.qcow2", "new.qcow2"], 2, "--bitmaps"),
    ] {
        imgtool(["convert"]).args(line).within(dir.path()).go().exits(code).says(words);
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
}

#[test]
fn bitmaps_that_can_not_be_relied_on_are_not_copied() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    let image = dir.path().join("twice.qcow2");
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "1M"]);
    for name in ["one", "two"] {
        oracles::run("qemu-img", &["bitmap", "--add", text(&image), name]);
    }
    let original = std::fs::read(&image).unwrap();
    // QEMU opens no image with two bitmaps of one name.
    let mut twice = original.clone();
    let at = twice.windows(3).rposition(|name| name == b"two").unwrap();
    twice[at..at + 3].copy_from_slice(b"one");
    std::fs::write(&image, &twice).unwrap();
    let check = imgtool(["check", "twice.qcow2"]).within(dir.path()).go().ends_with(2);
    assert!(check.text().contains("bitmap 'one' has the name of another bitmap"), "{}", check.text());
    let convert = ["convert", "--bitmaps", "twice.qcow2", "new.qcow2"];
    imgtool(convert).within(dir.path()).go().exits(1).says("has the name of another bitmap");
    imgtool(convert).args(["--skip-broken-bitmaps"]).within(dir.path()).ok().says("'one' was left out");
    let new = oracles::qemu_info(&dir.path().join("new.qcow2"), "qcow2");
    assert_eq!(new["format-specific"]["data"]["bitmaps"].as_array().unwrap().len(), 1);
    // A program that does not know bitmaps clears the autoclear bit when it writes.
    let mut stale = original;
    stale[88..96].fill(0);
    std::fs::write(&image, &stale).unwrap();
    imgtool(convert).args(["--force"]).within(dir.path()).go().exits(1).says("may lack changes");
    imgtool(convert)
        .args(["--force", "--skip-broken-bitmaps"])
        .within(dir.path())
        .ok()
        .says("'two' was left out");
}

#[test]
fn measures_bitmaps_as_qemu_img_does() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    let source = source(dir.path());
    let empty = dir.path().join("empty.qcow2");
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&empty), "300G"]);
    oracles::run("qemu-img", &["bitmap", "--add", "-g", "512", text(&empty), "x"]);
    for image in [&source, &empty] {
        for option in ["cluster_size=64k", "cluster_size=512", "cluster_size=2M"] {
            if option.contains("512") && image == &empty {
                continue;
            }
            let line = ["measure", "--output", "json", "-O", "qcow2", "-o", option, text(image)];
            let theirs: Value = serde_json::from_slice(&oracles::run("qemu-img", &line).stdout).unwrap();
            assert_eq!(imgtool(line).ok().json()["bitmaps"], theirs["bitmaps"], "{option}");
        }
        let line = ["measure", "--output", "json", "-O", "raw", text(image)];
        assert!(imgtool(line).ok().json().get("bitmaps").is_none());
    }
}
