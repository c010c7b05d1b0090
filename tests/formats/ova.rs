//! OVA packages, OVF folders and archives of disks, through the program.

use std::path::Path;

use imgtool_testing::images::{Image, noise, prose};
use imgtool_testing::tar::{Tar, descriptor, manifest};
use imgtool_testing::vma::Archive;
use imgtool_testing::{assert_same, fixture, names, oracles, require, snapshot, tempdir, text};

use crate::support::imgtool;

fn disk(name: &'static str, seed: u64) -> Image {
    Image::hole(name, 4 << 20).with(0, noise(seed, 100_000)).with(2 << 20, prose(seed, 300_000))
}

/// Writes a package of two disks of qemu-img, and their raw files; returns the bytes of the disks' files.
fn package(directory: &Path) -> [Vec<u8>; 2] {
    let files = [("one", 1), ("two", 2)].map(|(name, seed)| {
        let raw = directory.join(format!("{name}.raw"));
        disk(name, seed).write_raw(&raw);
        let image = directory.join(format!("{name}.vmdk"));
        oracles::qemu_make(&raw, "vmdk", "subformat=streamOptimized", &image);
        std::fs::read(image).unwrap()
    });
    let described = descriptor("web", &[("one.vmdk", 4 << 20), ("two.vmdk", 4 << 20)]);
    let sums =
        manifest(&[("web.ovf", described.as_bytes()), ("one.vmdk", &files[0]), ("two.vmdk", &files[1])]);
    std::fs::write(directory.join("web.ovf"), &described).unwrap();
    std::fs::write(directory.join("web.mf"), &sums).unwrap();
    let archive = Tar::new()
        .file("web.ovf", described.as_bytes())
        .file("web.mf", sums.as_bytes())
        .file("one.vmdk", &files[0])
        .file("two.vmdk", &files[1]);
    std::fs::write(directory.join("vm.ova"), archive.build()).unwrap();
    files
}

#[test]
fn converts_a_package_in_a_file_a_pipe_and_a_directory() {
    require!("qemu-img", "gzip");
    let dir = tempdir();
    package(dir.path());
    let path = |name: &str| dir.path().join(name);
    let info = imgtool(["info", text(&path("vm.ova"))]).ok();
    assert!(info.text().contains("file format: ova"), "{}", info.text());
    imgtool(["check", text(&path("vm.ova"))]).ok();
    imgtool(["check", "-"]).pipe_from(&path("vm.ova")).ok();
    imgtool(["info", "-"]).pipe_from(&path("vm.ova")).ok();
    imgtool(["checksum", text(&path("vm.ova"))]).ok();
    imgtool(["map", "--disk", "two", text(&path("vm.ova"))]).ok();
    let packed = oracles::filter("gzip", &["-c"], &std::fs::read(path("vm.ova")).unwrap());
    std::fs::write(path("vm.ova.gz"), packed).unwrap();
    for source in ["vm.ova", "vm.ova.gz", "web.ovf", "-"] {
        let run = imgtool(["convert", source, "--to", "qcow2", "out/"]).within(dir.path());
        match source {
            "-" => run.pipe_from(&path("vm.ova")).ok(),
            _ => run.ok(),
        };
        let found = names(&path("out"));
        for name in ["one", "two"] {
            let output = path("out").join(format!("{name}.qcow2"));
            oracles::qemu_compare(&path(&format!("{name}.raw")), "raw", &output, "qcow2");
        }
        assert!(found.iter().any(|name| name == "web.ovf"), "{source}: {found:?}");
        std::fs::remove_dir_all(path("out")).unwrap();
    }
    imgtool(["convert", "--disk", "two", text(&path("vm.ova")), text(&path("x.raw"))]).ok();
    assert_same(&path("x.raw"), &path("two.raw"), "one of two disks");
}

#[test]
fn a_wrong_digest_leaves_nothing() {
    require!("qemu-img");
    let dir = tempdir();
    let files = package(dir.path());
    let path = dir.path().join("vm.ova");
    let mut bytes = std::fs::read(&path).unwrap();
    // In the descriptor of the first disk, which no checksum of its own covers.
    let disk = bytes.windows(4).position(|part| part == b"KDMV").unwrap();
    let comment = files[0].windows(4).position(|part| part == b"# Ex").unwrap();
    bytes[disk + comment + 2] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let before = snapshot(dir.path());
    let says = "'one.vmdk' does not have the SHA256 digest";
    imgtool(["convert", "vm.ova", "--to", "qcow2", "out/"]).within(dir.path()).go().exits(1).says(says);
    imgtool(["check", "vm.ova"]).within(dir.path()).go().exits(2);
    assert_eq!(snapshot(dir.path()), before);
    imgtool(["convert", "--disk", "two", "vm.ova", "two.out.raw"]).within(dir.path()).ok();
    imgtool(["convert", "--salvage", "vm.ova", "--to", "qcow2", "out/"]).within(dir.path()).go().exits(3);
}

#[test]
fn writes_a_package_of_every_kind_of_source() {
    require!("qemu-img", "tar", "sha256sum");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    disk("one", 1).write_raw(&path("one.raw"));
    disk("two", 2).write_raw(&path("two.raw"));
    oracles::qemu_make(&path("two.raw"), "qcow2", "", &path("two.qcow2"));
    let archive = Archive::of([("drive-scsi0", disk("one", 1)), ("drive-scsi1", disk("two", 2))]).build();
    std::fs::write(path("vm.vma"), archive.bytes).unwrap();
    let sources: [&[&str]; 4] = [&["one.raw", "two.qcow2"], &["vm.vma"], &["-"], &["vm.ova"]];
    for sources in sources {
        let line = [&["convert", "--verify"][..], sources, &["--to", "ova", "new.ova"]].concat();
        let run = imgtool(line).within(dir.path());
        match sources {
            ["-"] => run.pipe_from(&path("vm.vma")).ok(),
            _ => run.ok(),
        };
        imgtool(["check", "new.ova"]).within(dir.path()).ok();
        std::fs::create_dir(path("x")).unwrap();
        oracles::run_in("tar", &path("x"), &["-xf", "../new.ova"]);
        assert_eq!(
            names(&path("x")),
            ["new-disk1.vmdk", "new-disk2.vmdk", "new.mf", "new.ovf"],
            "{sources:?}"
        );
        for (number, raw) in ["one.raw", "two.raw"].iter().enumerate() {
            let image = path("x").join(format!("new-disk{}.vmdk", number + 1));
            oracles::qemu_compare(&path(raw), "raw", &image, "vmdk");
        }
        std::fs::remove_dir_all(path("x")).unwrap();
        let _ = std::fs::remove_file(path("vm.ova"));
        std::fs::rename(path("new.ova"), path("vm.ova")).unwrap();
    }
    let run = imgtool(["convert", "one.raw", "--to", "ova", "-"]).within(dir.path()).go();
    run.exits(2).says("ova can't be written to a pipe");
    imgtool(["create", "-f", "ova", "empty.ova", "1G"]).within(dir.path()).go().exits(1);
    imgtool(["measure", "--to", "ova", "vm.vma"]).within(dir.path()).ok();
}

/// An importer would take the firmware variables for a disk of the guest.
#[test]
fn firmware_variables_are_no_disk_of_a_package() {
    require!("tar");
    let dir = tempdir();
    let source = fixture("two-disks.vma.zst");
    let convert = |name: &str, more: &[&str]| {
        let line = [&["convert", text(&source), "--to", "ova", name][..], more].concat();
        imgtool(line).within(dir.path()).ok()
    };
    convert("vm.ova", &[]).says("drive-efidisk0 was left out: firmware variables");
    let listed = oracles::run_in("tar", dir.path(), &["-tf", "vm.ova"]);
    assert_eq!(listed, "vm.ovf\nvm.mf\nvm-disk1.vmdk\n");
    convert("both.ova", &["--disk", "drive-scsi0", "--disk", "drive-efidisk0"]);
    let listed = oracles::run_in("tar", dir.path(), &["-tf", "both.ova"]);
    assert!(listed.ends_with("both-disk2.vmdk\n"));
}

/// The images of Google Compute Engine, and any other disk in an archive.
#[test]
fn converts_disks_in_archives() {
    require!("qemu-img", "tar", "gzip");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    disk("disk", 3).write_raw(&path("disk.raw"));
    oracles::qemu_make(&path("disk.raw"), "qcow2", "", &path("disk.qcow2"));
    oracles::run_in("tar", dir.path(), &["--format=oldgnu", "-S", "-czf", "image.tar.gz", "disk.raw"]);
    oracles::run_in("tar", dir.path(), &["-cf", "box.tar", "disk.qcow2"]);
    for archive in ["image.tar.gz", "box.tar"] {
        imgtool(["convert", archive, "new.qcow2"]).within(dir.path()).ok();
        oracles::qemu_compare(&path("disk.raw"), "raw", &path("new.qcow2"), "qcow2");
        std::fs::remove_file(path("new.qcow2")).unwrap();
        imgtool(["compare", archive, "disk.raw"]).within(dir.path()).ok();
    }
    for new in ["new.tar", "new.tar.gz", "new.tar.zst"] {
        imgtool(["convert", "--verify", "disk.raw", new]).within(dir.path()).ok();
        imgtool(["compare", new, "disk.raw"]).within(dir.path()).ok();
    }
    oracles::run_in("tar", dir.path(), &["-xzOf", "new.tar.gz", "--to-command=cmp - disk.raw"]);
    imgtool(["create", "-f", "tar", "empty.tar", "1G"]).within(dir.path()).go().exits(1).says("of no use");
    imgtool(["convert", "disk.raw", "new.tgz"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("name that ends in .tar.gz");
}

/// A stream of a VMDK disk has its grains in the order of the disk, an archive has its clusters in any.
#[test]
fn disks_of_a_shuffled_archive_become_streams() {
    require!("qemu-img", "tar");
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    disk("one", 1).write_raw(&path("one.raw"));
    disk("two", 2).write_raw(&path("two.raw"));
    let archive = Archive::of([("one", disk("one", 1)), ("two", disk("two", 2))]).shuffled(5).build();
    std::fs::write(path("vm.vma"), archive.bytes).unwrap();
    imgtool(["convert", "vm.vma", "--to", "vmdk", "out/"]).within(dir.path()).ok();
    imgtool(["convert", "vm.vma", "file.ova"]).within(dir.path()).ok();
    imgtool(["convert", "-", "pipe.ova"]).within(dir.path()).pipe_from(&path("vm.vma")).ok();
    let from_pipe = std::fs::read(path("pipe.ova")).unwrap();
    let digest = |name: &str| {
        let text = imgtool(["checksum", name]).within(dir.path()).ok().text();
        text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(digest("file.ova"), digest("pipe.ova"));
    assert_eq!(from_pipe.len(), std::fs::read(path("file.ova")).unwrap().len());
    std::fs::create_dir(path("x")).unwrap();
    oracles::run_in("tar", &path("x"), &["-xf", "../file.ova"]);
    for (number, name) in ["one", "two"].iter().enumerate() {
        let raw = path(&format!("{name}.raw"));
        oracles::qemu_compare(&raw, "raw", &path("out").join(format!("{name}.vmdk")), "vmdk");
        let disk = path("x").join(format!("file-disk{}.vmdk", number + 1));
        oracles::qemu_compare(&raw, "raw", &disk, "vmdk");
    }
}

/// An importer goes by the extension, and would read the archive as XML.
#[test]
fn an_archive_is_not_called_a_descriptor() {
    let dir = tempdir();
    disk("one", 1).write_raw(&dir.path().join("one.raw"));
    let before = snapshot(dir.path());
    for line in [&["convert", "one.raw", "w.ovf"][..], &["convert", "one.raw", "--to", "ova", "w.OVF"]] {
        let run = imgtool(line).within(dir.path()).go();
        run.exits(1).says("not as a descriptor with files beside it").says("a name that ends in .ova");
    }
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn sizes_in_a_package_are_rounded_up_on_demand() {
    let dir = tempdir();
    std::fs::write(dir.path().join("one.raw"), noise(1, 100_352)).unwrap();
    imgtool(["convert", "one.raw", "plain.ova"]).within(dir.path()).ok().says("align=64k rounds it up");
    let line = ["convert", "--verify", "one.raw", "-o", "align=64k", "new.ova"];
    imgtool(line).within(dir.path()).ok().says("virtual size rounded up from 100352 to 131072 bytes");
    imgtool(["check", "new.ova"]).within(dir.path()).ok();
    let info = imgtool(["info", "new.ova"]).within(dir.path()).ok();
    assert!(!info.text().contains("which count"), "the descriptor agrees: {}", info.text());
}

/// An interrupted copy with holes, a sound directory, and one with a changed disk, whose blocks may be shared.
#[test]
fn a_directory_is_checked_like_an_archive() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let content = noise(1, 1 << 20);
    let described = descriptor("vm", &[("a.raw", 1 << 20)]);
    let sums = manifest(&[("vm.ovf", described.as_bytes()), ("a.raw", &content)]);
    std::fs::write(path("vm.ovf"), &described).unwrap();
    std::fs::write(path("vm.mf"), &sums).unwrap();
    std::fs::write(path("a.raw"), &content).unwrap();
    imgtool(["check", "vm.ovf"]).within(dir.path()).ok();
    imgtool(["convert", "vm.ovf", "out.raw"]).within(dir.path()).ok();
    std::fs::remove_file(path("out.raw")).unwrap();
    std::fs::File::create(path("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let says = "'a.raw' does not have the SHA256 digest";
    imgtool(["convert", "vm.ovf", "out.raw"]).within(dir.path()).go().exits(1).says(says);
    imgtool(["checksum", "vm.ovf"]).within(dir.path()).go().exits(1).says(says);
    assert!(!path("out.raw").exists());
}
