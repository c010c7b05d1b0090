//! Runs a command line with qemu-img and with this program under its name, each in a copy of the same directory,
//! and compares exit code, output and the resulting images.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use imgtool_testing::images::{Image, noise};
use imgtool_testing::{oracles, tempdir, text};
use serde_json::Value;

use crate::support::run::PROGRAM;

/// Directory with images in all formats that qemu-img writes, from which each run gets a copy.
pub struct Workshop {
    root: tempfile::TempDir,
    /// Link to this program with the name of qemu-img.
    link: PathBuf,
}

/// Result of a command line in a directory of its own.
struct Done {
    directory: tempfile::TempDir,
    output: Output,
    /// Names of the files that are new or changed.
    changed: Vec<String>,
}

impl Workshop {
    /// Creates the images, with qemu-img.
    pub fn new() -> Self {
        let root = tempdir();
        let link = root.path().join("qemu-img");
        symlink(PROGRAM, &link).unwrap();
        let images = root.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let disk = Image::hole("x", 1 << 20).with(256 << 10, noise(1, 200_000));
        disk.write_raw(&images.join("disk.raw"));
        std::fs::write(images.join("old.raw"), noise(2, 700)).unwrap();
        std::fs::write(images.join("text.html"), "<html>".repeat(256)).unwrap();
        std::fs::write(images.join("raw.qcow2"), noise(3, 2048)).unwrap();
        std::fs::write(images.join("disk.raw.gz"), b"\x1f\x8b\x08".repeat(512)).unwrap();
        for line in [
            "convert -O qcow2 disk.raw base.qcow2",
            "create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2",
            "convert -O qcow2 disk.raw snap.qcow2",
            "snapshot -c clean snap.qcow2",
            "convert -O vmdk disk.raw disk.vmdk",
            "convert -O vpc disk.raw disk.vhd",
            "convert -O vhdx disk.raw disk.vhdx",
            "convert -O vdi disk.raw disk.vdi",
            "convert -c -O qcow2 disk.raw packed.qcow2",
            "create -q -f qcow2 bitmap.qcow2 1M",
            "bitmap --add bitmap.qcow2 b0",
            "create -q -f raw empty.raw 1M",
            "create -q -f vmdk -b disk.vmdk -F vmdk over.vmdk",
            "create -q -f qed -b disk.raw -F raw over.qed",
        ] {
            let args: Vec<&str> = line.split(' ').collect();
            oracles::run_in("qemu-img", &images, &args);
        }
        Self { root, link }
    }

    fn images(&self) -> PathBuf {
        self.root.path().join("images")
    }

    /// Runs a command line in a copy of the directory.
    fn run(&self, program: &Path, line: &str) -> Done {
        let directory = tempdir();
        for entry in std::fs::read_dir(self.images()).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, directory.path().join(from.file_name().unwrap())).unwrap();
        }
        let output = Command::new(program)
            .args(line.split(' '))
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let mut changed = imgtool_testing::names(directory.path());
        changed.retain(|name| {
            let old = std::fs::read(self.images().join(name)).ok();
            old != std::fs::read(directory.path().join(name)).ok()
        });
        Done { directory, output, changed }
    }

    /// Runs a command line with this program alone, and returns its exit code, standard output and standard error.
    pub fn ours(&self, line: &str) -> (i32, String, String) {
        let done = self.run(&self.link, line);
        (done.code(), done.stdout(), done.stderr())
    }

    /// Runs a command line with both programs. Returns the differences, in a sentence each.
    pub fn differences(&self, line: &str) -> Vec<String> {
        let theirs = self.run(Path::new("qemu-img"), line);
        let ours = self.run(&self.link, line);
        let mut found = Vec::new();
        let mut expect = |what: &str, ours: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            let (ours, theirs) = (format!("{ours:?}"), format!("{theirs:?}"));
            if ours != theirs {
                found.push(format!("{line}: {what}: {ours}, qemu-img: {theirs}"));
            }
        };
        expect("exit code", &(ours.code(), ours.stderr()), &(theirs.code(), ours.stderr()));
        expect("changed files", &ours.changed, &theirs.changed);
        if ours.code() == 0 {
            expect("standard error", &ours.stderr(), &"");
        }
        if let Ok(value) = serde_json::from_str::<Value>(&theirs.stdout()) {
            let said = serde_json::from_str(&ours.stdout()).unwrap_or_default();
            for difference in missing_from(&said, &value, "") {
                expect("JSON", &difference, &"");
            }
        } else if ours.code() == 0 && is_comparable(line) {
            expect(
                "standard output",
                &progress_and_text(&ours.stdout()),
                &progress_and_text(&theirs.stdout()),
            );
        }
        for name in ours.changed.iter().filter(|name| theirs.changed.contains(name)) {
            expect(name, &ours.facts(name), &theirs.facts(name));
            expect(
                &format!("comparison of {name}"),
                &ours.compare(&theirs, name),
                &theirs.compare(&theirs, name),
            );
            expect(&format!("check of {name}"), &ours.check(name), &theirs.check(name));
        }
        found
    }
}

/// True if the text on standard output is for programs. The other texts describe the same in other words.
fn is_comparable(line: &str) -> bool {
    !line.starts_with("create") && !line.contains("help")
}

/// Splits standard output into the first and the last report of progress, and the text.
fn progress_and_text(stdout: &str) -> (Option<&str>, Option<&str>, String) {
    let is_progress = |part: &&str| part.trim_start().starts_with('(');
    let parts: Vec<&str> = stdout.split('\r').collect();
    let mut progress = parts.iter().copied().filter(is_progress);
    let text = parts.iter().filter(|part| !is_progress(part)).copied().collect::<String>();
    // What a copy takes on disk differs from copy to copy.
    let text: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("disk size")).collect();
    (progress.next(), progress.next_back(), text.join("\n").trim().to_owned())
}

impl Done {
    fn code(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// Returns the facts about an image that must agree, as qemu-img sees them.
    fn facts(&self, name: &str) -> BTreeMap<&'static str, Value> {
        let line = ["info", "--output=json", name];
        let (_, info, _) = oracles::try_run_in("qemu-img", self.directory.path(), &line);
        let info: Value = serde_json::from_str(&info).unwrap_or_default();
        let data = &info["format-specific"]["data"];
        ["format", "virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "encrypted"]
            .map(|key| (key, info[key].clone()))
            .into_iter()
            .chain(
                ["compat", "compression-type", "refcount-bits", "extended-l2"]
                    .map(|key| (key, data[key].clone())),
            )
            .collect()
    }

    /// Checks an image with qemu-img. Returns its exit code.
    fn check(&self, name: &str) -> i32 {
        oracles::try_run_in("qemu-img", self.directory.path(), &["check", "-q", name]).0
    }

    /// Compares the content of an image with that of another run, as qemu-img reads it. Returns its exit code.
    fn compare(&self, other: &Self, name: &str) -> i32 {
        let facts = [self, other].map(|done| done.facts(name)["format"].clone());
        // QEMU takes a fixed VHD for a raw disk with a footer, which has a time and an identifier.
        let of = |format: &Value| {
            if name.ends_with(".vhd") { "vpc" } else { format.as_str().unwrap_or("raw") }.to_owned()
        };
        let [ours, theirs] = facts.each_ref().map(of);
        let paths = [self, other].map(|done| done.directory.path().join(name));
        let line = ["compare", "-q", "-f", &ours, "-F", &theirs, text(&paths[0]), text(&paths[1])];
        oracles::try_run("qemu-img", &line).status.code().unwrap_or(-1)
    }
}

/// Fields that may differ: those that describe QEMU's own layers, space on disk, times and random identifiers.
const OWN: [&str; 6] = ["children", "actual-size", "date-sec", "date-nsec", "cid", "extents"];

/// Returns the fields of `theirs` that `ours` lacks, or that have another value there.
fn missing_from(ours: &Value, theirs: &Value, path: &str) -> Vec<String> {
    match theirs {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| !OWN.contains(&key.as_str()))
            .flat_map(|(key, theirs)| match ours.get(key) {
                Some(ours) => missing_from(ours, theirs, &format!("{path}.{key}")),
                None => vec![format!("{path}.{key} is missing")],
            })
            .collect(),
        Value::Array(items) => {
            let own = ours.as_array().map_or(0, Vec::len);
            if own != items.len() {
                return vec![format!("{path} has {own} items instead of {}", items.len())];
            }
            let pairs = items.iter().enumerate();
            pairs.flat_map(|(at, theirs)| missing_from(&ours[at], theirs, &format!("{path}[{at}]"))).collect()
        }
        _ if ours == theirs => Vec::new(),
        _ => vec![format!("{path} is {ours} instead of {theirs}")],
    }
}
