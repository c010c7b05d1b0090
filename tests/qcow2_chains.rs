//! New images that rest on others: `create` and `convert` with a backing file or a data file.

use std::path::Path;

use crate::support::images::{self, Image};
use crate::support::oracles::{self, require};
use crate::support::{imgtool, names, snapshot, tempdir, text};

/// `base.raw`, and `base.qcow2` over it with changes.
fn with_bases() -> tempfile::TempDir {
    let dir = tempdir();
    let raw = dir.path().join("base.raw");
    Image::hole("base", 3 << 20)
        .with(0, images::noise(1, 300_000))
        .with(2 << 20, images::noise(2, 70_000))
        .write_raw(&raw);
    let overlay = dir.path().join("base.qcow2");
    let line = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", text(&overlay), "4M"];
    oracles::run("qemu-img", &line);
    write(&overlay, &["write -q -P 7 1M 100k", "write -q -z 0 64k"]);
    dir
}

fn write(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(path));
    oracles::run("qemu-io", &args);
}

#[test]
fn a_created_overlay_shows_what_its_base_holds() {
    require!("qemu-img", "qemu-io");
    for set in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on", "cluster_size=2M"] {
        for (base, format) in [("base.raw", "raw"), ("base.qcow2", "qcow2")] {
            let dir = with_bases();
            let new = dir.path().join("new.qcow2");
            imgtool(["create", "-f", "qcow2", "-b", base, "-F", format, "-o", set, "new.qcow2"])
                .within(dir.path())
                .ok();
            oracles::qemu_check(&new, "qcow2");
            oracles::qemu_compare(&new, "qcow2", &dir.path().join(base), format);
            let info = oracles::qemu_info(&new, "qcow2");
            assert_eq!(info["backing-filename"], base, "{set}");
            assert_eq!(info["backing-filename-format"], format, "{set}");
            assert_eq!(
                info["virtual-size"],
                oracles::qemu_info(&dir.path().join(base), format)["virtual-size"]
            );
        }
    }
}

#[test]
fn an_overlay_may_be_larger_and_its_base_may_be_missing() {
    require!("qemu-img", "qemu-io");
    let dir = with_bases();
    let options = "backing_file=base.raw,backing_fmt=raw";
    imgtool(["create", "-f", "qcow2", "-o", options, "new.qcow2", "10M"]).within(dir.path()).ok();
    let new = dir.path().join("new.qcow2");
    assert_eq!(oracles::qemu_info(&new, "qcow2")["virtual-size"], 10 << 20);
    oracles::qemu_compare(&new, "qcow2", &dir.path().join("base.raw"), "raw");
    let before = snapshot(dir.path());
    for (line, words) in [
        (&["-b", "nope.raw", "-F", "raw", "x.qcow2", "1M"][..], "nope.raw"),
        (&["-o", "backing_file=base.raw", "x.qcow2", "1M"], "backing_fmt"),
        (&["-b", "json:{\"file.filename\":\"base.raw\"}", "-F", "raw", "x.qcow2", "1M"], "plain file name"),
        (&["-b", "nbd://host/x", "-F", "raw", "x.qcow2", "1M"], "plain file name"),
        (&["-b", "nope.raw", "-F", "raw", "-u", "x.qcow2"], "SIZE is needed"),
        (&["x.qcow2"], "SIZE is needed"),
        (&["-b", "x.qcow2", "-F", "qcow2", "x.qcow2", "1M"], "x.qcow2"),
        (&["-b", "base.qcow2", "-F", "qcow2", "--force", "base.qcow2", "1M"], "base.qcow2"),
    ] {
        let run = imgtool(["create", "-f", "qcow2"]).args(line).within(dir.path()).go().says(words);
        assert_ne!(run.status.code(), Some(0), "{line:?}");
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
    imgtool(["create", "-f", "qcow2", "-b", "nope.raw", "-F", "raw", "-u", "x.qcow2", "1M"])
        .within(dir.path())
        .ok();
    assert_eq!(oracles::qemu_info(&dir.path().join("x.qcow2"), "qcow2")["backing-filename"], "nope.raw");
}

#[test]
fn a_difference_to_a_base_that_is_an_overlay_itself() {
    require!("qemu-img", "qemu-io");
    for set in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on", "cluster_size=2M"] {
        for compress in [false, true] {
            let dir = with_bases();
            let source = dir.path().join("source.qcow2");
            std::fs::copy(dir.path().join("base.qcow2"), &source).unwrap();
            write(&source, &["write -q -P 9 2M 9k", "write -q -z 200k 64k", "discard -q 1M 64k"]);
            let line = ["convert", "source.qcow2", "-B", "base.qcow2", "-F", "qcow2", "-o", set, "new.qcow2"];
            let convert = |extra: &[&str]| {
                let packed: &[&str] = if compress { &["-c"] } else { &[] };
                imgtool(line).args(packed).args(extra).within(dir.path())
            };
            // Source and base both name base.raw: neither may open it unasked.
            let before = snapshot(dir.path());
            convert(&[]).go().exits(1).says("base.raw");
            assert_eq!(snapshot(dir.path()), before);
            convert(&["--allow-external", "chain"]).ok();
            let new = dir.path().join("new.qcow2");
            oracles::qemu_check(&new, "qcow2");
            oracles::qemu_compare(&new, "qcow2", &source, "qcow2");
            imgtool(["compare", "--allow-external", "chain", "new.qcow2", "source.qcow2"])
                .within(dir.path())
                .ok();
            // Only the difference: what differs lies in few clusters.
            let map = imgtool(["map", "--output", "json", "--allow-external", "chain", "new.qcow2"]);
            let map = map.within(dir.path()).ok().json();
            let own: u64 = map
                .as_array()
                .unwrap()
                .iter()
                .filter(|run| run["depth"] == 0 && run["data"] == true)
                .map(|run| run["length"].as_u64().unwrap())
                .sum();
            let most = if set.contains("2M") { 4 << 20 } else { 512 << 10 };
            assert!(own > 0 && own <= most, "{set}: {own} of its own");
        }
    }
}

#[test]
fn data_files_through_create_and_convert() {
    require!("qemu-img", "qemu-io");
    let dir = with_bases();
    let raw = dir.path().join("base.raw");
    for (number, set) in [
        "data_file_raw=off",
        "data_file_raw=on",
        "data_file_raw=on,preallocation=metadata",
        "cluster_size=4k",
    ]
    .iter()
    .enumerate()
    {
        // QEMU takes a relative name as relative to where it runs, we to the image.
        let data = text(&dir.path().join(format!("made-{number}.data"))).to_owned();
        let options = format!("data_file={data},{set}");
        let name = format!("made-{number}.qcow2");
        imgtool(["create", "-f", "qcow2", "-o", &options, &name, "3M"]).within(dir.path()).ok();
        let made = dir.path().join(&name);
        oracles::qemu_check(&made, "qcow2");
        let info = oracles::qemu_info(&made, "qcow2");
        assert_eq!(info["format-specific"]["data"]["data-file"], data);
        write(&made, &["read -q -P 0 0 3M", "write -q -P 5 1M 64k", "read -q -P 5 1M 64k"]);

        let data = text(&dir.path().join(format!("converted-{number}.data"))).to_owned();
        let options = format!("data_file={data},{set}");
        let name = format!("converted-{number}.qcow2");
        imgtool(["convert", "base.raw", "-O", "qcow2", "-o", &options, &name]).within(dir.path()).ok();
        let converted = dir.path().join(&name);
        oracles::qemu_check(&converted, "qcow2");
        oracles::qemu_compare(&converted, "qcow2", &raw, "raw");
        if set.contains("data_file_raw=on") {
            crate::support::assert_same(&raw, &dir.path().join(&data), set);
        }
        // A data file that is there is not written over.
        let before = snapshot(dir.path());
        imgtool(["create", "-f", "qcow2", "-o", &options, "again.qcow2", "3M"])
            .within(dir.path())
            .go()
            .exits(1)
            .says(&data);
        assert_eq!(snapshot(dir.path()), before);
    }
    imgtool(["create", "-f", "qcow2", "-o", "data_file=beside.data", "sub/beside.qcow2", "3M"])
        .within(dir.path())
        .go()
        .exits(1);
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    imgtool(["convert", "base.raw", "-O", "qcow2", "-o", "data_file=beside.data", "sub/beside.qcow2"])
        .within(dir.path())
        .ok();
    imgtool(["compare", "--allow-external", "chain", "sub/beside.qcow2", "base.raw"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("sub")), ["beside.data", "beside.qcow2"]);
    assert!(names(dir.path()).iter().all(|name| !name.contains("partial")));
}
