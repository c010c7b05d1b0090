//! Malicious images: every command ends within 256 MiB, does not panic, prints no control characters, opens
//! no file that the image names, and leaves nothing unless it succeeds.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imgtool_core::error::is_hidden;
use imgtool_testing::{names, text};

use crate::support::imgtool;
use crate::support::run::Outcome;

mod bombs;
mod chains;
mod confinement;
mod disks;
mod externals;
mod names;
mod packages;
mod qcow2_images;
mod qcow2_tables;
mod refusals;
mod vhdx;
mod vma;

/// Maximum resident memory of a run in bytes, for any image. Our limit.
const MEMORY: u64 = 256 << 20;

/// Maximum processor time of a run in seconds. Our limit: far more than any run needs.
const CPU_SECONDS: u32 = 60;

/// Maximum size in bytes of the disks that the tests read, hash and archive: the time for that follows the
/// size.
const SMALL: u64 = 2 << 30;

/// A crafted file, mostly a hole.
struct Craft {
    path: PathBuf,
    file: File,
}

impl Craft {
    fn new(directory: &Path, name: &str, len: u64) -> Self {
        let path = directory.join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        Self { path, file }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> &Self {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    fn le32(&self, at: u64, value: u32) -> &Self {
        self.put(at, &value.to_le_bytes())
    }

    fn be32(&self, at: u64, value: u32) -> &Self {
        self.put(at, &value.to_be_bytes())
    }

    fn be64(&self, at: u64, value: u64) -> &Self {
        self.put(at, &value.to_be_bytes())
    }
}

/// Creates a qcow2 image with a valid header. The L1 table is at 2 MiB, the refcount table at 4 MiB: cluster
/// boundaries for any cluster size.
fn qcow2(
    directory: &Path,
    name: &str,
    len: u64,
    cluster_bits: u32,
    virtual_size: u64,
    l1_size: u32,
) -> Craft {
    let craft = Craft::new(directory, name, len);
    craft.put(0, b"QFI\xfb").be32(4, 3).be32(20, cluster_bits).be64(24, virtual_size).be32(36, l1_size);
    craft.be64(40, 1 << 21).be64(48, 1 << 22).be32(56, 1).be32(96, 4).be32(100, 104);
    craft
}

/// Returns every command for one file. `small` adds the commands whose cost follows the size of the disk.
fn every_command(file: &str, small: bool) -> Vec<Vec<&str>> {
    let mut lines: Vec<Vec<&str>> = vec![
        vec!["info", file],
        vec!["info", "--backing-chain", "--allow-external", "chain", file],
        vec!["check", file],
        vec!["map", file],
        vec!["compare", file, file],
        vec!["measure", "--to", "qcow2", file],
        vec!["convert", "--salvage", file, "--to", "qcow2", "out/"],
    ];
    lines.extend(["raw", "qcow2", "vhdx"].map(|to| vec!["convert", file, "--to", to, "out/"]));
    if small {
        lines.push(vec!["checksum", file]);
        lines.push(vec!["convert", "--compress", file, "--to", "qcow2", "out/"]);
        lines.push(vec!["convert", file, "--to", "vma", "out"]);
    }
    if file.contains("snapshot") {
        lines.push(vec!["map", "--snapshot", "1", file]);
        lines.push(vec!["convert", "--snapshot", "1", file, "--to", "raw", "out/"]);
    }
    if file.ends_with(".vma") {
        lines.extend([
            vec!["vma", "list", file],
            vec!["vma", "verify", file],
            vec!["vma", "config", file],
            vec!["vma", "extract", file, "out"],
        ]);
    }
    lines
}

/// Returns commands for a file that can't be opened: one for each way of opening it.
fn few_commands(file: &str) -> Vec<Vec<&str>> {
    vec![
        vec!["check", file],
        vec!["map", file],
        vec!["convert", file, "--to", "raw", "out/"],
        vec!["convert", "--salvage", file, "--to", "qcow2", "out/"],
    ]
}

/// Maximum size in bytes of a file on ext4. The exit code of a run that writes a larger raw file depends on
/// the file system, so the snapshot omits it.
const LARGEST_FILE: u64 = (16 << 40) - 4096;

/// Returns the size in bytes of the largest disk that `info` reports; 0 if it reports none.
fn largest_disk(facts: &Outcome) -> u64 {
    let Ok(facts) = serde_json::from_slice::<serde_json::Value>(&facts.stdout) else { return 0 };
    let devices = facts["devices"].as_array().into_iter().flatten();
    let sizes = devices.map(|device| &device["virtual-size"]).chain([&facts["virtual-size"]]);
    sizes.filter_map(serde_json::Value::as_u64).max().unwrap_or(0)
}

/// Runs every command on every file. Each must end within the memory limit, with the exit code in the
/// snapshot `exit-codes-NAME`. After an intended change, run
/// `INSTA_UPDATE=always cargo test --test main hostile::`.
#[track_caller]
fn all_end(name: &str, directory: &Path, files: &[PathBuf]) {
    let mut worst = (0, String::new());
    let mut table = String::new();
    for path in files {
        let file = path.file_name().unwrap().to_str().unwrap();
        let mut codes: BTreeMap<i32, Vec<String>> = BTreeMap::new();
        let mut peak = 0;
        let mut note = |line: &[&str], outcome: &Outcome, is_of_the_file_system: bool| {
            peak = peak.max(outcome.peak_memory);
            if is_of_the_file_system {
                return;
            }
            let words: Vec<&str> = line
                .iter()
                .filter(|word| **word != file && **word != "out" && **word != "out/")
                .copied()
                .collect();
            codes.entry(outcome.status.code().unwrap()).or_default().push(words.join(" "));
        };
        let facts_line = ["info", "--output", "json", file];
        let facts = run(directory, &facts_line);
        note(&facts_line, &facts, false);
        let is_large = largest_disk(&facts) > LARGEST_FILE;
        let lines = if facts.status.success() || file.ends_with(".vma") {
            // The size of a stream may be unknown; the streams of the corpus are small.
            let size = if facts.status.success() { facts.json()["virtual-size"].as_u64() } else { None };
            every_command(file, size.unwrap_or(0) <= SMALL)
        } else {
            few_commands(file)
        };
        for line in lines {
            let makes_raw = line.ends_with(&["--to", "raw", "out/"]) || line.contains(&"extract");
            note(&line, &run(directory, &line), makes_raw && is_large);
        }
        eprintln!("{file}: {} MiB", peak >> 20);
        worst = worst.max((peak, file.to_owned()));
        table.push_str(&format!("{file}\n"));
        for (code, lines) in codes {
            table.push_str(&format!("  {code}: {}\n", lines.join(", ")));
        }
    }
    eprintln!("{} files, worst {} MiB: {}", files.len(), worst.0 >> 20, worst.1);
    insta::assert_snapshot!(format!("exit-codes-{name}"), table);
}

/// Runs one command, which must end by itself, print plain text, and leave nothing but a result.
#[track_caller]
fn run(directory: &Path, line: &[&str]) -> Outcome {
    let before = names(directory);
    let run = imgtool(line).within(directory).cpu_limit(CPU_SECONDS).measured().go();
    let what = format!("{}: {:?}\n{}", run.command, run.status, run.stderr);
    // 63: `check` of raw. 255: `vma config` without a configuration of that name.
    assert!(matches!(run.status.code(), Some(0..=3 | 63 | 255)), "{what}");
    assert!(!run.stderr.contains("panicked"), "{what}");
    assert!(run.peak_memory < MEMORY, "{} bytes resident: {what}", run.peak_memory);
    for printed in [&run.stderr, &run.text()] {
        assert!(!printed.contains(|c: char| is_hidden(c) && !"\n\r\t".contains(c)), "{what}");
    }
    let writes = line[0] == "convert" || line.contains(&"extract");
    if writes && matches!(run.status.code(), Some(0 | 3)) {
        clear(&directory.join("out"));
    }
    assert_eq!(names(directory), before, "{what}");
    run
}

fn clear(out: &Path) {
    if out.is_dir() { std::fs::remove_dir_all(out) } else { std::fs::remove_file(out) }
        .unwrap_or_else(|e| panic!("{}: {e}", text(out)));
}
