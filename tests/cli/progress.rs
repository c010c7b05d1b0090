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

/// Parses standard error, which must hold JSON lines only.
fn json_lines(stderr: &str) -> Vec<serde_json::Value> {
    stderr.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn progress_lines(stderr: &str) -> Vec<serde_json::Value> {
    json_lines(stderr).into_iter().filter(|object| object.get("phase").is_some()).collect()
}

#[test]
fn json_lines_hold_messages_reports_and_errors() {
    let dir = with_disk();
    let run = |args: &[&str]| imgtool(["convert", "--progress", "json"]).args(args).within(dir.path()).go();
    let lines = json_lines(&run(&["disk.raw", "a.qcow2"]).exits(0).stderr);
    assert!(lines[0]["info"]["message"].as_str().unwrap().starts_with("disk.raw: raw"), "{lines:?}");
    let report = &lines.last().unwrap()["report"];
    assert_eq!((&report["complete"], &report["outputs"][0]["filename"]), (&true.into(), &"a.qcow2".into()));
    // The document on standard output is the only report.
    let both = run(&["--output", "json", "disk.raw", "b.qcow2"]).exits(0);
    assert!(both.json()["complete"].as_bool().unwrap());
    assert!(json_lines(&both.stderr).iter().all(|line| line.get("report").is_none()), "{}", both.stderr);
    // A stream has its report too.
    let streamed = run(&["-f", "raw", "disk.raw", "--to", "raw", "-"]).exits(0);
    assert!(json_lines(&streamed.stderr).last().unwrap()["report"]["complete"].as_bool().unwrap());
    for (args, code, kind, part) in [
        (&["nothing.raw", "x.raw"][..], 1, "io", "No such file"),
        (&["disk.raw", "a.qcow2"], 1, "refused", "already exists"),
        (&["disk.raw", "--no-such-flag", "x"], 2, "usage", "--no-such-flag"),
        (&["disk.raw"], 2, "usage", "missing DEST"),
        (&["disk.raw", "--to", "dmg", "x"], 2, "usage", "dmg is read"),
    ] {
        let lines = json_lines(&run(args).exits(code).stderr);
        let error = &lines.last().unwrap()["error"];
        assert_eq!(error["kind"], kind, "{lines:?}");
        assert!(error["message"].as_str().unwrap().contains(part), "{lines:?}");
    }
    let error = &json_lines(&run(&["disk.raw", "a.qcow2"]).exits(1).stderr).pop().unwrap()["error"];
    assert_eq!(error["location"], "a.qcow2");
    assert!(error["hint"].as_str().unwrap().contains("--force"), "{error}");
    // So do the other commands with progress, and signals are no exception: see tests/faults.
    let compare = ["compare", "--progress=json", "disk.raw", "nothing.raw"];
    let lines = json_lines(&imgtool(compare).within(dir.path()).go().exits(2).stderr);
    assert_eq!(lines.last().unwrap()["error"]["location"], "nothing.raw");
}

#[test]
fn json_progress_reaches_100_percent_once() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 64 << 20).with(5 << 20, images::noise(1, 20 << 20)).write_raw(&raw);
    let line = ["convert", "--progress", "json", "disk.raw", "--to", "qcow2", "out.qcow2"];
    let run = imgtool(line).within(dir.path()).ok();
    let objects = progress_lines(&run.stderr);
    assert!(!objects.is_empty(), "{}", run.stderr);
    for field in ["phase", "device", "done", "total", "zero", "written", "elapsed"] {
        assert!(objects.iter().all(|object| object.get(field).is_some()), "no '{field}': {}", run.stderr);
    }
    let last = objects.last().unwrap();
    assert_eq!(last["done"], last["total"], "{}", run.stderr);
    // A second object equal to the last one would be a repeated final line.
    assert_eq!(objects.iter().filter(|object| *object == last).count(), 1, "{}", run.stderr);
}

/// A stream that must be read by position is copied first: that takes time, too.
#[test]
fn the_temporary_copy_is_a_phase() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 64 << 20).with(5 << 20, images::noise(1, 20 << 20)).write_raw(&raw);
    imgtool(["convert", "-q", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    let image = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let command =
        "(cat disk.qcow2; sleep 1.2) | \"$0\" convert --progress json --output json - --to raw out.raw";
    let run = std::process::Command::new("sh")
        .args(["-c", command, env!("CARGO_BIN_EXE_imgtool")])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert!(run.status.success(), "{stderr}");
    let objects = progress_lines(&stderr);
    let phases: Vec<&str> = objects.iter().map(|object| object["phase"].as_str().unwrap()).collect();
    let copy: Vec<_> = objects.iter().filter(|object| object["phase"] == "temporary copy").collect();
    assert!(phases.last() == Some(&"convert") && !copy.is_empty(), "{phases:?}");
    let last = copy.last().unwrap();
    assert_eq!((&last["done"], &last["total"]), (&image.len().into(), &image.len().into()), "{last}");
    assert!(last["elapsed"].as_f64().unwrap() > 1.0, "{last}");
    // It counts in the summary.
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(report["elapsed"].as_f64().unwrap() > 1.0, "{report}");
    // qemu-img's percentages have one phase.
    let command = "cat disk.qcow2 | \"$0\" convert --compat -p -f qcow2 -O raw /dev/stdin out2.raw";
    let run = std::process::Command::new("sh")
        .args(["-c", command, env!("CARGO_BIN_EXE_imgtool")])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let stdout = String::from_utf8(run.stdout).unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(stdout.matches("(100.00/100%)").count(), 1, "{stdout}");
}

#[test]
fn each_phase_reaches_100_percent_once() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let out = dir.path().join("out/");
    let line = ["convert", "--verify", "--progress", "json", text(&archive), "--to", "qcow2", text(&out)];
    let run = imgtool(line).ok();
    let objects = progress_lines(&run.stderr);
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
