//! Reports during and after a conversion: the detected format, progress, the summary.

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, tempdir, text};

use super::with_disk;
use crate::support::imgtool;

#[test]
fn reports_the_detected_format() {
    let source = fixture("two-disks.vma.zst");
    let dir = tempdir();
    let run = imgtool(["convert", text(&source), "--to", "qcow2", text(&dir.path().join("out"))]).ok();
    let said = run.text() + &run.stderr;
    assert!(said.contains("vma") && said.contains("zst"), "{said}");
}

#[test]
fn summary_names_every_output() {
    let source = fixture("two-disks.vma.zst");
    let dir = tempdir();
    let run = imgtool(["convert", text(&source), "--to", "qcow2", text(&dir.path().join("out"))]).ok();
    let said = run.text() + &run.stderr;
    for name in ["drive-scsi0.qcow2", "drive-efidisk0.qcow2"] {
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn quiet_prints_nothing() {
    let dir = with_disk();
    let run =
        imgtool(["convert", "-q", "-f", "raw", "disk.raw", "--to", "qcow2", "x"]).within(dir.path()).ok();
    assert_eq!((run.text().as_str(), run.stderr.as_str()), ("", ""));
}

#[test]
fn json_progress_reaches_100_percent_once() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 64 << 20).with(5 << 20, images::noise(1, 20 << 20)).write_raw(&raw);
    let line = ["convert", "--progress", "json", "disk.raw", "--to", "qcow2", "out.qcow2"];
    let run = imgtool(line).within(dir.path()).ok();
    let objects: Vec<serde_json::Value> =
        run.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(!objects.is_empty(), "{}", run.stderr);
    for field in ["phase", "device", "done", "total", "zero", "written", "elapsed"] {
        assert!(objects.iter().all(|object| object.get(field).is_some()), "no '{field}': {}", run.stderr);
    }
    let last = objects.last().unwrap();
    assert_eq!(last["done"], last["total"], "{}", run.stderr);
    // A second object equal to the last one would be a repeated final line.
    assert_eq!(objects.iter().filter(|object| *object == last).count(), 1, "{}", run.stderr);
}

#[test]
fn each_phase_reaches_100_percent_once() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let out = dir.path().join("out/");
    let line = ["convert", "--verify", "--progress", "json", text(&archive), "--to", "qcow2", text(&out)];
    let run = imgtool(line).ok();
    let objects: Vec<serde_json::Value> =
        run.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let whole: Vec<_> = objects.iter().filter(|object| object["device"].is_null()).collect();
    let complete: Vec<&str> = whole
        .iter()
        .filter(|object| object["done"] == object["total"])
        .map(|object| object["phase"].as_str().unwrap())
        .collect();
    // The two outputs share each phase.
    assert_eq!(complete, ["convert", "verify"], "{}", run.stderr);
    assert_eq!(objects.last(), whole.last().copied(), "{}", run.stderr);
    for object in &whole {
        let (zero, done) = (object["zero"].as_u64().unwrap(), object["done"].as_u64().unwrap());
        assert!(zero < done, "not all of it is zero: {object}");
    }
}
