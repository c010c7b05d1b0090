//! Images of this driver, read by qemu-img.

use std::path::Path;

use imgtool_core::{CreateOptions, Driver, Remedy};
use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_testing::conformance::{self as laws, Content, FileOutputs, Fill, Image};
use imgtool_testing::oracles::{assert_clean_qcow2, run_json_in, try_run_in};
use imgtool_testing::require;

use crate::tools::{options, write};

const MIB: u64 = 1 << 20;

/// Writes each image with each set of options, and checks and compares it with qemu-img.
fn check_all(images: &[Image], sets: &[String]) {
    require!("qemu-img");
    for image in images {
        let directory = laws::scratch();
        let raw = laws::make(&RawDriver, &CreateOptions::default(), image, directory.path());
        let name = |path: &Path| path.strip_prefix(directory.path()).unwrap().to_str().unwrap().to_owned();
        let raw_name = name(&raw);
        for set in sets {
            let path = laws::make(&Qcow2Driver, &options(set), image, directory.path());
            println!("{image}: {set}");
            assert_clean_qcow2(directory.path(), &name(&path), &raw_name);
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Returns all combinations of one choice from each of `parts`.
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
fn writes_every_cluster_size_version_and_compression() {
    let sizes = ["cluster_size=512", "cluster_size=4k", "", "cluster_size=2M"];
    let sets = product(&[&sizes, &["", "compat=0.10"], &["", "compress"]]);
    check_all(&[mixed(), Image::disk("all zero", MIB, Content::zero())], &sets);
    check_all(&[mixed()], &product(&[&sizes, &["compress,compression_type=zstd"]]));
}

#[test]
fn writes_every_refcount_width() {
    let widths = ["1", "2", "4", "8", "16", "32", "64"].map(|bits| format!("refcount_bits={bits}"));
    let widths: Vec<&str> = widths.iter().map(String::as_str).collect();
    check_all(&[mixed()], &product(&[&widths, &["cluster_size=512", ""], &["", "compress"]]));
    let large = ["refcount_bits=1,cluster_size=2M", "refcount_bits=64,cluster_size=2M"];
    check_all(&[mixed()], &product(&[&large, &["", "compress"]]));
}

#[test]
fn writes_subclusters_lazy_refcounts_and_preallocation() {
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
fn writes_more_than_one_l2_table() {
    let sets =
        product(&[&["", "compress", "cluster_size=4k", "cluster_size=512,compress", "extended_l2=on"]]);
    check_all(&[laws::far_apart()], &sets);
}

#[test]
fn writes_odd_sizes() {
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
fn qemu_img_info_shows_the_options() {
    require!("qemu-img");
    let directory = laws::scratch();
    let set = "cluster_size=16k,refcount_bits=8,extended_l2=on,compression_type=zstd,lazy_refcounts=on";
    let path = laws::make(&Qcow2Driver, &options(set), &mixed(), directory.path());
    let info = run_json_in("qemu-img", directory.path(), &["info", "--output=json", path.to_str().unwrap()]);
    assert_eq!(info["cluster-size"], 16384);
    assert_eq!(info["virtual-size"], 5 * MIB);
    let data = &info["format-specific"]["data"];
    assert_eq!(data["compat"], "1.1");
    assert_eq!(data["refcount-bits"], 8);
    assert_eq!(data["extended-l2"], true);
    assert_eq!(data["compression-type"], "zstd");
    assert_eq!(data["lazy-refcounts"], true);
    let path = laws::make(&Qcow2Driver, &options("compat=0.10"), &mixed(), directory.path());
    let info = run_json_in("qemu-img", directory.path(), &["info", "--output=json", path.to_str().unwrap()]);
    assert_eq!(info["format-specific"]["data"]["compat"], "0.10");
}

/// Writes `image` as an overlay of `base`. The sink compares the data with the base if `compare` is set.
fn write_overlay(image: &Image, base: &Path, set: &str, compare: bool, output: &Path) {
    let name = base.file_name().unwrap().to_str().unwrap();
    let options = options(&format!("{set},backing_file={name},backing_fmt=raw"));
    write(image, &options, compare.then_some(base), output);
}

#[test]
fn overlays_store_only_the_difference() {
    require!("qemu-img");
    let directory = laws::scratch();
    let base_image = Image::disk(
        "base",
        4 * MIB + 512,
        Content::zero().with(0..MIB, Fill::Text).with(2 * MIB..4 * MIB + 512, Fill::Random),
    );
    let base = laws::make(&RawDriver, &CreateOptions::default(), &base_image, directory.path());
    std::fs::rename(&base, directory.path().join("base")).unwrap();
    let base = directory.path().join("base");
    // Equal parts, other data, zeros in place of data, and data beyond the end of the base.
    let content = Content::zero()
        .with(0..MIB, Fill::Text)
        .with(MIB + 70_000..MIB + 70_001, Fill::Byte(9))
        .with(3 * MIB..3 * MIB + 5000, Fill::Random)
        .with(5 * MIB..5 * MIB + 70_000, Fill::Text);
    let image = Image::disk("overlay", 6 * MIB, content);
    let raw = laws::make(&RawDriver, &CreateOptions::default(), &image, directory.path());
    std::fs::rename(raw, directory.path().join("raw")).unwrap();
    let sets = [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "compress",
        "compat=0.10",
        "extended_l2=on",
        "compat=0.10,compress,cluster_size=4k",
    ];
    for set in sets {
        for compare in [false, true] {
            let path = directory.path().join("x");
            write_overlay(&image, &base, set, compare, &path);
            println!("{set} {compare}");
            assert_clean_qcow2(directory.path(), "x", "raw");
        }
    }
    // An overlay with the content of its base stores no data.
    let path = directory.path().join("x");
    write_overlay(&base_image, &base, "", true, &path);
    assert!(std::fs::metadata(&path).unwrap().len() < 400_000);
    let info = run_json_in("qemu-img", directory.path(), &["info", "--output=json", "x"]);
    assert_eq!(
        (info["backing-filename"].as_str(), info["backing-filename-format"].as_str()),
        (Some("base"), Some("raw"))
    );
}

#[test]
fn writes_data_files() {
    require!("qemu-img");
    for image in [mixed(), laws::far_apart()] {
        let directory = laws::scratch();
        let raw = laws::make(&RawDriver, &CreateOptions::default(), &image, directory.path());
        std::fs::rename(raw, directory.path().join("raw")).unwrap();
        for set in [
            "",
            "data_file_raw=on",
            "extended_l2=on",
            "preallocation=metadata",
            "cluster_size=2M",
            "lazy_refcounts=on,data_file_raw=on,preallocation=falloc",
        ] {
            write(&image, &options(&format!("{set},data_file=data")), None, &directory.path().join("x"));
            println!("{image} {set}");
            assert_clean_qcow2(directory.path(), "x", "raw");
            if set.contains("data_file_raw") {
                let (code, out, _) = try_run_in(
                    "qemu-img",
                    directory.path(),
                    &["compare", "-f", "raw", "-F", "raw", "data", "raw"],
                );
                assert_eq!(code, 0, "{out}");
            }
        }
    }
}

#[test]
fn refuses_a_disk_beyond_the_l1_limit_and_writes_nothing() {
    let directory = laws::scratch();
    let path = directory.path().join("x");
    let image = Image::disk("huge", 4 << 50, Content::zero());
    let create = |image: &Image, set: &str| {
        let outputs = &mut FileOutputs::new(&path);
        Qcow2Driver.writer(&options(set)).unwrap().create(outputs, &image.manifest())
    };
    let error = create(&image, "").err().unwrap();
    assert_eq!(error.remedy(), Some(&Remedy::SetOption("cluster_size=131072".into())));
    let huge = Image::disk("beyond", 1 << 63, Content::zero());
    assert!(create(&huge, "cluster_size=2M").is_err());
    assert!(!path.exists());
}
