//! A real file system, larger than memory budgets and small tests: through VMA and qcow2 and back.

use std::path::Path;
use std::time::Instant;

use imgtool_testing::{occupied, oracles, require, sha256_file, tempdir, text};

use crate::support::imgtool;

/// The most memory that a conversion may hold.
const MEMORY_LIMIT: u64 = 256 << 20;

/// More than this must be in the image, or the test proves little.
const ENOUGH_DATA: u64 = 1 << 30;

/// What is copied into the image: more, because holes and small files count differently there.
const WANTED_DATA: u64 = 1200 << 20;

/// Less than this is not worth looking for files that fit.
const SPARE: u64 = 16 << 20;

/// An ext4 file system of 4 GiB that holds this machine's programs and libraries.
fn ext4_of_this_machine(path: &Path) {
    let staging = path.with_extension("files");
    std::fs::create_dir(&staging).unwrap();
    // On a machine with few libraries the same ones again make it large enough.
    let mut left = WANTED_DATA;
    for round in 0..20 {
        if left < SPARE {
            break;
        }
        fill(Path::new("/usr/lib"), &staging.join(format!("lib-{round}")), &mut left);
    }
    let uuid = "5f0b2b5e-94a4-4d3a-8a36-0e6f4b1d2c3a";
    let file = std::fs::File::create(path).unwrap();
    file.set_len(4 << 30).unwrap();
    oracles::run("mkfs.ext4", &["-q", "-F", "-U", uuid, "-d", text(&staging), text(path)]);
    std::fs::remove_dir_all(staging).unwrap();
}

/// Copies regular files as long as they fit into `left`.
fn fill(from: &Path, to: &Path, left: &mut u64) {
    std::fs::create_dir_all(to).unwrap();
    let Ok(entries) = std::fs::read_dir(from) else { return };
    let mut entries: Vec<_> = entries.filter_map(Result::ok).collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if *left < SPARE {
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            fill(&entry.path(), &target, left);
        } else if kind.is_file() {
            let len = entry.metadata().map_or(0, |meta| meta.len());
            if len <= *left && std::fs::copy(entry.path(), &target).is_ok() {
                *left -= len;
            }
        }
    }
}

#[test]
fn a_file_system_survives_raw_vma_qcow2_raw() {
    require!("mkfs.ext4", "e2fsck", "qemu-img");
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    ext4_of_this_machine(&raw);
    let data = occupied(&raw);
    assert!(data > ENOUGH_DATA, "only {data} bytes of data");
    let digest = sha256_file(&raw);
    let mut at = raw.clone();
    for (step, format) in ["vma", "qcow2", "raw"].into_iter().enumerate() {
        let next = dir.path().join(format!("{step}.{format}"));
        let began = Instant::now();
        let run = imgtool(["convert", text(&at), "--to", format, text(&next)]).measured().ok();
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "to {format}: {seconds:.2} s, {} MiB peak, {} MiB",
            run.peak_memory >> 20,
            occupied(&next) >> 20
        );
        assert!(run.peak_memory > 0 && run.peak_memory < MEMORY_LIMIT, "{format}: {}", run.peak_memory);
        assert!(occupied(&next) < data + data / 50, "{format}: {} of {data}", occupied(&next));
        if format == "qcow2" {
            oracles::qemu_check(&next, format);
            oracles::qemu_compare(&raw, "raw", &next, format);
        }
        if at != raw {
            std::fs::remove_file(&at).unwrap();
        }
        at = next;
    }
    assert_eq!(sha256_file(&at), digest);
    oracles::run("e2fsck", &["-fn", text(&at)]);
}
