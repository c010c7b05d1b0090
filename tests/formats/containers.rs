//! Images in zip and tar archives, `--member`, and packages that were cut or have odd references.

use std::path::Path;

use imgtool_testing::images::{Image, noise, prose};
use imgtool_testing::tar::{Tar, descriptor, manifest};
use imgtool_testing::{assert_same, names, oracles, require, tempdir, text};

use crate::support::imgtool;

fn disk(name: &'static str, seed: u64) -> Image {
    Image::hole(name, 4 << 20).with(0, noise(seed, 100_000)).with(2 << 20, prose(seed, 300_000))
}

/// Writes a zip archive with Python, whose members are compressed as `kind` says.
fn zip(directory: &Path, name: &str, kind: &str, members: &[&str]) {
    const PROGRAM: &str = "import sys, zipfile\n\
        kind, name, *members = sys.argv[1:]\n\
        with zipfile.ZipFile(name, 'w', getattr(zipfile, 'ZIP_' + kind)) as archive:\n\
        \x20for member in members: archive.write(member)\n";
    let members = [&["-c", PROGRAM, kind, name], members].concat();
    oracles::run_in("python3", directory, &members);
}

#[test]
fn converts_disks_in_zip_archives_of_another_program() {
    require!("python3", "qemu-img");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("d")).unwrap();
    disk("one", 1).write_raw(&path("d/one.raw"));
    disk("two", 2).write_raw(&path("two.raw"));
    oracles::qemu_make(&path("two.raw"), "qcow2", "", &path("two.qcow2"));
    std::fs::write(path("readme.txt"), "notes").unwrap();
    for kind in ["STORED", "DEFLATED"] {
        zip(dir.path(), "all.zip", kind, &["readme.txt", "d/one.raw", "two.qcow2"]);
        for source in ["all.zip", "-"] {
            let run = imgtool(["convert", "-q", source, "--to", "raw", "out/"]).within(dir.path());
            let run = if source == "-" { run.pipe_from(&path("all.zip")) } else { run };
            run.ok();
            assert_eq!(names(&path("out")), ["one.raw", "two.raw"], "{kind}");
            assert_same(&path("out/one.raw"), &path("d/one.raw"), kind);
            assert_same(&path("out/two.raw"), &path("two.raw"), kind);
            std::fs::remove_dir_all(path("out")).unwrap();
        }
        imgtool(["check", "all.zip"]).within(dir.path()).ok();
    }
    for (kind, says) in [("BZIP2", "packed with bzip2"), ("LZMA", "packed with LZMA")] {
        zip(dir.path(), "other.zip", kind, &["two.raw"]);
        imgtool(["convert", "other.zip", "o.raw"]).within(dir.path()).go().exits(1).says(says);
    }
    // One flipped bit in a stored disk.
    zip(dir.path(), "bad.zip", "STORED", &["d/one.raw"]);
    let mut bytes = std::fs::read(path("bad.zip")).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(path("bad.zip"), bytes).unwrap();
    imgtool(["convert", "bad.zip", "bad.raw"]).within(dir.path()).go().exits(1).says("CRC-32");
    imgtool(["check", "bad.zip"]).within(dir.path()).go().exits(2);
}

#[test]
fn every_command_reads_the_chosen_member() {
    require!("python3", "tar", "gzip");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    for (name, seed) in [("one.bin", 1), ("two.bin", 2)] {
        disk("x", seed).write_raw(&path(name));
        // Without an extension, the content must be that of a disk.
        let mut bytes = std::fs::read(path(name)).unwrap();
        bytes[510..512].copy_from_slice(b"\x55\xaa");
        std::fs::write(path(name), bytes).unwrap();
    }
    zip(dir.path(), "x.zip", "DEFLATED", &["one.bin", "two.bin"]);
    oracles::run_in("tar", dir.path(), &["-czf", "x.tar.gz", "one.bin", "two.bin"]);
    oracles::run_in("tar", dir.path(), &["-cf", "x.tar", "one.bin", "two.bin"]);
    for archive in ["x.zip", "x.tar", "x.tar.gz"] {
        let run = |command: &str, more: &[&str]| {
            let line = [&[command, "--member", "two.bin", archive][..], more].concat();
            imgtool(line).within(dir.path())
        };
        run("convert", &["out.raw", "--force"]).ok();
        assert_same(&path("out.raw"), &path("two.bin"), archive);
        run("compare", &["two.bin"]).ok();
        run("compare", &["one.bin"]).go().exits(1);
        run("check", &[]).ok();
        run("map", &[]).ok();
        run("measure", &["-O", "qcow2"]).ok();
        let digest = run("checksum", &[]).ok().text();
        let plain = imgtool(["checksum", "two.bin"]).within(dir.path()).ok().text();
        assert_eq!(digest.split(' ').next(), plain.split(' ').next());
        let info = run("info", &["--output", "json"]).ok().json();
        assert_eq!(info["devices"][0]["name"], "two.bin", "{info}");
        // Without the choice, the error lists what can be chosen, as the shell takes it.
        let run = imgtool(["convert", archive, "none.raw"]).within(dir.path()).go().exits(1);
        run.says("take one with --member: 'one.bin', 'two.bin'");
        let wrong = imgtool(["info", "--member", "tow.bin", archive]).within(dir.path()).go();
        wrong
            .ends_with(2)
            .says("no member of the archive is called 'tow.bin'")
            .says("did you mean 'two.bin'");
    }
    for command in ["info", "check", "map", "checksum"] {
        let run = imgtool([command, "--member", "a", "one.bin"]).within(dir.path()).go();
        run.says("a disk image is no archive").says("leave out --member");
    }
    let run = imgtool(["convert", "--member", "a", "one.bin", "none.raw"]).within(dir.path()).go().exits(2);
    run.says("leave out --member");
}

/// Writes `vm.ova` with two streamOptimized disks, and their raw files.
fn package(directory: &Path, hrefs: [&str; 2], files: [&str; 2]) -> Vec<u8> {
    let made = [("one", 1), ("two", 2)].map(|(name, seed)| {
        let raw = directory.join(format!("{name}.raw"));
        disk(name, seed).write_raw(&raw);
        let image = directory.join(format!("{name}.made"));
        imgtool(["convert", "-q", "--to", "vmdk", text(&raw), text(&image), "--force"]).ok();
        std::fs::read(image).unwrap()
    });
    let described = descriptor("web", &[(hrefs[0], 4 << 20), (hrefs[1], 4 << 20)]);
    let sums = manifest(&[("web.ovf", described.as_bytes()), (files[0], &made[0]), (files[1], &made[1])]);
    let archive = Tar::new().file("web.ovf", described.as_bytes()).file("web.mf", sums.as_bytes());
    archive.file(files[0], &made[0]).file(files[1], &made[1]).build()
}

/// The commonest damage: the copy of a package ended early.
#[test]
fn salvage_keeps_what_a_cut_package_has() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let whole = package(dir.path(), ["one.vmdk", "two.vmdk"], ["one.vmdk", "two.vmdk"]);
    let start_of = |header: &[u8]| {
        let mut blocks = (0..whole.len()).step_by(512);
        blocks.find(|at| whole[*at..].starts_with(header)).unwrap() + 512
    };
    let (first, second) = (start_of(b"one.vmdk\0"), start_of(b"two.vmdk\0"));
    for (cut, whole_disks) in [(second + 150_000, 1), (second - 700, 1), (first + 60_000, 0)] {
        std::fs::write(path("cut.ova"), &whole[..cut]).unwrap();
        let run = imgtool(["convert", "cut.ova", "--to", "raw", "out/"]).within(dir.path()).go().exits(1);
        run.says("cut short");
        for source in ["cut.ova", "-"] {
            let run = imgtool(["convert", "--salvage", source, "--to", "raw", "out/"]).within(dir.path());
            let run = if source == "-" { run.pipe_from(&path("cut.ova")) } else { run };
            run.go().ends_with(3).says("two");
            for (number, name) in ["one", "two"].iter().enumerate() {
                let (found, raw) = (path(&format!("out/{name}.raw")), path(&format!("{name}.raw")));
                if number < whole_disks {
                    assert_same(&found, &raw, name);
                } else {
                    assert_eq!(std::fs::metadata(&found).unwrap().len(), 4 << 20, "{name} {cut}");
                }
            }
            std::fs::remove_dir_all(path("out")).unwrap();
        }
    }
    // The part before the cut is the disk's.
    std::fs::write(path("cut.ova"), &whole[..second + 150_000]).unwrap();
    let line = ["convert", "--salvage", "--disk", "two", "cut.ova", "two.out.raw"];
    imgtool(line).within(dir.path()).go().ends_with(3);
    let (found, raw) = (std::fs::read(path("two.out.raw")).unwrap(), std::fs::read(path("two.raw")).unwrap());
    assert_eq!(found[..65_536], raw[..65_536]);
}

/// A reference is a URI; exporters differ about blanks.
#[test]
fn references_may_be_encoded() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let ova = package(dir.path(), ["my%20one.vmdk", "b%25.vmdk"], ["my one.vmdk", "b%25.vmdk"]);
    std::fs::write(path("vm.ova"), ova).unwrap();
    for source in ["vm.ova", "-"] {
        let run = imgtool(["convert", "-q", source, "--to", "raw", "out/"]).within(dir.path());
        let run = if source == "-" { run.pipe_from(&path("vm.ova")) } else { run };
        run.ok();
        let found = names(&path("out"));
        let disks: Vec<_> = found.iter().filter(|name| name.ends_with(".raw")).collect();
        assert_eq!(disks.len(), 2, "{found:?}");
        for (name, raw) in disks.iter().zip(["b", "one"]) {
            let raw = if raw == "b" { "two.raw" } else { "one.raw" };
            assert_same(&path("out").join(name), &path(raw), name);
        }
        std::fs::remove_dir_all(path("out")).unwrap();
    }
    let ova = package(dir.path(), ["..%2fone.vmdk", "two.vmdk"], ["one.vmdk", "two.vmdk"]);
    std::fs::write(path("vm.ova"), ova).unwrap();
    imgtool(["info", "vm.ova"]).within(dir.path()).go().exits(1).says("missing from the package");
}

/// The layout of Google Compute Engine: a sparse `disk.raw` in a `.tar.gz`.
#[test]
fn a_chosen_raw_disk_is_read_in_one_pass() {
    require!("tar", "gzip");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    disk("disk", 1).write_raw(&path("disk.raw"));
    std::fs::write(path("notes.txt"), "notes").unwrap();
    let tar = |name: &str| {
        let line = ["--format=oldgnu", "-cSzf", name, "notes.txt", "disk.raw", "notes.txt"];
        oracles::run_in("tar", dir.path(), &line);
    };
    tar("x.tar.gz");
    oracles::run_in("sh", dir.path(), &["-c", "gzip -dc x.tar.gz >x.tar"]);
    for source in ["x.tar.gz", "-"] {
        let line = ["convert", "--member", "disk.raw", "--progress", "json", source, "out.qcow2", "--force"];
        let run = imgtool(line).within(dir.path());
        let run = if source == "-" { run.pipe_from(&path("x.tar")) } else { run }.ok();
        assert!(!run.stderr.contains("\"phase\":\"spool\""), "{}", run.stderr);
        imgtool(["compare", "out.qcow2", "disk.raw"]).within(dir.path()).ok();
    }
    let wrong = imgtool(["convert", "--member", "disc.raw", "-", "none.raw"]).within(dir.path());
    wrong.pipe_from(&path("x.tar")).go().exits(2).says("did you mean 'disk.raw'");
    let whole = std::fs::read(path("x.tar")).unwrap();
    let cut = imgtool(["convert", "--member", "disk.raw", "-", "none.raw"]).within(dir.path());
    cut.pipe_bytes(&whole[..whole.len() / 2]).go().exits(1).says("cut short");
    // Damage behind the member counts as well.
    let mut damaged = whole;
    let header =
        (0..damaged.len()).step_by(512).rfind(|at| damaged[*at..].starts_with(b"notes.txt")).unwrap();
    damaged[header + 3] ^= 1;
    let run = imgtool(["convert", "--member", "disk.raw", "-", "none.raw"]).within(dir.path());
    run.pipe_bytes(damaged).go().exits(1).says("checksum of a tar header");
}
