//! A whole virtual machine: converted through every format and back, restored in part without reading the
//! rest, and restored as far as possible from a damaged archive.

use std::path::Path;

use imgtool_testing::images::{Image, noise, prose};
use imgtool_testing::vma::Archive;
use imgtool_testing::{fixture, names, oracles, require, sha256_file, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

const CONFIG: &[u8] = b"name: web\nscsi0: local:100/a.raw\n#qmdump#map:scsi0:drive-scsi0:local:raw:\n\
    #qmdump#map:virtio1:drive-virtio1::raw:\n#qmdump#map:efidisk0:drive-efidisk0:local:qcow2:\n";
const FIREWALL: &[u8] = b"[OPTIONS]\nenable: 1\n";

/// Writes an archive of three disks of different shapes, the state of the guest and two configuration files.
fn machine(directory: &Path) {
    let system = Image::hole("s", 9 << 20)
        .with(0, prose(1, 700_000))
        .with(5 << 20, noise(2, 300_000))
        .with((9 << 20) - 512, noise(3, 512));
    let data = Image::hole("d", (6 << 20) + 4096).with(4096, noise(4, 1 << 20));
    let efi = Image::hole("e", 540_672).with(0, noise(5, 8192)).with(262_144, noise(6, 4096));
    let state = Image::hole("r", 300_032).with(0, noise(7, 4096)).with(200_000, noise(8, 100_032));
    let archive = Archive::of([
        ("drive-scsi0", system),
        ("vmstate", state),
        ("drive-virtio1", data),
        ("drive-efidisk0", efi),
    ])
    .ids(&[3, 7, 200, 254])
    .config("qemu-server.conf", CONFIG)
    .config("qemu-server.fw", FIREWALL)
    .shuffled(5)
    .build();
    std::fs::write(directory.join("vm.vma"), archive.bytes).unwrap();
}

/// Returns the sorted names and sizes that `vma list` prints.
fn list(directory: &Path, archive: &str) -> Vec<String> {
    let listed = imgtool(["vma", "list", archive]).within(directory).ok().text();
    let without_id = |line: &str| {
        line.split(' ').filter(|word| !word.starts_with("dev_id=")).collect::<Vec<_>>().join(" ")
    };
    let mut lines: Vec<String> =
        listed.lines().filter(|line| !line.starts_with("CTIME")).map(without_id).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn virtual_machine_survives_qcow2_vhdx_and_raw() {
    let dir = tempdir();
    machine(dir.path());
    for (archive, from_pipe) in [("back.vma", false), ("back.vma.zst", true)] {
        let targets = [
            "--target",
            "drive-scsi0=d/system.qcow2",
            "--target",
            "drive-virtio1=d/data.vhdx",
            "--to",
            "raw",
            "d/",
        ];
        std::fs::create_dir(dir.path().join("d")).unwrap();
        if from_pipe {
            imgtool(["convert", "-"])
                .args(targets)
                .pipe_from(&dir.path().join("vm.vma"))
                .within(dir.path())
                .ok();
        } else {
            imgtool(["convert", "vm.vma"]).args(targets).within(dir.path()).ok();
        }
        let made = [
            "data.vhdx",
            "drive-efidisk0.raw",
            "qemu-server.conf",
            "qemu-server.fw",
            "system.qcow2",
            "vmstate.bin",
            "web.xml",
        ];
        assert_eq!(names(&dir.path().join("d")), made);
        imgtool([
            "convert",
            "drive-scsi0=d/system.qcow2",
            "vmstate=d/vmstate.bin",
            "drive-virtio1=d/data.vhdx",
        ])
        .args(["drive-efidisk0=d/drive-efidisk0.raw", archive])
        .args(["--config", "d/qemu-server.conf", "--config", "d/qemu-server.fw"])
        .within(dir.path())
        .ok();
        assert_eq!(list(dir.path(), "vm.vma"), list(dir.path(), archive));
        imgtool(["compare", "vm.vma", archive]).within(dir.path()).ok();
        for (name, content) in [("qemu-server.conf", CONFIG), ("qemu-server.fw", FIREWALL)] {
            assert_eq!(
                imgtool(["vma", "config", archive, "-c", name]).within(dir.path()).ok().stdout,
                content
            );
        }
        for (source, out) in [("vm.vma", "x1"), (archive, "x2")] {
            imgtool(["vma", "extract", source, out]).within(dir.path()).ok();
        }
        assert_eq!(snapshot(&dir.path().join("x1")), snapshot(&dir.path().join("x2")));
        assert_eq!(names(&dir.path().join("x1")).len(), 6);
        for made in ["d", "x1", "x2"] {
            std::fs::remove_dir_all(dir.path().join(made)).unwrap();
        }
    }
}

#[test]
fn uuid_and_time_are_configurable_and_reproducible() {
    let dir = tempdir();
    machine(dir.path());
    let uuid = "36a8e9e0-c2d8-4832-a443-d0a951b8175e";
    let options = format!("uuid={uuid},ctime=1795341838");
    imgtool(["convert", "vm.vma", "a.vma", "-o", &options]).within(dir.path()).ok();
    let facts = |archive: &str| {
        let info = imgtool(["info", "--output", "json", archive]).within(dir.path()).ok().json();
        let data = &info["format-specific"]["data"];
        (data["uuid"].as_str().unwrap().to_owned(), data["ctime"].as_i64().unwrap())
    };
    assert_eq!(facts("a.vma"), (uuid.to_owned(), 1_795_341_838));
    for archive in ["b.vma", "c.vma"] {
        imgtool(["convert", "vm.vma", archive]).within(dir.path()).ok();
    }
    assert_eq!(facts("b.vma").1, 1_790_000_000, "SOURCE_DATE_EPOCH");
    assert_eq!(sha256_file(&dir.path().join("b.vma")), sha256_file(&dir.path().join("c.vma")));
}

/// Runs the program and returns the number of bytes of a file that it reads.
fn bytes_read(file: &Path, args: &[&str]) -> u64 {
    let trace = tempdir();
    let log = trace.path().join("trace");
    // One trace per thread, so that no line is split.
    let output = std::process::Command::new("strace")
        .args(["-ff", "-y", "-e", "trace=read,readv,pread64,preadv,preadv2,mmap,copy_file_range,sendfile"])
        .args(["-o", text(&log), PROGRAM])
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let mut total = 0;
    for entry in std::fs::read_dir(trace.path()).unwrap() {
        let trace = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for line in trace.lines().filter(|line| line.contains(&format!("<{}>", text(file)))) {
            assert!(!line.starts_with("mmap"), "{line}");
            total += line.rsplit("= ").next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    total
}

#[test]
fn reads_only_the_needed_parts_of_a_seekable_archive() {
    require!("strace");
    let dir = tempdir();
    let dir = dir.path().canonicalize().unwrap();
    // Noise, which zstd shortens only a little.
    for (name, seed, len) in [("a.raw", 1, 24 << 20), ("b.raw", 2, 8 << 20)] {
        std::fs::write(dir.join(name), noise(seed, len)).unwrap();
    }
    let (raw_a, raw_b) = (dir.join("a.raw"), dir.join("b.raw"));
    for archive in ["vm.vma", "vm.vma.zst"] {
        let archive = dir.join(archive);
        imgtool(["convert", "-q"]).args([&raw_a, &raw_b, &archive]).ok();
        let all = std::fs::metadata(&archive).unwrap().len();
        let path = text(&archive);
        let few = 256 << 10;
        for args in [&["info", path][..], &["map", path], &["vma", "list", path]] {
            let read = bytes_read(&archive, args);
            assert!(read < few, "{args:?} reads {read} of {all} bytes");
        }
        let (out, target) = (dir.join("out.raw"), dir.join("extracted"));
        let wanted = 8 << 20;
        let _ = std::fs::remove_dir_all(&target);
        let lines: [&[&str]; 4] = [
            &["convert", "--force", "--disk", "b", path, "--to", "raw", text(&out)],
            &["compare", "--disk", "b", path, text(&raw_b)],
            &["checksum", "--disk", "b", path],
            &["vma", "extract", "-d", "b", path, text(&target)],
        ];
        for args in lines {
            let read = bytes_read(&archive, args);
            assert!(read > wanted / 2 && read < wanted + few, "{args:?} reads {read} of {all} bytes");
        }
        assert_eq!(sha256_file(&out), sha256_file(&raw_b));
    }
}

/// Returns the lost ranges of a run with `--salvage --output json`: device, start, length.
fn lost(json: &serde_json::Value) -> Vec<(String, u64, u64)> {
    let lost = json["lost"].as_array().unwrap();
    lost.iter()
        .map(|loss| {
            assert!(!loss["reason"].as_str().unwrap().is_empty());
            let number = |field: &str| loss[field].as_u64().unwrap();
            (loss["device"].as_str().unwrap().to_owned(), number("start"), number("length"))
        })
        .collect()
}

#[test]
fn salvage_lists_losses_in_text_and_json_and_keeps_the_rest() {
    let dir = tempdir();
    let path = dir.path();
    let from = fixture("two-disks.vma.zst");
    imgtool(["convert", "-q", "-f", "raw", "--to", "raw", text(&from), "whole.vma"]).within(path).ok();
    imgtool(["convert", "-q", "whole.vma", "--to", "raw", "truth"]).within(path).ok();
    let whole = std::fs::read(path.join("whole.vma")).unwrap();
    let sizes = [("drive-scsi0", 5_255_168u64), ("drive-efidisk0", 540_672)];
    // Two cuts, a missing piece, and an overwritten extent header.
    let second = 12_800 + 1_192_448;
    let mut headless = whole.clone();
    headless[second..second + 512].fill(0xee);
    let damaged = [
        whole[..whole.len() / 2].to_vec(),
        whole[..12_800].to_vec(),
        [&whole[..600_000], &whole[604_096..]].concat(),
        headless,
    ];
    for (number, bytes) in damaged.iter().enumerate() {
        std::fs::write(path.join("bad.vma"), bytes).unwrap();
        imgtool(["convert", "bad.vma", "--to", "raw", "no"]).within(path).go().exits(1).says("--salvage");
        assert!(!path.join("no").exists());
        for piped in [false, true] {
            let source = if piped { "-" } else { "bad.vma" };
            let run = imgtool([
                "convert",
                "--force",
                "--salvage",
                "--output",
                "json",
                source,
                "--to",
                "raw",
                "out",
            ]);
            let run = if piped { run.pipe_bytes(bytes.clone()) } else { run };
            let ranges = lost(&run.within(path).go().exits(3).json());
            assert!(!ranges.is_empty(), "{number}");
            for (device, size) in sizes {
                let restored = std::fs::read(path.join(format!("out/{device}.raw"))).unwrap();
                let truth = std::fs::read(path.join(format!("truth/{device}.raw"))).unwrap();
                assert_eq!(restored.len() as u64, size);
                let mut at = 0;
                for (_, start, len) in ranges.iter().filter(|(name, ..)| name == device) {
                    let (start, end) = (*start as usize, (start + len) as usize);
                    assert!(restored[at..start] == truth[at..start], "{number}: {device} before {start}");
                    assert!(restored[start..end].iter().all(|byte| *byte == 0));
                    at = end;
                }
                assert!(restored[at..] == truth[at..], "{number}: {device} after {at}");
            }
            let said = imgtool(["convert", "--force", "--salvage", "bad.vma", "--to", "raw", "out"])
                .within(path)
                .go()
                .exits(3);
            for (device, start, len) in &ranges {
                let line = format!("{device} guest bytes {start}..{}", start + len);
                assert!(said.stderr.contains(&line), "no '{line}' in\n{}", said.stderr);
            }
        }
    }
}

#[test]
fn salvage_skips_a_damaged_frame() {
    require!("zstd");
    let dir = tempdir();
    let path = dir.path();
    let disk = noise(1, 20 << 20);
    std::fs::write(path.join("disk.raw"), &disk).unwrap();
    imgtool(["convert", "disk.raw", "vm.vma.zst"]).within(path).ok();
    let mut bytes = std::fs::read(path.join("vm.vma.zst")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 100].fill(0);
    std::fs::write(path.join("bad.vma.zst"), &bytes).unwrap();
    imgtool(["convert", "bad.vma.zst", "--to", "raw", "no.raw"]).within(path).go().exits(1);
    assert!(!path.join("no.raw").exists());
    let run = imgtool(["convert", "--salvage", "--output", "json", "bad.vma.zst", "--to", "raw", "out.raw"]);
    let ranges = lost(&run.within(path).go().exits(3).json());
    let total: u64 = ranges.iter().map(|(_, _, len)| len).sum();
    assert!(total > 0 && total <= 59 * 65_536, "one frame is one extent: {total} bytes are lost");
    let mut expected = disk.clone();
    for (_, start, len) in &ranges {
        expected[*start as usize..(start + len) as usize].fill(0);
    }
    assert!(std::fs::read(path.join("out.raw")).unwrap() == expected);
    // From a pipe, the program finds the content after the frame as well. It lists the whole frame, since
    // even the part that was decoded may be wrong.
    let run = imgtool(["convert", "--salvage", "--output", "json", "-", "--to", "raw", "piped.raw"]);
    let from_pipe = lost(&run.pipe_bytes(bytes).within(path).go().exits(3).json());
    let mut piped = std::fs::read(path.join("piped.raw")).unwrap();
    for (_, start, len) in &from_pipe {
        piped[*start as usize..(start + len) as usize].fill(0);
    }
    assert_eq!(from_pipe.iter().map(|(_, _, len)| len).sum::<u64>(), total);
    assert!(piped == expected);
}

#[test]
fn other_programs_read_compressed_archives() {
    require!("zstd", "gzip");
    let dir = tempdir();
    machine(dir.path());
    let plain = dir.path().join("plain.vma");
    imgtool(["convert", "-q", "vm.vma", "plain.vma"]).within(dir.path()).ok();
    let plain = std::fs::read(plain).unwrap();
    for (name, tool) in [("p.vma.zst", "zstd"), ("p.vma.gz", "gzip")] {
        imgtool(["convert", "-q", "vm.vma", name]).within(dir.path()).ok();
        let path = dir.path().join(name);
        assert!(oracles::run(tool, &["-dc", text(&path)]).stdout == plain, "{name}");
        let one = imgtool(["convert", "-q", "--threads", "1", "vm.vma", "--to", "vma", "-c", "-"]);
        if tool == "zstd" {
            assert!(one.within(dir.path()).ok().stdout == std::fs::read(&path).unwrap(), "threads");
        }
    }
}
