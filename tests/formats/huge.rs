//! The cost of a conversion follows the data, not the virtual size; memory is bounded.

use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, occupied, oracles, require, tempdir, text};

use crate::support::imgtool;

/// Maximum memory in bytes of a conversion of any size. Our limit.
const MEMORY_LIMIT: u64 = 256 << 20;

/// Returns a very large image with a few islands of data.
fn islands(size: u64) -> Image {
    Image::hole("islands", size)
        .with(0, images::noise(1, 100_000))
        .with(size / 3 + 777, images::noise(2, 50_000))
        .with(size - 5000, images::noise(3, 5000))
}

#[test]
fn converts_8_tib_of_zeros_quickly_and_sparsely() {
    let dir = tempdir();
    let raw = dir.path().join("raw");
    Image::hole("x", 8 << 40).write_raw(&raw);
    let began = Instant::now();
    let mut at = raw.clone();
    for format in ["qcow2", "vhdx", "qcow2", "raw"] {
        let next = dir.path().join(format!("{}.{format}", names_len(dir.path())));
        let run = imgtool(["convert", text(&at), "--to", format, text(&next)]).measured().ok();
        assert!(run.peak_memory <= MEMORY_LIMIT, "{format}: {} bytes", run.peak_memory);
        at = next;
    }
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert_eq!(std::fs::metadata(&at).unwrap().len(), 8 << 40);
    assert!(occupied(&at) < 1 << 20, "{} bytes are occupied", occupied(&at));
}

/// A file on ext4 has at most 16 TiB; a file in memory may be larger.
#[test]
fn converts_64_tib_of_zeros_in_64_mib_of_memory() {
    require!("qemu-img");
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        oracles::unable("there is no file system in memory at /dev/shm", true);
        return;
    };
    let first = dir.path().join("first.qcow2");
    let created = imgtool(["create", "-f", "qcow2", text(&first), "64T"]).measured().ok();
    assert!(created.peak_memory <= 64 << 20, "{} bytes", created.peak_memory);
    let mut at = first;
    for format in ["raw", "qcow2", "vhdx", "raw", "qcow2"] {
        let next = dir.path().join(format!("{}.{format}", names_len(dir.path())));
        let run = imgtool(["convert", "-q", text(&at), "--to", format, text(&next)]).measured().ok();
        assert!(run.peak_memory <= 64 << 20, "{format}: {} bytes", run.peak_memory);
        assert!(occupied(&next) < 4 << 20, "{format}: {} bytes are occupied", occupied(&next));
        if format == "raw" {
            assert_eq!(std::fs::metadata(&next).unwrap().len(), 64 << 40);
        } else {
            assert_eq!(oracles::qemu_info(&next, format)["virtual-size"], 64u64 << 40);
        }
        at = next;
    }
    oracles::qemu_check(&at, "qcow2");
}

fn names_len(directory: &std::path::Path) -> usize {
    imgtool_testing::names(directory).len()
}

/// Converts islands of data through `formats` to raw. Nothing may be lost, and nothing added.
fn islands_survive(size: u64, formats: &[&str]) {
    let dir = tempdir();
    let raw = dir.path().join("start");
    let image = islands(size);
    image.write_raw(&raw);
    let mut at = raw.clone();
    for (step, format) in formats.iter().chain(&["raw"]).enumerate() {
        let next = dir.path().join(format!("{step}.{format}"));
        let run = imgtool(["convert", text(&at), "--to", format, text(&next)]).measured().ok();
        assert!(run.peak_memory <= MEMORY_LIMIT, "{format}: {} bytes", run.peak_memory);
        // qemu-img does not see holes in VHDX, and would read all of a larger image.
        match *format {
            "qcow2" | "vdi" => oracles::qemu_check(&next, format),
            "vhdx" if size < 8 << 30 => oracles::qemu_check(&next, format),
            _ => {}
        }
        match *format {
            "qcow2" | "vdi" => oracles::qemu_compare(&raw, "raw", &next, format),
            "vhd" => oracles::qemu_compare(&raw, "raw", &next, "vpc"),
            "vhdx" if size < 8 << 30 => oracles::qemu_compare(&raw, "raw", &next, format),
            _ => {}
        }
        at = next;
    }
    assert_islands(&image, &at);
}

/// Asserts that a raw file contains the data of an image, and is sparse.
fn assert_islands(image: &Image, at: &std::path::Path) {
    let file = std::fs::File::open(at).unwrap();
    assert_eq!(file.metadata().unwrap().len(), image.size);
    for (start, bytes) in &image.runs {
        let mut got = vec![0; bytes.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, *start).unwrap();
        assert!(got == *bytes, "at {start}");
    }
    assert!(occupied(at) < 1 << 20, "{} bytes are occupied", occupied(at));
}

#[test]
fn preserves_scattered_data_in_the_largest_vhd() {
    require!("qemu-img");
    islands_survive(2040 << 30, &["vhd", "vdi", "vhd"]);
    let dir = tempdir();
    let raw = dir.path().join("start.raw");
    Image::hole("larger", (2040 << 30) + 512).write_raw(&raw);
    let refused = imgtool(["convert", text(&raw), text(&dir.path().join("x.vhd"))]).go();
    refused.exits(1).says("the limit of dynamic VHD images");
}

#[test]
fn preserves_scattered_data_in_vdi_beyond_2_tib() {
    require!("qemu-img");
    islands_survive((3 << 40) + 512, &["vdi", "vmdk", "vdi"]);
}

#[test]
fn reads_small_formats_beyond_2_tib() {
    require!("qemu-img");
    let dir = tempdir();
    let (raw, back) = (dir.path().join("start.raw"), dir.path().join("back.raw"));
    let image = islands((2 << 40) + (5 << 20) + 512);
    image.write_raw(&raw);
    for format in ["parallels", "qed", "qcow"] {
        let source = dir.path().join(format!("x.{format}"));
        oracles::qemu_make(&raw, format, "", &source);
        let run = imgtool(["convert", "--force", text(&source), "--to", "raw", text(&back)]).measured().ok();
        assert!(run.peak_memory <= MEMORY_LIMIT, "{format}: {} bytes", run.peak_memory);
        assert_islands(&image, &back);
    }
}

#[test]
fn preserves_scattered_data_in_4_tib() {
    require!("qemu-img");
    islands_survive((4 << 40) + 512, &["qcow2", "vhdx", "qcow2"]);
}

#[test]
fn qemu_reads_vhdx_beyond_4_gib() {
    // From 4 GiB on, sector bitmap entries are interleaved in the block allocation table.
    require!("qemu-img");
    islands_survive(6 << 30, &["vhdx"]);
}

#[test]
fn sparse_images_stay_sparse_in_every_format() {
    let dir = tempdir();
    let raw = dir.path().join("start.raw");
    islands(3 << 30).write_raw(&raw);
    let mut at = raw.clone();
    for (step, format) in ["vma", "qcow2", "raw", "vhdx", "raw"].into_iter().enumerate() {
        let next = dir.path().join(format!("{step}.{format}"));
        imgtool(["convert", text(&at), "--to", format, text(&next)]).ok();
        // VHDX allocates whole blocks of up to 32 MiB for each island.
        let limit = if format == "vhdx" { 200 << 20 } else { 8 << 20 };
        assert!(occupied(&next) < limit, "{format}: {} bytes are occupied", occupied(&next));
        at = next;
    }
    assert_same(&raw, &at, "the chain");
}

#[test]
fn written_zeros_become_holes() {
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    Image::hole("z", 32 << 20).with(0, vec![0; 32 << 20]).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let out = dir.path().join(format!("out.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&out)]).ok();
        assert!(occupied(&out) < 5 << 20, "{format}: {} bytes are occupied", occupied(&out));
    }
}

/// Converts a large raw image that repeats itself every 90 MiB, and returns the peak memory in bytes.
/// `source`
/// makes the source from the raw file.
fn peak_memory(arguments: &[&str], source: impl FnOnce(&std::path::Path) -> std::path::PathBuf) -> u64 {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    let far = images::noise(1, 90 << 20);
    let size = 3 * far.len() as u64;
    let mut image = Image::hole("far", size);
    for round in 0..3 {
        image = image.with(round * far.len() as u64, far.clone());
    }
    image.write_raw(&raw);
    let source = source(&raw);
    let out = dir.path().join("out");
    let run = imgtool(["convert", "--threads", "16", "-f", "raw", text(&source), text(&out)]);
    let run = run.args(arguments).measured().ok();
    let back = dir.path().join("back.raw");
    imgtool(["convert", text(&out), "--to", "raw", text(&back)]).ok();
    assert_same(&raw, &back, "the content");
    run.peak_memory
}

#[test]
fn long_zstd_window_stays_within_the_memory_limit() {
    require!("zstd");
    let peak = peak_memory(&["--to", "qcow2"], |raw| {
        let packed = raw.with_extension("raw.zst");
        // From standard input, zstd can't know the length, so the header asks for the whole window.
        let command = format!("zstd -q -1 --long=27 < '{}' > '{}'", text(raw), text(&packed));
        oracles::run("sh", &["-c", &command]);
        packed
    });
    assert!(peak > 100 << 20, "the window was not used: {peak} bytes");
    assert!(peak <= MEMORY_LIMIT, "{peak} bytes");
}

#[test]
fn large_clusters_on_16_threads_stay_within_memory_limit() {
    for arguments in [
        &["--to", "qcow2", "-o", "cluster_size=2M", "--compress=zstd"][..],
        &["--to", "qcow2", "-o", "cluster_size=2M", "--compress=zlib:1"],
        &["--to", "vma"],
        &["--to", "vhdx", "-o", "block_size=256M"],
    ] {
        let peak = peak_memory(arguments, std::path::Path::to_owned);
        assert!(peak <= MEMORY_LIMIT, "{arguments:?}: {peak} bytes");
    }
}
