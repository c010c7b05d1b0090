//! A real file system, larger than the memory limit, converted to VMA, to qcow2 and back.

use std::path::Path;
use std::time::Instant;

use imgtool_testing::{occupied, oracles, require, sha256_file, tempdir, text};

use crate::support::imgtool;

/// Maximum memory of a conversion in bytes. Our limit.
const MEMORY_LIMIT: u64 = 256 << 20;

/// Minimum size in bytes of the data in the image; with less, the test would prove little.
const ENOUGH_DATA: u64 = 1 << 30;

/// Size in bytes of the files copied into the image: more, since holes and small files count differently
/// there.
const WANTED_DATA: u64 = 1200 << 20;

/// Remaining size in bytes below which the search for files that fit ends.
const SPARE: u64 = 16 << 20;

/// Creates an ext4 file system of 4 GiB that contains files of `/usr/lib`.
fn ext4_of_usr_lib(path: &Path) {
    let staging = path.with_extension("files");
    std::fs::create_dir(&staging).unwrap();
    // If there are few libraries, several copies make it large enough.
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

/// Copies the regular files below `from` that fit into `left` bytes, and reduces `left` accordingly.
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
fn file_system_survives_vma_and_qcow2() {
    require!("mkfs.ext4", "e2fsck", "qemu-img");
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    ext4_of_usr_lib(&raw);
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
