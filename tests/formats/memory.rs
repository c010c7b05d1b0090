//! One limit bounds the memory of a run: whatever the disks, threads, formats and layers of compression.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::{ArchiveBuilder, Slot, slot};
use imgtool_testing::{assert_same, names, oracles, require, tempdir, text};

use crate::support::imgtool;

/// Default memory limit in bytes.
const LIMIT: u64 = 256 << 20;

const CLUSTER: u64 = 64 << 10;

/// Returns `data` as a zstd frame of uncompressed blocks that announces a window of 128 MiB.
fn stored_frame(data: &[u8]) -> Vec<u8> {
    // RFC 8878: magic, Frame_Header_Descriptor, Window_Descriptor.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88];
    let mut blocks = data.chunks(128 << 10).peekable();
    while let Some(block) = blocks.next() {
        let is_last = u32::from(blocks.peek().is_none());
        let header = is_last | u32::try_from(block.len()).unwrap() << 3;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame
}

#[test]
fn nested_windows_share_the_limit() {
    let dir = tempdir();
    let nested = dir.path().join("nested.raw.zst");
    let mut bytes = vec![0; 140 << 20];
    for _ in 0..4 {
        bytes = stored_frame(&bytes);
    }
    std::fs::write(&nested, bytes).unwrap();
    let out = dir.path().join("out.raw");
    let refused = imgtool(["convert", text(&nested), text(&out)]).measured().go().exits(1);
    assert!(refused.peak_memory < LIMIT, "{} bytes", refused.peak_memory);
    let refused = refused.says("not enough memory for a zstd window of 128 MiB").says("--memory ");
    assert!(!out.exists(), "{}", refused.stderr);
    for command in ["checksum", "info"] {
        let run = imgtool([command, text(&nested)]).measured().go();
        assert!(run.peak_memory < LIMIT, "{command}: {} bytes", run.peak_memory);
    }
    imgtool(["convert", "--memory", "700M", text(&nested), text(&out)]).ok();
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 140 << 20);
}

/// Returns a zstd frame of `len` equal bytes, in blocks of run-length type.
fn run_length_frame(len: u32) -> Vec<u8> {
    // RFC 8878: magic, Frame_Header_Descriptor with a content size of 4 bytes and a single segment.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend(len.to_le_bytes());
    let mut left = len;
    while left > 0 {
        let block = left.min(128 << 10);
        left -= block;
        frame.extend(&(u32::from(left == 0) | 1 << 1 | block << 3).to_le_bytes()[..3]);
        frame.push(b'x');
    }
    frame
}

/// Writes a seekable zstd file of frames with equal content, each after `hole` bytes that decoders skip.
fn write_seekable(path: &Path, frame: &[u8], plain_len: u32, hole: u32, count: u32) {
    let file = File::create(path).unwrap();
    let stored_len = u32::try_from(frame.len()).unwrap() + hole;
    for index in 0..u64::from(count) {
        let mut at = index * u64::from(stored_len);
        if hole > 0 {
            let header = [0x184d_2a50u32.to_le_bytes(), (hole - 8).to_le_bytes()].concat();
            file.write_all_at(&header, at).unwrap();
            at += u64::from(hole);
        }
        file.write_all_at(frame, at).unwrap();
    }
    let entries = [stored_len.to_le_bytes(), plain_len.to_le_bytes()].concat().repeat(count as usize);
    let footer = [&count.to_le_bytes()[..], &[0], &0x8f92_eab1u32.to_le_bytes()].concat();
    let rest = u32::try_from(entries.len() + footer.len()).unwrap();
    let table = [&0x184d_2a5eu32.to_le_bytes()[..], &rest.to_le_bytes(), &entries, &footer].concat();
    file.write_all_at(&table, u64::from(count) * u64::from(stored_len)).unwrap();
}

/// Seek tables of other programs: frames of one byte, of 16 MiB, and frames that take 16 MiB in the file.
#[test]
fn frames_of_any_length_share_the_limit() {
    let dir = tempdir();
    let file = dir.path().join("disk.raw.zst");
    for (len, hole, count) in [(1, 0, 200_000), (16 << 20, 0, 40), (64 << 10, (16 << 20) - 1000, 256)] {
        write_seekable(&file, &run_length_frame(len), len, hole, count);
        for (memory, limit) in [("256M", LIMIT), ("128M", 128 << 20)] {
            let out = dir.path().join("out.raw");
            let args = ["convert", "-q", "-m", "64", "--memory", memory, text(&file), text(&out)];
            let run = imgtool(args).measured().ok();
            let peak = run.peak_memory >> 20;
            assert!(run.peak_memory < limit, "{count} frames of {len} bytes within {memory}: {peak} MiB");
            assert_eq!(std::fs::metadata(&out).unwrap().len(), u64::from(len) * u64::from(count));
            std::fs::remove_file(out).unwrap();
        }
    }
}

/// The limit also has to suffice for the tables of the output, which grow with it.
#[test]
fn the_limit_that_a_refusal_names_suffices() {
    let dir = tempdir();
    let source = dir.path().join("long.raw.zst");
    std::fs::write(&source, stored_frame(&vec![1; 130 << 20])).unwrap();
    let out = dir.path().join("out.qcow2");
    let args = ["convert", "-q", text(&source), text(&out), "--memory"];
    let refused = imgtool(args).args(["64M"]).go().exits(1);
    let limit = suggested_limit(&refused.says("a zstd window of 128 MiB").stderr);
    imgtool(args).args([&limit]).ok();
}

/// Returns the limit that a refusal names.
fn suggested_limit(stderr: &str) -> String {
    let rest = stderr.split("--memory ").nth(1).expect("a limit");
    rest.split_whitespace().next().unwrap().to_owned()
}

/// An archive of `devices` disks of 1 TiB, each with a sub-block at every `stride`th cluster.
fn sparse_devices(path: &Path, devices: u8, clusters: u32, stride: u32) {
    let mut builder = ArchiveBuilder::new();
    for id in 1..=devices {
        builder = builder.device(id, &format!("d{id}"), 1 << 40);
    }
    let slots: Vec<Slot> =
        (0..clusters).flat_map(|number| (1..=devices).map(move |id| slot(id, number * stride, 1))).collect();
    std::fs::write(path, builder.extents(&slots, 59).build()).unwrap();
}

#[test]
fn tables_of_many_outputs_share_the_limit() {
    let dir = tempdir();
    let archive = dir.path().join("many.vma");
    // As a stream, the archive is not indexed first. It lacks clusters, so each run ends with an error.
    for (devices, clusters, format) in [(254, 100, "qcow2"), (254, 100, "vhdx"), (16, 512, "qcow2")] {
        sparse_devices(&archive, devices, clusters, 8192);
        let out = dir.path().join("out");
        let run = imgtool(["convert", "-q", "-", "--to", format, text(&out)]).pipe_from(&archive);
        let run = run.measured().go().exits(1).says("missing cluster");
        assert!(run.peak_memory < LIMIT, "{devices} to {format}: {} bytes", run.peak_memory);
    }
}

#[test]
fn refuses_too_many_tables_before_the_first_byte() {
    let dir = tempdir();
    let archive = dir.path().join("many.vma");
    sparse_devices(&archive, 254, 1, 1);
    let out = dir.path().join("out");
    let args = ["convert", "-q", "-", "--to", "qcow2", "-o", "cluster_size=2M", text(&out)];
    let refused = imgtool(args).pipe_from(&archive).measured().go().exits(1);
    let refused = refused.says("not enough memory for the tables of 254 outputs");
    assert!(!out.exists());
    let limit = suggested_limit(&refused.stderr);
    let run = imgtool(args).args(["--memory", &limit]).pipe_from(&archive);
    run.go().exits(1).says("missing cluster");
}

/// The tables in memory decide the layout, so neither the limit nor the number of threads may change it.
#[test]
fn one_image_does_not_depend_on_the_limit() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    let islands = (0..300u64).fold(Image::hole("islands", 40 << 30), |image, number| {
        image.with(number * (128 << 20), images::noise(number, 5000))
    });
    islands.write_raw(&raw);
    let first = dir.path().join("first.qcow2");
    imgtool(["convert", "-q", text(&raw), text(&first)]).ok();
    for (memory, threads) in [("128M", "1"), ("256M", "7"), ("2G", "3")] {
        let next = dir.path().join(format!("{memory}.qcow2"));
        imgtool(["convert", "-q", "--memory", memory, "-m", threads, text(&raw), text(&next)]).ok();
        assert_same(&first, &next, memory);
    }
}

#[test]
fn strong_compression_runs_fewer_workers() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    // zstd takes little time for noise, and as much memory as for prose.
    let image = Image::hole("mixed", 40 << 20).with(0, images::prose(1, 6 << 20));
    image.with(6 << 20, images::noise(1, 34 << 20)).write_raw(&raw);
    let options = "cluster_size=2M,compression_type=zstd";
    let args = ["convert", "-q", "-m", "16", "-c=zstd:19", "-o", options];
    let out = dir.path().join("out.qcow2");
    let run = imgtool(args).args([text(&raw), text(&out)]).measured().ok();
    assert!(run.peak_memory < LIMIT, "{} bytes", run.peak_memory);
}

#[test]
fn caches_of_many_sources_share_the_limit() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    let content = (0..3u64).fold(Image::hole("part", 60 << 20), |image, part| {
        image.with(part * (20 << 20), images::prose(part, 12 << 20))
    });
    content.write_raw(&raw);
    let options = "cluster_size=2M,compression_type=zstd";
    let sources: Vec<PathBuf> = (0..12).map(|n| dir.path().join(format!("disk{n}.qcow2"))).collect();
    imgtool(["convert", "-q", "-c", "-o", options, text(&raw), text(&sources[0])]).ok();
    for copy in &sources[1..] {
        std::fs::copy(&sources[0], copy).unwrap();
    }
    let out = dir.path().join("out.vma");
    let run = imgtool(["convert", "-q", "-m", "16"]).args(&sources).args([&out]).measured().ok();
    assert!(run.peak_memory < LIMIT, "{} bytes", run.peak_memory);
}

/// Writes an archive whose index is as large as can be: even, then odd zero clusters; and a disk with content.
fn scattered_archive(path: &Path, clusters: u32, content: u32) {
    let mut builder = ArchiveBuilder::new().device(1, "a", u64::from(clusters) * CLUSTER);
    builder = builder.device(2, "b", u64::from(content) * CLUSTER);
    let scattered = (0..clusters).step_by(2).chain((1..clusters).step_by(2)).map(|number| slot(1, number, 0));
    let stored = (0..content).map(|number| slot(2, number, 0xffff));
    let slots: Vec<Slot> = scattered.chain(stored).collect();
    std::fs::write(path, builder.extents(&slots, 59).build()).unwrap();
}

/// With little memory, the archive is read in one pass, without an index.
#[test]
fn a_large_index_leaves_less_for_pieces() {
    let dir = tempdir();
    let archive = dir.path().join("scattered.vma");
    scattered_archive(&archive, 59 * 100_000, 59 * 30);
    let outs = [dir.path().join("256M.qcow2"), dir.path().join("128M.qcow2")];
    for (out, limit) in outs.iter().zip([LIMIT, 128 << 20]) {
        let memory = format!("--memory={}M", limit >> 20);
        let args = ["convert", "-q", "-m", "64", "--disk", "b", "--to", "qcow2", "-c=zstd", &memory];
        let options = ["-o", "cluster_size=1M", text(&archive), text(out)];
        let run = imgtool(args).args(options).measured().ok();
        assert!(run.peak_memory < limit, "{memory}: {} bytes", run.peak_memory);
    }
    let [indexed, streamed] = outs;
    assert_same(&indexed, &streamed, "with and without an index");
}

/// Writes the sources of [`forty_shapes_stay_within_memory`].
fn write_shapes(dir: &Path) {
    let far = images::noise(1, 64 << 20);
    let disk = (0..3u64).fold(Image::hole("disk", 400 << 20), |image, part| {
        image
            .with(part * (110 << 20), far.clone())
            .with(part * (110 << 20) + (70 << 20), images::prose(part, 9 << 20))
    });
    disk.write_raw(&dir.join("disk.raw"));
    // zstd takes little time for noise, and as much memory as for prose.
    let mixed = Image::hole("mixed", 64 << 20).with(0, images::prose(9, 6 << 20));
    mixed.with(6 << 20, images::noise(9, 58 << 20)).write_raw(&dir.join("mixed.raw"));
    let whole = |devices: u8, clusters: u32, every: u32| {
        let mut builder = ArchiveBuilder::new();
        for id in 1..=devices {
            builder = builder.device(id, &format!("d{id}"), u64::from(clusters) * CLUSTER);
        }
        let mask = |number: u32| if number.is_multiple_of(every) { 0x8001 } else { 0 };
        let slots: Vec<Slot> = (0..clusters)
            .flat_map(|number| (1..=devices).map(move |id| slot(id, number, mask(number))))
            .collect();
        builder.extents(&slots, 59).build()
    };
    std::fs::write(dir.join("vm254.vma"), whole(254, 256, 5)).unwrap();
    std::fs::write(dir.join("vm16.vma"), whole(16, 16_384, 37)).unwrap();
    scattered_archive(&dir.join("index.vma"), 59 * 100_000, 59 * 16);
    sparse_devices(&dir.join("tables.vma"), 254, 100, 8192);
    let shell = |command: &str| oracles::run_in("sh", dir, &["-c", command]);
    shell("for f in *.vma; do zstd -q -1 $f; done; zstd -q -1 --long=27 < disk.raw > long.raw.zst");
    shell(
        "zstd -q -1 --long=27 < long.raw.zst > nested.raw.zst; xz --lzma2=preset=0,dict=64MiB -T1 < mixed.raw > mixed.raw.xz",
    );
    shell("lzop -q < disk.raw > disk.raw.lzo; gzip -1 < disk.raw > disk.raw.gz");
    let pack = |args: &[&str], out: &str| {
        imgtool(["convert", "-q"]).args(args).args([text(&dir.join("disk.raw")), text(&dir.join(out))]).ok();
    };
    pack(&[], "seekable.raw.zst");
    pack(&["-c=zstd", "-o", "cluster_size=2M"], "large.qcow2");
    pack(&["-c"], "small.qcow2");
    pack(&[], "disk.vhdx");
    for n in 0..12 {
        std::fs::copy(dir.join("large.qcow2"), dir.join(format!("copy{n}.qcow2"))).unwrap();
    }
}

/// Command lines of [`forty_shapes_stay_within_memory`]; `OUT` is a new name.
const SHAPES: [&str; 42] = [
    "convert -m 1 disk.raw OUT.raw",
    "convert -m 64 disk.raw OUT.raw",
    "convert -m 1 disk.raw OUT.qcow2",
    "convert -m 64 disk.raw OUT.qcow2",
    "convert -m 64 -o cluster_size=2M disk.raw OUT.qcow2",
    "convert -m 64 -o cluster_size=128k,extended_l2=on disk.raw OUT.qcow2",
    "convert -m 1 -c=zstd:19 -o cluster_size=2M mixed.raw OUT.qcow2",
    "convert -m 7 -c=zstd:19 -o cluster_size=2M mixed.raw OUT.qcow2",
    "convert -m 64 -c=zstd:19 -o cluster_size=2M mixed.raw OUT.qcow2",
    "convert -m 64 -c=zlib:12 -o cluster_size=2M mixed.raw OUT.qcow2",
    "convert -m 64 -c=zstd -o cluster_size=64k disk.raw OUT.qcow2",
    "convert -m 64 -o block_size=256M disk.raw OUT.vhdx",
    "convert -m 64 disk.raw OUT.vma",
    "convert -m 64 disk.raw OUT.vma.zst",
    "convert -m 64 -c=zstd:19 mixed.raw OUT.vma",
    "convert -m 64 -c=zstd:15 mixed.raw OUT.raw.zst",
    "convert -m 64 --verify disk.raw OUT.raw.zst",
    "convert -m 64 disk.raw OUT.raw.gz",
    "convert -m 64 long.raw.zst OUT.raw",
    "convert -m 64 -c=zstd -o cluster_size=2M long.raw.zst OUT.qcow2",
    "convert -m 64 --memory 400M nested.raw.zst OUT.raw",
    "convert -m 64 mixed.raw.xz OUT.qcow2",
    "convert -m 64 disk.raw.lzo OUT.qcow2",
    "convert -m 64 disk.raw.gz OUT.vhdx --to vhdx",
    "convert -m 64 seekable.raw.zst OUT.qcow2",
    "convert -m 64 large.qcow2 OUT.raw",
    "convert -m 64 small.qcow2 OUT.vma.zst",
    "convert -m 64 copy0.qcow2 copy1.qcow2 copy2.qcow2 copy3.qcow2 copy4.qcow2 copy5.qcow2 copy6.qcow2 copy7.qcow2 copy8.qcow2 copy9.qcow2 copy10.qcow2 copy11.qcow2 OUT.vma",
    "convert -m 1 vm254.vma.zst --to qcow2 OUT",
    "convert -m 64 vm254.vma.zst --to qcow2 OUT",
    "convert -m 64 vm254.vma.zst --to qcow2 -c OUT",
    "convert -m 64 vm254.vma --to vhdx OUT",
    "convert -m 64 vm254.vma OUT.vma.zst",
    "convert -m 64 --verify vm254.vma --to qcow2 OUT",
    "convert -m 64 vm16.vma.zst --to qcow2 OUT",
    "convert -m 64 vm16.vma.zst --to qcow2 -o cluster_size=128k,extended_l2=on OUT",
    "convert -m 64 index.vma --to qcow2 OUT",
    "convert -m 64 --disk b index.vma.zst --to raw OUT",
    "convert -m 64 tables.vma.zst --to qcow2 OUT",
    "convert -m 64 tables.vma.zst --to vhdx OUT",
    "compare -m 64 index.vma seekable.raw.zst",
    "check index.vma",
];

/// Prints the table with `--run-ignored`; takes minutes.
#[test]
#[ignore = "takes minutes and 3 GiB: run it with --ignored --nocapture after a change of the memory budget"]
fn forty_shapes_stay_within_memory() {
    require!("zstd");
    require!("xz");
    require!("lzop");
    let dir = tempdir();
    write_shapes(dir.path());
    let before = names(dir.path());
    let mut beyond = Vec::new();
    for shape in SHAPES {
        let words = shape.split(' ').map(|word| word.replace("OUT", "out"));
        let run = imgtool(words).within(dir.path()).measured().go();
        let limit = if shape.contains("--memory 400M") { 400 << 20 } else { LIMIT };
        let mib = run.peak_memory >> 20;
        println!("{mib:4} MiB  exit {}  {shape}", run.status.code().unwrap_or(-1));
        if run.peak_memory > limit {
            beyond.push(format!("{mib} MiB: {shape}"));
        }
        for name in names(dir.path()).iter().filter(|name| !before.contains(name)) {
            let path = dir.path().join(name);
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        }
    }
    assert!(beyond.is_empty(), "{beyond:#?}");
}
