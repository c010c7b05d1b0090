//! Names of outputs: valid targets, and files that are never overwritten.

use imgtool_testing::{assert_same, fixture, names, snapshot, tempdir};

use super::with_disk;
use crate::support::imgtool;

#[test]
fn refuses_two_sources_for_one_qcow2_image() {
    let dir = with_disk();
    std::fs::copy(dir.path().join("disk.raw"), dir.path().join("other.raw")).unwrap();
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "disk.raw", "other.raw", "--to", "qcow2", "out.qcow2"]);
    run.within(dir.path()).go().exits(2).says("2 sources do not go into one qcow2 image");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn refuses_to_overwrite_without_force() {
    let dir = with_disk();
    std::fs::write(dir.path().join("out"), b"precious").unwrap();
    let before = snapshot(dir.path());
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let line = ["convert", "disk.raw", "--to", format, "out"];
        imgtool(line).within(dir.path()).go().exits(1).says("out");
        assert_eq!(snapshot(dir.path()), before, "{format}");
    }
    imgtool(["convert", "--force", "disk.raw", "--to", "raw", "out"]).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("out"), "--force");
}

#[test]
fn refuses_to_overwrite_the_source_even_with_force() {
    let dir = with_disk();
    std::fs::hard_link(dir.path().join("disk.raw"), dir.path().join("link.raw")).unwrap();
    std::os::unix::fs::symlink("disk.raw", dir.path().join("symlink.raw")).unwrap();
    let before = snapshot(dir.path());
    for target in ["disk.raw", "./disk.raw", "link.raw", "symlink.raw"] {
        let line = ["convert", "--force", "disk.raw", "--to", "qcow2", target];
        imgtool(line).within(dir.path()).go().exits(1);
        assert_eq!(snapshot(dir.path()), before, "{target}");
    }
}

#[test]
fn names_a_disk_in_a_directory_after_its_source() {
    let dir = with_disk();
    std::fs::create_dir(dir.path().join("there")).unwrap();
    imgtool(["convert", "disk.raw", "--to", "qcow2", "there"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("there")), ["disk.qcow2"]);
    imgtool(["convert", "disk.raw", "--to", "vhdx", "new/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("new")), ["disk.vhdx"]);
}

#[test]
fn infers_the_format_from_the_target_extension() {
    let dir = with_disk();
    for (name, format) in [("a.qcow2", "qcow2"), ("a.vhdx", "vhdx"), ("a.vma", "vma"), ("a.raw", "raw")] {
        imgtool(["convert", "disk.raw", name]).within(dir.path()).ok();
        let info = imgtool(["info", "--output", "json", name]).within(dir.path()).ok().json();
        assert_eq!(info["format"], format);
    }
}

/// The first command that anyone tries: an archive with one disk and its configuration.
#[test]
fn an_archive_goes_into_a_directory() {
    let dir = tempdir();
    let packed = |name: &str| {
        let line = ["convert", "disk.raw", "--proxmox", "memory=512", name];
        imgtool(line).within(dir.path()).ok();
    };
    imgtool_testing::images::every_mask().write_raw(&dir.path().join("disk.raw"));
    packed("vzdump-qemu-100-2026_01_02-03_04_05.vma.zst");
    packed("single.vma");
    for (archive, dest) in [
        ("single.vma", "outdir"),
        ("vzdump-qemu-100-2026_01_02-03_04_05.vma.zst", "new/out.d"),
        ("single.vma", "version.1"),
    ] {
        imgtool(["convert", archive, "--to", "qcow2", dest]).within(dir.path()).ok();
        assert_eq!(
            names(&dir.path().join(dest)),
            ["drive-scsi0.qcow2", "qemu-server.conf", "vm.xml"],
            "{dest}"
        );
    }
    imgtool(["convert", "single.vma", "--to", "vma", "copies"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("copies")), ["single.vma"]);
}

#[test]
fn a_file_for_an_archive_is_named_as_one() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let archive = imgtool_testing::text(&archive);
    let efi = ["convert", archive, "--disk", "drive-efidisk0"];
    for (format, dest, is_file) in [
        ("qcow2", "disk.qcow2", true),
        ("raw", "disk.img", true),
        ("raw", "disk.raw.gz", true),
        ("qcow2", "other.name", true),
        ("qcow2", "out", false),
    ] {
        imgtool(efi).args(["--to", format, dest]).within(dir.path()).ok();
        assert_eq!(dir.path().join(dest).is_file(), is_file, "{dest}");
    }
    assert_eq!(
        names(&dir.path().join("out")),
        ["drive-efidisk0.qcow2", "qemu-server.conf", "qemu-server.fw"]
    );
    let run = imgtool(efi).args(["--to", "raw", "-"]).within(dir.path()).ok();
    assert_eq!(run.stdout.len(), 540_672);
    // Both disks would share one file.
    let run = imgtool(["convert", archive, "--to", "qcow2", "both.qcow2"]).within(dir.path()).go();
    run.exits(2).says("2 devices do not go into one file");
    std::fs::write(dir.path().join("old"), b"precious").unwrap();
    for force in [&[][..], &["--force"]] {
        let run = imgtool(efi).args(["--to", "raw", "old"]).args(force).within(dir.path()).go();
        run.exits(1).says("is a file").says("disk.raw");
    }
    // In place, the user names the file or device itself.
    std::fs::write(dir.path().join("old"), vec![1; 540_672]).unwrap();
    imgtool(efi).args(["-n", "--to", "raw", "old"]).within(dir.path()).ok();
    assert_same(&dir.path().join("old"), &dir.path().join("disk.img"), "in place");
}

/// One archive for several machines would keep the description of one.
#[test]
fn each_of_several_machines_gets_an_archive() {
    let dir = with_disk();
    for (name, memory) in [("a.vma", "memory=100"), ("b.vma", "memory=200")] {
        imgtool(["convert", "disk.raw", "--proxmox", memory, name]).within(dir.path()).ok();
    }
    for format in ["vma", "ova"] {
        let file = format!("one.{format}");
        let line = ["convert", "a.vma", "b.vma", "--to", format, &file];
        imgtool(line).within(dir.path()).go().exits(2).says("2 machines").says("ends in '/'");
        let out = format!("out-{format}");
        imgtool(["convert", "a.vma", "b.vma", "--to", format, &out]).within(dir.path()).ok();
        let archives = ["a", "b"].map(|name| format!("{name}.{format}"));
        assert_eq!(names(&dir.path().join(&out)), archives);
        for (archive, memory) in archives.iter().zip(["100", "200"]) {
            let again = format!("{memory}-{format}");
            let path = format!("{out}/{archive}");
            imgtool(["convert", &path, "--to", "vma", &again]).within(dir.path()).ok();
            let again = format!("{again}/{}", archive.replace("ova", "vma"));
            let config = imgtool(["vma", "config", &again]).within(dir.path()).ok().text();
            assert!(config.contains(&format!("memory: {memory}\n")), "{config}");
            assert!(config.contains("#qmdump#map:scsi0:drive-scsi0:"), "{config}");
        }
    }
    let alone = ["convert", "a.vma", "b.vma", "disk.raw", "--to", "vma", "three"];
    imgtool(alone).within(dir.path()).go().exits(2).says("belongs to none of the 2 machines");
}

/// Both machines have a qemu-server.conf, and may have disks of one name.
#[test]
fn each_of_several_machines_gets_a_directory() {
    let dir = with_disk();
    let pack = |name: &str, memory: &str| {
        let memory = format!("memory={memory}");
        imgtool(["convert", "disk.raw", "--proxmox", &memory, name]).within(dir.path()).ok();
    };
    std::fs::create_dir(dir.path().join("other")).unwrap();
    for (name, memory) in [("a.vma", "100"), ("b.vma", "200"), ("other/a.vma", "300")] {
        pack(name, memory);
    }
    let line = ["convert", "a.vma", "b.vma", "other/a.vma", "loose=disk.raw", "--to", "qcow2", "all"];
    imgtool(line).within(dir.path()).ok();
    let all = dir.path().join("all");
    assert_eq!(names(&all), ["a", "a-2", "b", "loose.qcow2"]);
    for (machine, memory) in [("a", "100"), ("b", "200"), ("a-2", "300")] {
        let machine = all.join(machine);
        assert_eq!(names(&machine), ["drive-scsi0.qcow2", "qemu-server.conf", "vm.xml"]);
        let config = std::fs::read_to_string(machine.join("qemu-server.conf")).unwrap();
        assert!(config.contains(&format!("memory: {memory}")), "{config}");
    }
    // A failure removes all of them.
    let before = snapshot(dir.path());
    std::fs::write(dir.path().join("c.vma"), &std::fs::read(dir.path().join("b.vma")).unwrap()[..70_000])
        .unwrap();
    let run = imgtool(["convert", "a.vma", "c.vma", "--to", "qcow2", "failed"]).within(dir.path()).go();
    run.exits(1);
    std::fs::remove_file(dir.path().join("c.vma")).unwrap();
    assert_eq!(snapshot(dir.path()), before);
}

/// The file that exists may be the disk of another machine, which nobody wants to overwrite.
#[test]
fn another_machine_is_led_to_a_directory_of_its_own() {
    let dir = with_disk();
    imgtool(["convert", "-q", "scsi0=disk.raw", "a.vma"]).within(dir.path()).ok();
    std::fs::copy(dir.path().join("a.vma"), dir.path().join("b.vma")).unwrap();
    imgtool(["convert", "-q", "a.vma", "--to", "qcow2", "D"]).within(dir.path()).ok();
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "b.vma", "--to", "qcow2", "D"]).within(dir.path()).go().exits(1);
    run.says("already exists").says("another directory, such as D/b; --force overwrites");
    assert_eq!(snapshot(dir.path()), before);
    imgtool(["convert", "b.vma", "--to", "qcow2", "D/b"]).within(dir.path()).ok();
    // What is suggested must not exist either.
    let run = imgtool(["convert", "b.vma", "--to", "qcow2", "D"]).within(dir.path()).go().exits(1);
    assert!(!run.stderr.contains("D/b"), "{}", run.stderr);
    // A file that the user named is not that of a machine.
    let run = imgtool(["convert", "b.vma", "--disk", "scsi0", "disk.raw"]).within(dir.path()).go().exits(1);
    assert!(!run.stderr.contains("another directory"), "{}", run.stderr);
}

#[test]
fn notes_a_name_that_says_another_format() {
    let dir = with_disk();
    let noted = |line: &[&str]| {
        let run = imgtool(line).within(dir.path()).ok();
        run.stderr.contains("although its name says")
    };
    for (format, name) in
        [("qcow2", "a.raw"), ("raw", "a.qcow2"), ("vma", "a.vhdx"), ("vhd", "b.qcow2.old.vmdk")]
    {
        let run = imgtool(["convert", "disk.raw", "--to", format, name]).within(dir.path()).ok();
        run.says(&format!("{name} is {format}, although its name says "));
    }
    assert!(noted(&["convert", "disk.raw", "--target", "disk=c.raw,format=qcow2"]));
    for (format, name) in [
        ("qcow2", "d.img"),
        ("raw", "d.img2"),
        ("raw", "d"),
        ("vpc", "d.vhd"),
        ("vma", "d.vma.zst"),
        ("qcow2", "dir/"),
    ] {
        assert!(!noted(&["convert", "disk.raw", "--to", format, name]), "{format} {name}");
    }
    let json = imgtool(["convert", "disk.raw", "--to", "qcow2", "e.raw", "--output", "json"]);
    let notes = json.within(dir.path()).ok().json()["notes"].to_string();
    assert!(notes.contains("e.raw is qcow2"), "{notes}");
}

#[test]
fn a_format_that_a_stream_can_have_is_named_for_compression() {
    let dir = with_disk();
    let before = snapshot(dir.path());
    for name in ["disk.vhd.gz", "disk.vhd.zst"] {
        let run = imgtool(["convert", "disk.raw", name]).within(dir.path()).go().exits(2);
        run.says("vhd can't be compressed as a whole").says("-o subformat=fixed");
        let run = imgtool(["convert", "disk.raw", "disk.qcow2.gz"]).within(dir.path()).go().exits(2);
        run.says("can't be compressed as a whole").says("leave out");
        assert_eq!(snapshot(dir.path()), before, "{name}");
    }
    imgtool(["convert", "-o", "subformat=fixed", "disk.raw", "disk.vhd.gz"]).within(dir.path()).ok();
    imgtool(["compare", "disk.raw", "disk.vhd.gz"]).within(dir.path()).ok();
}

#[test]
fn more_threads_than_the_limit_are_noted() {
    let dir = with_disk();
    let run = |args: &[&str]| imgtool(args).within(dir.path()).ok().stderr;
    assert!(run(&["convert", "-m", "99", "disk.raw", "a.qcow2"]).contains("64 at most start"));
    assert!(run(&["compare", "--threads", "65", "disk.raw", "a.qcow2"]).contains("64 at most start"));
    assert!(!run(&["convert", "--threads", "64", "disk.raw", "b.qcow2"]).contains("at most"));
}
