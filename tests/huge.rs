//! The cost of a conversion follows the data, not the virtual size; memory is bounded.

use std::time::{Duration, Instant};

use crate::support::images::{self, Image};
use crate::support::oracles::{self, require};
use crate::support::{assert_same, imgtool, occupied, tempdir, text};

/// The most memory a conversion may hold, at any size.
const MEMORY_LIMIT: u64 = 256 << 20;

/// A very large image with a few islands of data.
fn islands(size: u64) -> Image {
    Image::hole("islands", size)
        .with(0, images::noise(1, 100_000))
        .with(size / 3 + 777, images::noise(2, 50_000))
        .with(size - 5000, images::noise(3, 5000))
}

#[test]
fn eight_tebibytes_of_nothing_take_no_time_and_no_space() {
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

fn names_len(directory: &std::path::Path) -> usize {
    crate::support::names(directory).len()
}

#[test]
fn islands_in_a_large_image_survive_every_format() {
    require!("qemu-img");
    let dir = tempdir();
    let raw = dir.path().join("raw");
    let image = islands((4 << 40) + 512);
    image.write_raw(&raw);
    let mut at = raw.clone();
    for format in ["vhdx", "qcow2", "raw"] {
        let next = dir.path().join(format!("x.{format}"));
        imgtool(["convert", text(&at), "--to", format, text(&next)]).ok();
        if format != "raw" {
            oracles::qemu_check(&next, format);
            oracles::qemu_compare(&raw, "raw", &next, format);
        }
        at = next;
    }
    for (start, bytes) in &image.runs {
        let mut got = vec![0; bytes.len()];
        let file = std::fs::File::open(&at).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, *start).unwrap();
        assert!(got == *bytes, "at {start}");
    }
    assert!(occupied(&at) < 4 << 20, "{} bytes are occupied", occupied(&at));
}

#[test]
fn sparse_stays_sparse_in_every_format() {
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
fn zeros_that_were_written_become_holes() {
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    Image::hole("z", 32 << 20).with(0, vec![0; 32 << 20]).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let out = dir.path().join(format!("out.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&out)]).ok();
        assert!(occupied(&out) < 5 << 20, "{format}: {} bytes are occupied", occupied(&out));
    }
}
