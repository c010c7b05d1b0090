//! `imgtool info`: what an image is, for people and for programs.

use crate::support::images;
use crate::support::manifest::archives;
use crate::support::oracles::{self, require};
use crate::support::{fixture, imgtool, tempdir, text};

#[test]
fn every_fixture_is_described_by_its_manifest() {
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
fn people_read_the_same() {
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
fn standard_input_is_described_too() {
    let entry = archives().remove(0);
    let run = imgtool(["info", "--output", "json", "-"]).pipe_from(&fixture(&entry.file)).ok();
    assert_eq!(run.json()["format"], "vma");
}

#[test]
fn qemu_img_says_the_same_of_disk_images() {
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
fn a_guessed_raw_image_is_called_raw() {
    let dir = tempdir();
    let raw = dir.path().join("x.img");
    images::every_mask().write_raw(&raw);
    assert_eq!(imgtool(["info", "--output", "json", text(&raw)]).ok().json()["format"], "raw");
}

#[test]
fn a_given_format_is_not_guessed() {
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
fn what_is_not_there_is_an_error_with_its_name() {
    imgtool(["info", "/nonexistent/image.qcow2"]).go().exits(1).says("/nonexistent/image.qcow2");
}
