//! Images that we write, read by qemu-img.

use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_toolkit::CreateOptions;
use imgtool_toolkit::conformance::{self as laws, Content, Fill, Image};

use crate::tools::{assert_clean, have, options, run_json};

const MIB: u64 = 1 << 20;

/// Writes an image with every set of options and has qemu-img look at each.
fn check_all(images: &[Image], sets: &[String]) {
    if !have("qemu-img") {
        return;
    }
    for image in images {
        let directory = laws::scratch();
        let raw = laws::make(&RawDriver, &CreateOptions::default(), image, directory.path());
        let raw_name = raw.file_name().unwrap().to_str().unwrap().to_owned();
        for set in sets {
            let path = laws::make(&Qcow2Driver, &options(set), image, directory.path());
            println!("{image}: {set}");
            assert_clean(directory.path(), path.file_name().unwrap().to_str().unwrap(), &raw_name);
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Every combination of a few parts.
fn product(parts: &[&[&str]]) -> Vec<String> {
    let mut sets = vec![String::new()];
    for choices in parts {
        sets = sets
            .iter()
            .flat_map(|set| {
                choices.iter().map(move |choice| match (set.is_empty(), choice.is_empty()) {
                    (true, _) => (*choice).to_owned(),
                    (_, true) => set.clone(),
                    _ => format!("{set},{choice}"),
                })
            })
            .collect();
    }
    sets
}

fn mixed() -> Image {
    let content = Content::zero()
        .with(0..70_000, Fill::Random)
        .with(200_000..900_001, Fill::Text)
        .with(MIB..2 * MIB, Fill::Checker(4096))
        .with(3 * MIB..3 * MIB + 1, Fill::Byte(1))
        .with(5 * MIB - 513..5 * MIB, Fill::Text);
    Image::disk("mixed", 5 * MIB, content)
}

#[test]
fn clusters_versions_and_compression() {
    let sizes = ["cluster_size=512", "cluster_size=4k", "", "cluster_size=2M"];
    let sets = product(&[&sizes, &["", "compat=0.10"], &["", "compress"]]);
    check_all(&[mixed(), Image::disk("all zero", MIB, Content::zero())], &sets);
    check_all(&[mixed()], &product(&[&sizes, &["compress,compression_type=zstd"]]));
}

#[test]
fn refcount_widths() {
    let widths = ["1", "2", "4", "8", "16", "32", "64"].map(|bits| format!("refcount_bits={bits}"));
    let widths: Vec<&str> = widths.iter().map(String::as_str).collect();
    let sets = product(&[&widths, &["cluster_size=512", "", "cluster_size=2M"], &["", "compress"]]);
    check_all(&[mixed()], &sets);
}

#[test]
fn subclusters_lazy_refcounts_preallocation() {
    let sets = product(&[
        &[
            "extended_l2=on",
            "extended_l2=on,cluster_size=16k",
            "extended_l2=on,cluster_size=2M",
            "lazy_refcounts=on",
        ],
        &["", "compress", "compress,compression_type=zstd", "preallocation=metadata"],
    ]);
    check_all(&[mixed()], &sets);
    let sizes = ["cluster_size=512", "", "cluster_size=2M"];
    let kinds = ["preallocation=metadata", "preallocation=falloc", "preallocation=full"];
    check_all(&[mixed()], &product(&[&sizes, &kinds, &["", "compat=v2"]]));
}

#[test]
fn more_than_one_l2_table() {
    let sets =
        product(&[&["", "compress", "cluster_size=4k", "cluster_size=512,compress", "extended_l2=on"]]);
    check_all(&[laws::far_apart()], &sets);
}

#[test]
fn odd_sizes() {
    for size in [0, 1, 511, 512, 513, 65_535, 65_536, 65_537, 1_000_000, 2 * MIB + 1] {
        let content =
            if size == 0 { Content::zero() } else { Content::zero().with(size / 2..size, Fill::Random) };
        let image = Image::disk(format!("{size} bytes"), size, content);
        let sets = product(&[
            &["", "cluster_size=512", "cluster_size=2M"],
            &["", "compress", "preallocation=metadata"],
        ]);
        check_all(&[image], &sets);
    }
}

#[test]
fn info_shows_the_options() {
    if !have("qemu-img") {
        return;
    }
    let directory = laws::scratch();
    let set = "cluster_size=16k,refcount_bits=8,extended_l2=on,compression_type=zstd,lazy_refcounts=on";
    let path = laws::make(&Qcow2Driver, &options(set), &mixed(), directory.path());
    let info = run_json("qemu-img", directory.path(), &["info", "--output=json", path.to_str().unwrap()]);
    assert_eq!(info["cluster-size"], 16384);
    assert_eq!(info["virtual-size"], 5 * MIB);
    let data = &info["format-specific"]["data"];
    assert_eq!(data["compat"], "1.1");
    assert_eq!(data["refcount-bits"], 8);
    assert_eq!(data["extended-l2"], true);
    assert_eq!(data["compression-type"], "zstd");
    assert_eq!(data["lazy-refcounts"], true);
    let path = laws::make(&Qcow2Driver, &options("compat=0.10"), &mixed(), directory.path());
    let info = run_json("qemu-img", directory.path(), &["info", "--output=json", path.to_str().unwrap()]);
    assert_eq!(info["format-specific"]["data"]["compat"], "0.10");
}
