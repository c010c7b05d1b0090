//! `imgtool info`: descriptions of images, for people and for programs.

use imgtool_testing::manifest::archives;
use imgtool_testing::{fixture, images, oracles, require, tempdir, text};

use crate::support::imgtool;

#[test]
fn json_output_matches_the_fixture_manifest() {
    for entry in archives() {
        let path = fixture(&entry.file);
        let info = imgtool(["info", "--output", "json", text(&path)]).ok().json();
        assert_eq!(info["format"], "vma", "{}", entry.file);
        assert_eq!(info["filename"], text(&path));
        let shown = info.to_string();
        assert!(shown.contains(&entry.uuid), "{}: no uuid in {shown}", entry.file);
        for device in &entry.devices {
            assert!(shown.contains(&format!("\"{}\"", device.name)), "{}: {shown}", entry.file);
            assert!(shown.contains(&device.size.to_string()), "{}: {shown}", entry.file);
        }
        for name in &entry.attachments {
            assert!(shown.contains(&format!("\"{name}\"")), "{}: {shown}", entry.file);
        }
        if let Some(compression) = &entry.compression {
            assert!(shown.contains(&format!("\"{compression}\"")), "{}: {shown}", entry.file);
        }
    }
}

#[test]
fn text_output_matches_the_fixture_manifest() {
    for entry in archives() {
        let shown = imgtool(["info", text(&fixture(&entry.file))]).ok().text();
        assert!(shown.contains("vma"), "{shown}");
        for device in &entry.devices {
            assert!(shown.contains(&device.name), "{shown}");
            assert!(shown.contains(&device.size.to_string()), "{shown}");
        }
    }
}

#[test]
fn reads_standard_input() {
    let entry = archives().remove(0);
    let run = imgtool(["info", "--output", "json", "-"]).pipe_from(&fixture(&entry.file)).ok();
    assert_eq!(run.json()["format"], "vma");
}

#[test]
fn json_fields_match_qemu_img() {
    require!("qemu-img");
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    images::every_mask().write_raw(&raw);
    let made = [
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "cluster_size=2M,compat=0.10"),
        ("qcow2", "-c compression_type=zstd"),
        ("vhdx", ""),
        ("vhdx", "block_size=1M"),
        ("raw", ""),
    ];
    for (format, options) in made {
        let image = dir.path().join("image");
        oracles::qemu_make(&raw, format, options, &image);
        let theirs = oracles::qemu_info(&image, format);
        let ours = imgtool(["info", "--output", "json", text(&image)]).ok().json();
        for field in ["filename", "format", "virtual-size", "actual-size", "cluster-size"] {
            assert_eq!(ours[field], theirs[field], "{format} {options}: {field}");
        }
        if format == "qcow2" {
            let (ours, theirs) = (&ours["format-specific"]["data"], &theirs["format-specific"]["data"]);
            for field in ["compat", "compression-type", "refcount-bits"] {
                assert_eq!(ours[field], theirs[field], "{options}: {field}");
            }
        }
    }
}

#[test]
fn unrecognized_content_is_reported_as_raw() {
    let dir = tempdir();
    let raw = dir.path().join("x.img");
    images::every_mask().write_raw(&raw);
    assert_eq!(imgtool(["info", "--output", "json", text(&raw)]).ok().json()["format"], "raw");
}

#[test]
fn explicit_format_overrides_detection() {
    let fixture = fixture("sparse.vma");
    let info = imgtool(["info", "-f", "raw", "--output", "json", text(&fixture)]).ok().json();
    assert_eq!(info["format"], "raw");
    assert_eq!(info["virtual-size"], std::fs::metadata(&fixture).unwrap().len());
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    images::every_mask().write_raw(&raw);
    for format in ["qcow2", "vhdx", "vma"] {
        imgtool(["info", "-f", format, text(&raw)]).go().exits(1).says("x.raw");
    }
}

#[test]
fn missing_files_are_named() {
    imgtool(["info", "/nonexistent/image.qcow2"]).go().exits(1).says("/nonexistent/image.qcow2");
}

/// Numbers of stored and of zero bytes of each device of `two-disks.vma`.
const COUNTED: [(u64, u64); 2] = [(2_154_496, 3_100_672), (12_288, 528_384)];

fn counted(info: &serde_json::Value) -> Vec<(Option<u64>, Option<u64>)> {
    let devices = info["format-specific"]["data"]["devices"].as_array().unwrap();
    devices.iter().map(|device| (device["stored-bytes"].as_u64(), device["zero-bytes"].as_u64())).collect()
}

#[test]
fn counts_stored_and_zero_bytes_in_files_and_streams() {
    for name in ["two-disks.vma.zst", "two-disks.vma.gz", "two-disks.vma.lzo"] {
        let path = fixture(name);
        let info = imgtool(["info", "--output", "json", text(&path)]).ok().json();
        let piped = imgtool(["info", "--output", "json", "-"]).pipe_from(&path).ok().json();
        for info in [info, piped] {
            assert_eq!(counted(&info), COUNTED.map(|(stored, zero)| (Some(stored), Some(zero))), "{name}");
            assert_eq!(info["format-specific"]["data"]["extents"], 2);
        }
    }
}

#[test]
fn reads_long_streams_to_the_end_only_with_read_all() {
    let dir = tempdir();
    let raw = dir.path().join("a.raw");
    // Noise, longer than the 64 MiB that `info` reads without --read-all.
    std::fs::write(&raw, images::noise(5, 66 << 20)).unwrap();
    let archive = dir.path().join("a.vma.gz");
    imgtool(["convert", text(&raw), "--to", "vma", text(&archive)]).ok();
    let info = imgtool(["info", "--output", "json", text(&archive)]).ok().json();
    assert_eq!(counted(&info), [(None, None)]);
    assert_eq!(info["notes"][1], "info --read-all reads it to its end", "{info}");
    let info = imgtool(["info", "--read-all", "--output", "json", text(&archive)]).ok().json();
    assert_eq!(counted(&info), [(Some(66 << 20), Some(0))]);
}

#[test]
fn reports_damage_and_the_facts_still_readable() {
    let dir = tempdir();
    let archive = dir.path().join("a.vma");
    let compressed = fixture("two-disks.vma.zst");
    imgtool(["convert", "-f", "raw", "--to", "raw", text(&compressed), text(&archive)]).ok();
    let whole = std::fs::read(&archive).unwrap();
    let mut flipped = whole.clone();
    flipped[12_800 + 100] ^= 1;
    let cut = &whole[..whole.len() - 1];
    let trailing = [&whole[..], b"x"].concat();
    for (bytes, message) in [
        (
            &flipped[..],
            "wrong vma extent header checksum: its MD5 does not match its content (file offset 12800)",
        ),
        (cut, "short vma extent (975359 < 975360)"),
        (&trailing, "read short extent (1 bytes) (file offset 2180608)"),
    ] {
        std::fs::write(&archive, bytes).unwrap();
        let json = imgtool(["info", "--output", "json", text(&archive)]).go().exits(1).says(message).json();
        assert_eq!(json["devices"].as_array().unwrap().len(), 2);
        assert_eq!(json["attachments"].as_array().unwrap().len(), 2);
        assert_eq!(counted(&json), [(None, None); 2]);
        assert!(json["damage"].as_str().unwrap().contains(message), "{json}");
        let page = imgtool(["info", "-"]).pipe_from(&archive).go().exits(1).says(message);
        assert!(
            page.text().contains("drive-efidisk0") && page.text().contains("damaged: "),
            "{}",
            page.text()
        );
    }
    // If the header is damaged, nothing is known.
    flipped[5000] ^= 1;
    std::fs::write(&archive, flipped).unwrap();
    let refused = imgtool(["info", text(&archive)]).go().exits(1).says("wrong vma header checksum");
    assert_eq!(refused.text(), "");
}

#[test]
fn read_all_tells_the_size_of_a_compressed_raw_image() {
    require!("zstd");
    let dir = tempdir();
    images::Image::hole("d", 7_000_064)
        .with(512, images::noise(1, 100_000))
        .write_raw(&dir.path().join("d.raw"));
    // One frame without a seek table, as `zstd` writes it to a pipe.
    let made = std::process::Command::new("sh")
        .args(["-c", "zstd -q < d.raw > d.raw.zst"])
        .current_dir(dir.path())
        .status();
    assert!(made.unwrap().success());
    let info = |args: &[&str]| imgtool(["info", "d.raw.zst"]).args(args).within(dir.path()).ok();
    assert!(
        info(&[]).text().contains("virtual size: unknown until the end of the stream (--read-all reads it)")
    );
    assert!(info(&["--read-all"]).text().contains("virtual size: 6.68 MiB (7000064 bytes)"));
    let json = info(&["--read-all", "--output", "json"]).json();
    assert_eq!(
        (&json["virtual-size"], &json["devices"][0]["virtual-size"]),
        (&7_000_064.into(), &7_000_064.into())
    );
}

#[test]
fn snapshots_are_a_table_and_dates_are_dates() {
    require!("qemu-img");
    let dir = tempdir();
    let qemu_img = |line: &str| {
        let run =
            std::process::Command::new("qemu-img").args(line.split(' ')).current_dir(dir.path()).status();
        assert!(run.unwrap().success(), "{line}");
    };
    qemu_img("create -q -f qcow2 a.qcow2 8M");
    qemu_img("snapshot -c clean a.qcow2");
    qemu_img("create -q -f vpc a.vhd 8M");
    let page = imgtool(["info", "a.qcow2"]).within(dir.path()).ok().text();
    let row = page.lines().find(|line| line.contains("clean")).unwrap_or_else(|| panic!("{page}"));
    assert!(row.contains("20") && row.contains("00:00:00.000") && !page.contains("date-sec"), "{page}");
    let page = imgtool(["info", "a.vhd"]).within(dir.path()).ok().text();
    assert!(page.contains("created: 20") && page.contains("block size: 2 MiB (2097152 bytes)"), "{page}");
    let archive = imgtool(["info", text(&fixture("two-disks.vma.zst"))]).ok().text();
    assert!(archive.contains("created: ") && !archive.contains("seconds since"), "{archive}");
}
