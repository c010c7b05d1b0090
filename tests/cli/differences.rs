//! `compare` counts and lists what differs.

use imgtool_testing::images::{self, Image};
use imgtool_testing::tempdir;

use crate::support::imgtool;

/// Ranges in which the second image differs, from the first to the last byte that differs.
const RANGES: [(u64, u64); 3] = [(4096, 8192), (100_001, 100_003), (2_097_151, 2_097_152)];

fn workshop() -> tempfile::TempDir {
    let dir = tempdir();
    let disk = Image::hole("d", 3 << 20).with(0, images::noise(1, 300_000)).with(2 << 20, vec![9; 4096]);
    disk.write_raw(&dir.path().join("a.raw"));
    let mut bytes = std::fs::read(dir.path().join("a.raw")).unwrap();
    for (start, end) in RANGES {
        bytes[start as usize..end as usize].iter_mut().for_each(|byte| *byte ^= 0x55);
    }
    std::fs::write(dir.path().join("b.raw"), bytes).unwrap();
    for name in ["a", "b"] {
        let convert = ["convert", "-q", "-c", &format!("{name}.raw"), &format!("{name}.qcow2")];
        imgtool(convert).within(dir.path()).ok();
    }
    imgtool(["convert", "-q", "b.raw", "b.raw.zst"]).within(dir.path()).ok();
    dir
}

#[test]
fn counts_and_lists_everything_that_differs() {
    let dir = workshop();
    for pair in [["a.raw", "b.raw"], ["a.raw", "b.qcow2"], ["a.qcow2", "b.raw.zst"], ["b.qcow2", "a.raw"]] {
        let run = imgtool(["compare", "--list"]).args(pair).within(dir.path()).go().exits(1);
        let text = run.text();
        assert!(text.starts_with("Content mismatch at offset 4096!\n"), "{text}");
        assert!(text.contains(": differs in 3 ranges, 4 KiB (4099 bytes)\n"), "{pair:?}: {text}");
        for (start, end) in RANGES {
            assert!(text.contains(&format!("  guest bytes {start}..{end} (")), "{text}");
        }
        let json = imgtool(["compare", "--list", "--output", "json"]).args(pair).within(dir.path()).go();
        let json = json.exits(1).json();
        let device = &json["devices"][0];
        assert_eq!((&device["different-bytes"], &device["different-ranges"]), (&4099.into(), &3.into()));
        let listed = device["ranges"].as_array().unwrap();
        let found: Vec<(u64, u64)> = listed
            .iter()
            .map(|range| (range["start"].as_u64().unwrap(), range["length"].as_u64().unwrap()))
            .map(|(start, length)| (start, start + length))
            .collect();
        assert_eq!(found, RANGES);
    }
    let same = imgtool(["compare", "--output", "json", "a.raw", "a.qcow2"]).within(dir.path()).ok().json();
    assert_eq!(same["devices"][0]["different-bytes"], 0);
}

#[test]
fn longer_disk_counts_with_what_is_not_zero() {
    let dir = workshop();
    let mut bytes = std::fs::read(dir.path().join("a.raw")).unwrap();
    bytes.resize(4 << 20, 0);
    bytes[(3 << 20) + 700] = 1;
    std::fs::write(dir.path().join("long.raw"), bytes).unwrap();
    for pair in [["a.raw", "long.raw"], ["long.raw", "a.qcow2"]] {
        let run = imgtool(["compare", "--list"]).args(pair).within(dir.path()).go().exits(1);
        assert!(run.text().contains("guest bytes 3146428..3146429 (1 B)"), "{}", run.text());
    }
}

#[test]
fn quiet_comparison_prints_nothing() {
    let dir = workshop();
    let run = imgtool(["compare", "-q", "a.raw", "b.raw"]).within(dir.path()).go().exits(1);
    assert_eq!((run.text().as_str(), run.stderr.as_str()), ("", ""));
}
