//! `map` and `measure` print the same numbers as qemu-img, for images that qemu-img and qemu-io made: every
//! cluster size, versions, subclusters, compression, snapshots, preallocation, data files, chains.

use std::path::Path;

use imgtool_testing::{images, oracles, require, tempdir, text};
use serde_json::Value;

use crate::support::imgtool;

/// Images in a temporary directory, most of them made by other programs.
struct Gallery {
    dir: tempfile::TempDir,
    names: Vec<(String, &'static str)>,
}

impl Gallery {
    fn new() -> Self {
        Self { dir: tempdir(), names: Vec::new() }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn create(&mut self, name: &str, options: &str, size: &str) {
        let path = self.path(name);
        oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
        self.names.push((name.to_owned(), "qcow2"));
    }

    fn write(&self, name: &str, commands: &[&str]) {
        let path = self.path(name);
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(text(&path));
        oracles::run("qemu-io", &args);
    }

    fn scribble(&self, name: &str, compressed: bool, v3: bool) {
        if compressed {
            self.write(name, &["write -q -c -P 77 4M 2M", "write -q -c -P 78 6M 2M"]);
        }
        self.write(
            name,
            &[
                "write -q -P 1 0 70k",
                "write -q -P 2 300000 1234",
                "write -q -P 3 1M 512",
                "write -q -P 4 2M 2M",
                "write -q -z 2200k 300k",
                "discard -q 2600k 200k",
            ],
        );
        if v3 {
            self.write(name, &["write -q -z -u 2900k 64k", "write -q -z 500k 100k"]);
        }
    }
}

fn single_images(gallery: &mut Gallery) {
    for cluster in ["512", "4k", "64k", "2M"] {
        for (kind, set) in [
            ("plain", ""),
            ("v2", ",compat=0.10"),
            ("sub", ",extended_l2=on"),
            ("beside", ",data_file=DATA"),
            ("raw-beside", ",data_file=DATA,data_file_raw=on"),
            ("metadata", ",preallocation=metadata"),
            ("full", ",preallocation=full"),
            ("sub-metadata", ",extended_l2=on,preallocation=metadata"),
        ] {
            let too_small = kind.starts_with("sub") && matches!(cluster, "512" | "4k");
            let enough = matches!(cluster, "4k" | "64k") || matches!(kind, "plain" | "sub");
            if too_small || !enough {
                continue;
            }
            let name = format!("{kind}-{cluster}");
            let data = text(&gallery.path(&format!("{name}.data"))).to_owned();
            gallery.create(&name, &format!("cluster_size={cluster}{}", set.replace("DATA", &data)), "8M");
            let plain = !set.contains("data_file") && !set.contains("preallocation");
            gallery.scribble(&name, plain, kind != "v2");
            if plain {
                let path = gallery.path(&name);
                oracles::run("qemu-img", &["snapshot", "-c", "before", text(&path)]);
                gallery.write(&name, &["write -q -P 8 3M 100k"]);
            }
        }
    }
}

fn chains(gallery: &mut Gallery) {
    images::Image::hole("bottom", 3_000_320)
        .with(0, images::noise(1, 100_000))
        .with(2_100_000, images::noise(2, 900_320))
        .write_raw(&gallery.path("bottom"));
    gallery.names.push(("bottom".into(), "raw"));
    gallery.create("one", "cluster_size=2M,backing_file=bottom,backing_fmt=raw", "8M");
    gallery.scribble("one", true, true);
    gallery.create("two", "cluster_size=4k,compat=0.10,backing_file=one,backing_fmt=qcow2", "9M");
    gallery.write("two", &["write -q -P 7 5M 300k", "write -q -P 8 600k 10k"]);
    gallery.create("three", "extended_l2=on,backing_file=two,backing_fmt=qcow2", "12M");
    gallery.write("three", &["write -q -z 5100k 100k", "write -q -P 8 11M 10k", "write -q -P 9 6k 2k"]);
    gallery.create("four", "backing_file=three,backing_fmt=qcow2", "5M");
    gallery.write("four", &["write -q -P 8 1M 10k"]);
}

/// Adds images that qemu-img compressed, and images that our program converted.
fn converted(gallery: &mut Gallery) {
    for (from, name) in [("plain-64k", "packed"), ("three", "packed-chain")] {
        let (from, to) = (gallery.path(from), gallery.path(name));
        oracles::run("qemu-img", &["convert", "-c", "-O", "qcow2", text(&from), text(&to)]);
        let ours = gallery.path(&format!("ours-{name}"));
        imgtool(["convert", "-q", "--allow-external", "chain", text(&from), "--to", "qcow2", text(&ours)])
            .ok();
        gallery.names.push((name.to_owned(), "qcow2"));
        gallery.names.push((format!("ours-{name}"), "qcow2"));
    }
}

fn theirs(args: &[&str], path: &Path) -> Value {
    let output = oracles::run("qemu-img", &[args, &[text(path)]].concat());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn without(mut value: Value, field: &str) -> Value {
    for entry in value.as_array_mut().unwrap() {
        entry.as_object_mut().unwrap().remove(field);
    }
    value
}

#[test]
fn map_and_measure_match_qemu_img() {
    require!("qemu-img", "qemu-io");
    let mut gallery = Gallery::new();
    single_images(&mut gallery);
    chains(&mut gallery);
    converted(&mut gallery);
    assert_same_map(&gallery);
    assert_same_measure(&gallery);
}

#[track_caller]
fn assert_same_map(gallery: &Gallery) {
    for (name, format) in &gallery.names {
        let path = gallery.path(name);
        let theirs = theirs(&["map", "--output=json", "-f", format], &path);
        let line = ["map", "--output", "json", "-f", format, "--allow-external", "chain", text(&path)];
        let ours = without(imgtool(line).ok().json(), "device");
        assert!(ours == theirs, "{name}:\n{ours:#}\nqemu-img:\n{theirs:#}");
        let window = ["--start-offset", "1000k", "--max-length", "1500k"];
        let theirs = oracles::run(
            "qemu-img",
            &[&["map", "--output=json", "-f", format][..], &window, &[text(&path)]].concat(),
        );
        let theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
        let ours = without(imgtool(line).args(window).ok().json(), "device");
        assert!(ours == theirs, "{name}, a part:\n{ours:#}\nqemu-img:\n{theirs:#}");
    }
}

#[test]
fn text_map_names_every_file_of_the_chain() {
    require!("qemu-img", "qemu-io");
    let mut gallery = Gallery::new();
    chains(&mut gallery);
    let top = gallery.path("three");
    let said = imgtool(["map", "--allow-external", "chain", text(&top)]).ok().text();
    for name in ["three", "two", "one"] {
        assert!(said.lines().any(|line| line.ends_with(&format!("/{name}"))), "{name}: {said}");
    }
    assert!(said.contains("compressed"), "{said}");
    imgtool(["map", text(&top)]).go().exits(1).says("refusing to open the backing file");
}

#[track_caller]
fn assert_same_measure(gallery: &Gallery) {
    let sets = [
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
        "preallocation=metadata",
        "preallocation=falloc",
        "compat=0.10,cluster_size=4k",
        "backing_file=bottom,backing_fmt=raw",
        "data_file=d",
    ];
    for (number, (name, format)) in gallery.names.iter().enumerate() {
        let path = gallery.path(name);
        // Three sets for each image, so that the images together cover all sets.
        for set in sets.iter().cycle().skip(number * 3).take(3) {
            let args = ["measure", "--output=json", "-f", format, "-O", "qcow2", "-o", set];
            let theirs = theirs(&args, &path);
            let line = ["measure", "--output", "json", "-f", format, "-O", "qcow2", "-o", set, text(&path)];
            let ours = imgtool(line).args(["--allow-external", "chain"]).ok().json();
            for field in ["required", "fully-allocated"] {
                assert_eq!(ours[field], theirs[field], "{name} {set} {field}");
            }
        }
        let theirs = theirs(&["measure", "--output=json", "-f", format, "-O", "raw"], &path);
        let line = ["measure", "--output", "json", "-f", format, "--allow-external", "chain", text(&path)];
        assert_eq!(imgtool(line).ok().json(), theirs, "{name} to raw");
    }
}

#[test]
fn measure_of_an_empty_disk_matches_qemu_img() {
    require!("qemu-img");
    for size in ["0", "512", "1M", "5G", "64T", "1P"] {
        for set in ["compat=1.1", "cluster_size=2M", "refcount_bits=64", "extended_l2=on,cluster_size=128k"] {
            let line = ["measure", "--output=json", "-O", "qcow2", "-o", set, "--size", size];
            let theirs: Value = serde_json::from_slice(&oracles::run("qemu-img", &line).stdout).unwrap();
            let ours = imgtool(["measure", "--output", "json", "-O", "qcow2", "-o", set, "--size", size]);
            assert_eq!(ours.ok().json(), theirs, "{size} {set}");
        }
    }
}
