//! `check`, `measure` and extents, compared with qemu-img.

use std::path::Path;

use imgtool_core::{CreateOptions, DeviceId, Driver, OpenOptions};
use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_testing::conformance::{self as laws, Content, Fill, Image, scratch};
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::require;
use serde_json::Value;

use crate::tools::options;

const MIB: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;

/// An image made by qemu-io with data, compressed and preallocated zero clusters, and the host offsets of its
/// tables.
struct MixedImage {
    bytes: Vec<u8>,
    l1: usize,
    l2: usize,
    refcount_table: usize,
    refcount_block: usize,
}

impl MixedImage {
    fn make(directory: &Path) -> Self {
        run_in("qemu-img", directory, &["create", "-q", "-f", "qcow2", "image", "8M"]);
        for command in [
            "write -c -P 3 4M 64k",
            "write -P 1 0 70k",
            "write -P 2 2M 64k",
            "write -z 2M 64k",
            "write -c -P 4 4160k 64k",
            "write -P 5 5M 64k",
        ] {
            run_in("qemu-io", directory, &["-c", command, "image"]);
        }
        let mut image = Self {
            bytes: std::fs::read(directory.join("image")).unwrap(),
            l1: 0,
            l2: 0,
            refcount_table: 0,
            refcount_block: 0,
        };
        let place = |image: &Self, at: usize| (image.get(at) & 0x00ff_ffff_ffff_fe00) as usize;
        image.l1 = place(&image, 40);
        image.l2 = place(&image, image.l1);
        image.refcount_table = place(&image, 48);
        image.refcount_block = place(&image, image.refcount_table);
        image
    }

    fn get(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn with(&self, at: usize, value: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    fn with_refcount(&self, cluster: usize, value: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let at = self.refcount_block + 2 * cluster;
        bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    /// Returns damaged copies, one per kind of damage that qemu-img counts without reading garbage as a
    /// table.
    fn damaged(&self) -> Vec<(&'static str, Vec<u8>)> {
        let (l1, l2, table) = (self.l1, self.l2, self.refcount_table);
        let compressed = l2 + 8 * 64;
        let data_cluster = (self.get(l2) & 0x00ff_ffff_ffff_fe00) as usize >> 16;
        vec![
            ("nothing", self.bytes.clone()),
            ("l1: reserved bit", self.with(l1, self.get(l1) | 1)),
            ("l1: beyond the end", self.with(l1, COPIED | 0x1000_0000)),
            ("l1: not copied", self.with(l1, self.get(l1) & !COPIED)),
            ("l1: empty", self.with(l1, 0)),
            ("l2: reserved bit", self.with(l2, self.get(l2) | 2)),
            ("l2: unaligned", self.with(l2, self.get(l2) | 0x200)),
            ("l2: beyond the end", self.with(l2, COPIED | 0x1000_0000)),
            ("l2: twice", self.with(l2, self.get(l2 + 8))),
            ("l2: overlaps the refcount table", self.with(l2, COPIED | table as u64)),
            ("l2: overlaps itself", self.with(l2, COPIED | l2 as u64)),
            ("l2: overlaps the header", self.with(l2, 1 | COPIED)),
            ("l2: not copied", self.with(l2, self.get(l2) & !COPIED)),
            ("l2: compressed and copied", self.with(compressed, self.get(compressed) | COPIED)),
            ("l2: compressed beyond the end", self.with(compressed, 1 << 62 | 0x1000_0000)),
            ("l2: plain zero", self.with(l2, 1)),
            ("l2: zero, unaligned", self.with(l2 + 8 * 32, COPIED | 0x5_0201)),
            ("refcount table: reserved bit", self.with(table, self.get(table) | 1)),
            ("refcount table: beyond the end", self.with(table, 0x1000_0000)),
            ("refcount table: empty", self.with(table, 0)),
            ("refcount table: block twice", self.with(table + 8, self.get(table))),
            ("refcount block: header is free", self.with_refcount(0, 0)),
            ("refcount block: data has two", self.with_refcount(data_cluster, 2)),
            ("refcount block: data is free", self.with_refcount(data_cluster, 0)),
            ("refcount block: itself is free", self.with_refcount(self.refcount_block >> 16, 0)),
            ("refcount block: beyond the end", self.with_refcount(200, 1)),
            ("cut", self.bytes[..self.bytes.len() - 65_536].to_vec()),
        ]
    }
}

fn number(json: &Value, key: &str) -> u64 {
    json[key].as_u64().unwrap_or(0)
}

#[track_caller]
fn assert_same_check(directory: &Path, image: &str, what: &str) {
    let plain = ["check", "-f", "qcow2", "--output=json", image];
    let secret = "secret,id=s,data=geheim00";
    let file = format!("driver=qcow2,file.filename={image},encrypt.key-secret=s");
    let encrypted = ["check", "--output=json", "--object", secret, "--image-opts", &file];
    let args = if what.contains("luks") { &encrypted[..] } else { &plain };
    let (code, out, _) = try_run_in("qemu-img", directory, args);
    let input = laws::input(&directory.join(image)).unwrap();
    let ours = Qcow2Driver.check(input, &OpenOptions::default());
    let Ok(theirs) = serde_json::from_str::<Value>(&out) else {
        // qemu-img refuses the length of a snapshot's extra data, and so does our check.
        assert_ne!(code, 0, "{what}: {out}");
        let error = ours.expect_err(what);
        assert!(error.to_string().contains("bytes of extra data"), "{what}: {error}");
        return;
    };
    let ours = ours.unwrap_or_else(|e| panic!("{what}: {e}, qemu-img: {theirs}"));
    let found = &ours.findings;
    // Version 2 images with zero clusters pass qemu-img check, although qemu-img cannot read them.
    let v2_zero_clusters = u64::from(found.iter().any(|finding| finding.contains("in a version 2 image")));
    assert_eq!(
        ours.corruptions - v2_zero_clusters,
        number(&theirs, "corruptions"),
        "{what}: {found:#?} {theirs}"
    );
    assert_eq!(ours.leaks, number(&theirs, "leaks"), "{what}: {found:#?}");
    assert_eq!(ours.check_errors, number(&theirs, "check-errors"), "{what}");
    assert_eq!(ours.image_end_offset, Some(number(&theirs, "image-end-offset")), "{what}");
    assert_eq!(ours.total_clusters, Some(number(&theirs, "total-clusters")), "{what}");
    assert_eq!(ours.allocated_clusters.unwrap_or(0), number(&theirs, "allocated-clusters"), "{what}");
    assert_eq!(ours.fragmented_clusters.unwrap_or(0), number(&theirs, "fragmented-clusters"), "{what}");
    assert_eq!(ours.compressed_clusters.unwrap_or(0), number(&theirs, "compressed-clusters"), "{what}");
}

#[test]
fn counts_damage_like_qemu_img() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    let image = MixedImage::make(directory.path());
    for (what, bytes) in image.damaged() {
        std::fs::write(directory.path().join("x"), bytes).unwrap();
        assert_same_check(directory.path(), "x", what);
    }
}

/// Returns wrong values for a table entry.
fn wrong_entries(old: u64, places: &[u64], cluster_size: u64, file_len: u64) -> Vec<u64> {
    let mut values = vec![0, old | 1, old | 0x100, old | 0x200, old | (1 << 60), old ^ COPIED];
    values.extend([old.wrapping_add(cluster_size), COPIED | (1 << 40), (1 << 62) | (1 << 30), u64::MAX >> 1]);
    // Right after the end of the file. A cluster partly beyond the end is a different case.
    values.push(COPIED | (file_len / cluster_size * cluster_size));
    values.extend(places);
    values.extend(places.iter().map(|place| COPIED | place));
    values
}

/// An image made by qemu-img, and the file offsets of entries to damage.
struct VariantImage {
    bytes: Vec<u8>,
    /// Name and file offset of eight-byte entries.
    entries: Vec<(&'static str, usize)>,
    /// Host offsets of tables that a damaged entry may overlap.
    places: Vec<u64>,
    refcount_block: usize,
    cluster_size: u64,
}

impl VariantImage {
    fn make(directory: &Path, set: &str, rich: bool) -> Self {
        run_in("qemu-img", directory, &["create", "-q", "-f", "qcow2", "-o", set, "image", "8M"]);
        let write = |command: &str| {
            run_in("qemu-io", directory, &["-c", command, "image"]);
        };
        if rich {
            write("write -q -c -P 3 4M 256k");
        }
        for command in
            ["write -q -P 1 0 70k", "write -q -P 2 2M 300k", "write -q -z 2M 64k", "write -q -P 5 5M 64k"]
        {
            write(command);
        }
        if rich {
            run_in("qemu-img", directory, &["snapshot", "-c", "one", "image"]);
            write("write -q -P 9 64k 128k");
            run_in("qemu-img", directory, &["snapshot", "-c", "two", "image"]);
        }
        let bytes = std::fs::read(directory.join("image")).unwrap();
        let be64 = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
        let place = |at: u64| be64(at) & 0x00ff_ffff_ffff_fe00;
        let (l1, refcount_table, snapshots) = (place(40), place(48), be64(64));
        let (l2, refcount_block) = (place(l1), place(refcount_table));
        let words = if set.contains("extended_l2") { 2 } else { 1 };
        let mut entries = Vec::new();
        for (name, table, step, numbers) in [
            ("l1", l1, 1, &[0u64][..]),
            ("l2", l2, words, &[0, 1, 5, 30]),
            ("refcount table", refcount_table, 1, &[0, 1]),
        ] {
            entries.extend(numbers.iter().map(|number| (name, (table + number * 8 * step) as usize)));
        }
        if words == 2 {
            entries.extend([0u64, 1, 30, 66].map(|number| ("bitmap", (l2 + number * 16 + 8) as usize)));
        }
        if snapshots != 0 {
            entries.extend([0usize, 4].map(|word| ("snapshot", snapshots as usize + word * 8)));
        }
        let cluster_size = 1 << bytes[23];
        Self {
            entries,
            places: vec![l2, refcount_table, refcount_block, l1],
            refcount_block: refcount_block as usize,
            cluster_size,
            bytes,
        }
    }

    fn damaged(&self) -> Vec<(String, Vec<u8>)> {
        let mut damaged = Vec::new();
        let file_len = self.bytes.len() as u64;
        for &(name, at) in &self.entries {
            let old = u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap());
            for value in wrong_entries(old, &self.places, self.cluster_size, file_len) {
                // qemu-img gives up if a snapshot's table is beyond 2^63.
                if name == "snapshot" && value >> 63 == 1 {
                    continue;
                }
                let mut bytes = self.bytes.clone();
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                damaged.push((format!("{name} at {at:#x}: {old:x} -> {value:x}"), bytes));
            }
        }
        for byte in (0..48).step_by(5) {
            let mut bytes = self.bytes.clone();
            bytes[self.refcount_block + byte] ^= 1 << (byte % 8);
            damaged.push((format!("refcount block, byte {byte}"), bytes));
        }
        for cut in [1, self.cluster_size, self.cluster_size * 3, file_len / 2] {
            damaged.push((format!("{cut} bytes cut off"), self.bytes[..(file_len - cut) as usize].to_vec()));
        }
        damaged
    }
}

#[test]
fn counts_damage_in_each_image_variant_like_qemu_img() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for (set, rich) in [
        ("compat=1.1", true),
        ("extended_l2=on", true),
        ("compat=0.10,cluster_size=4k", true),
        ("cluster_size=4k,refcount_bits=1", false),
        ("cluster_size=512,refcount_bits=64", false),
    ] {
        let image = VariantImage::make(directory.path(), set, rich);
        for (what, bytes) in image.damaged() {
            std::fs::write(directory.path().join("x"), bytes).unwrap();
            assert_same_check(directory.path(), "x", &format!("{set}, {what}"));
        }
    }
}

#[test]
fn passes_sound_foreign_images() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for set in [
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "extended_l2=on",
        "preallocation=metadata",
        "data_file=d",
        "data_file=d,data_file_raw=on",
        "encrypt.format=luks,encrypt.key-secret=s",
    ] {
        let create =
            ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=geheim00", "-o", set, "x", "600M"];
        run_in("qemu-img", directory.path(), &create);
        if !set.contains("luks") {
            let _ = std::fs::remove_file(directory.path().join("b"));
            for command in
                ["write -P 1 0 70k", "write -P 2 590M 2M", "write -P 3 100M 9k", "discard 590M 64k"]
            {
                run_in("qemu-io", directory.path(), &["-c", command, "x"]);
            }
            if !set.contains("data_file") && !set.contains("refcount_bits=1") {
                run_in("qemu-img", directory.path(), &["snapshot", "-c", "one", "x"]);
                run_in("qemu-io", directory.path(), &["-c", "write -P 9 0 64k", "x"]);
            }
            if set != "compat=0.10" {
                run_in("qemu-img", directory.path(), &["bitmap", "--add", "-g", "64k", "x", "b0"]);
                run_in("qemu-io", directory.path(), &["-c", "write -P 9 2M 64k", "x"]);
            }
        }
        assert_same_check(directory.path(), "x", set);
    }
}

fn measured_images() -> Vec<Image> {
    let content = Content::zero().with(0..70_000, Fill::Random).with(9 * MIB..12 * MIB + 5, Fill::Text);
    vec![
        Image::disk("empty", 0, Content::zero()),
        Image::disk("odd", 1_000_000, Content::zero().with(5000..6000, Fill::Random)),
        Image::disk("some", 20 * MIB, content),
        laws::far_apart(),
    ]
}

#[test]
fn measure_agrees_with_qemu_img() {
    require!("qemu-img");
    let directory = scratch();
    for image in measured_images() {
        let raw = laws::make(&RawDriver, &CreateOptions::default(), &image, directory.path());
        for set in [
            "compat=1.1",
            "cluster_size=512",
            "cluster_size=2M",
            "refcount_bits=64",
            "extended_l2=on",
            "preallocation=metadata",
        ] {
            let args =
                ["measure", "--output=json", "-f", "raw", "-O", "qcow2", "-o", set, raw.to_str().unwrap()];
            let theirs: Value = serde_json::from_str(&run_in("qemu-img", directory.path(), &args)).unwrap();
            let source = laws::open(&RawDriver, &raw).unwrap();
            let ours = Qcow2Driver.writer(&options(set)).unwrap().measure(&*source).unwrap();
            assert_eq!(ours.required, number(&theirs, "required"), "{image} {set}");
            assert_eq!(ours.fully_allocated, number(&theirs, "fully-allocated"), "{image} {set}");
        }
    }
}

/// Joins adjacent runs (start, length, true if zero) like qemu-img's map.
fn join_runs(runs: impl Iterator<Item = (u64, u64, bool)>) -> Vec<(u64, u64, bool)> {
    let mut joined: Vec<(u64, u64, bool)> = Vec::new();
    for (start, len, zero) in runs {
        match joined.last_mut() {
            Some(last) if last.2 == zero && last.0 + last.1 == start => last.1 += len,
            _ => joined.push((start, len, zero)),
        }
    }
    joined
}

#[test]
fn extents_agree_with_qemu_img_map() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for set in ["compat=1.1", "cluster_size=512", "extended_l2=on", "cluster_size=2M"] {
        run_in("qemu-img", directory.path(), &["create", "-q", "-f", "qcow2", "-o", set, "x", "1200M"]);
        for command in [
            "write -c -P 1 4M 2M",
            "write -P 1 0 70k",
            "write -z 2M 300k",
            "write -P 2 511M 2M",
            "write -P 3 1100M 1",
            "discard 512M 64k",
        ] {
            run_in("qemu-io", directory.path(), &["-c", command, "x"]);
        }
        let theirs: Value =
            serde_json::from_str(&run_in("qemu-img", directory.path(), &["map", "--output=json", "x"]))
                .unwrap();
        let theirs = join_runs(
            theirs
                .as_array()
                .unwrap()
                .iter()
                .map(|run| (number(run, "start"), number(run, "length"), run["zero"].as_bool().unwrap())),
        );
        let source = laws::open(&Qcow2Driver, &directory.path().join("x")).unwrap();
        let random = source.access().random().unwrap();
        let (mut ours, mut at) = (Vec::new(), 0);
        while at < 1200 * MIB {
            let extents = random.extents(DeviceId(0), at..1200 * MIB).unwrap();
            at = extents.last().unwrap().end();
            ours.extend(extents.into_iter().map(|extent| (extent.start, extent.len, !extent.is_data())));
        }
        // With small clusters, our extents show holes of the file more finely than qemu-img's map.
        let ours = join_runs(ours.into_iter());
        for (start, len, _) in ours.iter().filter(|run| !run.2) {
            let within = theirs.iter().any(|run| !run.2 && run.0 <= *start && start + len <= run.0 + run.1);
            assert!(within, "{set}: data at {start}, {len} bytes, is zero for qemu-img: {theirs:?}");
        }
        assert!(ours.iter().filter(|run| !run.2).count() >= 4, "{ours:?}");
    }
}

#[test]
fn check_reports_an_unreadable_image() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    let path = directory.path().join("x");
    run_in("qemu-img", directory.path(), &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "x", "1M"]);
    run_in("qemu-io", directory.path(), &["-c", "write -P 5 0 64k", "x"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let be = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (be(be(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // The zero flag, which version 2 does not have.
    bytes[l2 + 7] |= 1;
    std::fs::write(&path, bytes).unwrap();
    let (code, _, _) = try_run_in("qemu-img", directory.path(), &["convert", "-O", "raw", "x", "y"]);
    assert_ne!(code, 0);
    let ours = Qcow2Driver.check(laws::input(&path).unwrap(), &OpenOptions::default()).unwrap();
    assert_eq!((ours.corruptions, ours.leaks, ours.check_errors), (1, 0, 0), "{:?}", ours.findings);
}
