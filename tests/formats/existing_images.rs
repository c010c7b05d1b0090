//! Disks written into images that exist (-n): everything else in the image stays.

use std::path::Path;

use imgtool_testing::images::{noise, prose};
use imgtool_testing::oracles::{qemu_info, run_in};
use imgtool_testing::{require, sha256_file, tempdir};

use crate::support::imgtool;

/// Makes an image of 6 MiB of `o` with qemu-img, and a raw disk of 3 MiB.
fn scene(directory: &Path, format: &str, options: &str) {
    std::fs::write(directory.join("old.raw"), vec![b'o'; 6 << 20]).unwrap();
    std::fs::write(directory.join("new.raw"), new_content()).unwrap();
    let mut line = vec!["convert", "-f", "raw", "-O", format];
    line.extend(["-o", options].into_iter().filter(|_| !options.is_empty()));
    run_in("qemu-img", directory, &[&line[..], &["old.raw", "image"]].concat());
}

fn new_content() -> Vec<u8> {
    let mut disk = noise(3, 3 << 20);
    disk[1 << 20..2 << 20].fill(0);
    disk
}

/// Returns the content of the image as qemu-img reads it.
fn content(directory: &Path, format: &str, more: &[&str]) -> Vec<u8> {
    let line = [&["convert", "-f", format, "-O", "raw"], more, &["image", "back.raw"]].concat();
    run_in("qemu-img", directory, &line);
    std::fs::read(directory.join("back.raw")).unwrap()
}

#[test]
fn an_image_keeps_its_size_options_snapshots_and_tail() {
    require!("qemu-img");
    for (format, options) in [
        ("qcow2", "cluster_size=8k,refcount_bits=32,lazy_refcounts=on"),
        ("qcow2", "compat=0.10"),
        ("vhdx", "block_size=2M"),
    ] {
        let dir = tempdir();
        scene(dir.path(), format, options);
        let image = dir.path().join("image");
        if format == "qcow2" {
            run_in("qemu-img", dir.path(), &["snapshot", "-c", "kept", "image"]);
        }
        let before = qemu_info(&image, format);
        let run = imgtool(["convert", "-n", "-O", format, "--verify", "new.raw", "image"]).within(dir.path());
        run.ok().says("its last 3145728 bytes keep their old content");
        let expected = [&new_content()[..], &vec![b'o'; 3 << 20]].concat();
        assert!(content(dir.path(), format, &[]) == expected, "{format} {options}");
        let after = qemu_info(&image, format);
        for key in ["virtual-size", "cluster-size", "format-specific", "snapshots"] {
            assert_eq!(before[key], after[key], "{format} {options}: {key}");
        }
        if format == "qcow2" {
            assert!(content(dir.path(), format, &["-l", "kept"]) == vec![b'o'; 6 << 20]);
        }
        run_in("qemu-img", dir.path(), &["check", "-f", format, "image"]);
    }
}

#[test]
fn an_overlay_stays_over_its_base() {
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path(), "qcow2", "");
    std::fs::rename(dir.path().join("image"), dir.path().join("base")).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "image", "6M"];
    run_in("qemu-img", dir.path(), &create);
    imgtool(["convert", "-n", "-O", "qcow2", "new.raw", "image"]).within(dir.path()).ok();
    assert_eq!(qemu_info(&dir.path().join("image"), "qcow2")["backing-filename"], "base");
    assert!(content(dir.path(), "qcow2", &[]) == [&new_content()[..], &vec![b'o'; 3 << 20]].concat());
}

#[test]
fn a_data_file_is_written_with_its_image() {
    require!("qemu-img");
    for raw in ["off", "on"] {
        let dir = tempdir();
        scene(dir.path(), "qcow2", &format!("data_file=data,data_file_raw={raw}"));
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        let before = (sha256_file(&image), sha256_file(&data));
        let line = ["convert", "-n", "-O", "qcow2", "new.raw", "image"];
        imgtool(line).within(dir.path()).go().exits(1).says("--allow-external");
        assert_eq!((sha256_file(&image), sha256_file(&data)), before);
        imgtool(line).args(["--allow-external", "chain"]).within(dir.path()).ok();
        let expected = [&new_content()[..], &vec![b'o'; 3 << 20]].concat();
        assert!(content(dir.path(), "qcow2", &[]) == expected, "{raw}");
        if raw == "on" {
            assert!(std::fs::read(&data).unwrap() == expected, "the data file by itself");
        }
        run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", "image"]);
    }
}

/// The user allows the data file by its name, also in another directory.
#[test]
fn a_data_file_that_is_allowed_by_name_is_written() {
    require!("qemu-img");
    for data in ["data", "other/data"] {
        let dir = tempdir();
        std::fs::create_dir(dir.path().join("other")).unwrap();
        scene(dir.path(), "qcow2", &format!("data_file={data}"));
        let line = ["convert", "-n", "-O", "qcow2", "--allow-external", data, "new.raw", "image"];
        imgtool(line).within(dir.path()).ok();
        let expected = [&new_content()[..], &vec![b'o'; 3 << 20]].concat();
        assert!(content(dir.path(), "qcow2", &[]) == expected, "{data}");
        // A file that is allowed for a source is no target.
        let line = ["convert", "-n", "-O", "raw", "--allow-external", data, "new.raw", data];
        imgtool(line).within(dir.path()).go().exits(1).says("same file");
    }
}

/// Two writers of its tables would destroy an image.
#[test]
fn an_image_in_use_is_refused_even_with_force() {
    use std::io::Read;
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    scene(dir.path(), "qcow2", "");
    let mut machine = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "image"])
        .current_dir(dir.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    machine.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let runs = [&[][..], &["--force"], &["-U"]].map(|more| {
        imgtool(["convert", "-n", "-O", "qcow2", "new.raw", "image"]).args(more).within(dir.path()).go()
    });
    drop(machine.stdin.take());
    machine.wait().unwrap();
    for run in runs {
        let run = run.exits(1).says("has locked it").says("stop the program that uses it");
        assert!(!run.stderr.contains("-U") && !run.stderr.contains("--force"), "{}", run.stderr);
    }
}

/// As in a new image, zeros fill the last sector of a disk.
#[test]
fn the_last_sector_of_a_disk_is_filled_with_zeros() {
    require!("qemu-img");
    for format in ["qcow2", "vhdx"] {
        for len in [(3 << 20) - 300, (6 << 20) - 511, 1] {
            let dir = tempdir();
            scene(dir.path(), format, "");
            let disk = noise(4, len);
            std::fs::write(dir.path().join("new.raw"), &disk).unwrap();
            let line = ["convert", "-n", "-O", format, "--verify", "new.raw", "image"];
            imgtool(line).within(dir.path()).ok();
            let mut expected = disk.clone();
            expected.resize(len.next_multiple_of(512), 0);
            expected.resize(6 << 20, b'o');
            assert!(content(dir.path(), format, &[]) == expected, "{format}, {len} bytes");
        }
    }
}

#[test]
fn what_can_not_be_written_into_is_refused_and_stays() {
    require!("qemu-img");
    let refused = |format: &str, options: &str, line: &[&str], code: i32, words: &str| {
        let dir = tempdir();
        scene(dir.path(), format, options);
        let before = sha256_file(&dir.path().join("image"));
        imgtool(["convert", "-n"]).args(line).within(dir.path()).go().exits(code).says(words);
        assert_eq!(sha256_file(&dir.path().join("image")), before, "{line:?}");
    };
    let qcow2 = ["-O", "qcow2", "new.raw", "image"];
    for format in ["vdi", "vpc", "vmdk"] {
        refused(format, "", &["-O", format, "new.raw", "image"], 1, "can't be written into");
    }
    refused("raw", "", &qcow2, 1, "not a qcow2 image");
    refused("vhdx", "", &qcow2, 1, "not a qcow2 image");
    refused("qcow2", "", &["-O", "vhdx", "new.raw", "image"], 1, "not a VHDX image");
    refused("qcow2", "", &[&["-o", "cluster_size=4k"], &qcow2[..]].concat(), 2, "can't be changed");
    refused("qcow2", "", &[&["-c=zstd"], &qcow2[..]].concat(), 2, "the image is compressed with zlib");
    refused("vhdx", "", &["-c", "-O", "vhdx", "new.raw", "image"], 2, "no compression of its own");
    // A smaller image is refused, and not enlarged.
    let dir = tempdir();
    scene(dir.path(), "qcow2", "");
    run_in("qemu-img", dir.path(), &["create", "-q", "-f", "qcow2", "small", "2M"]);
    let before = sha256_file(&dir.path().join("small"));
    imgtool(["convert", "-n", "-O", "qcow2", "new.raw", "small"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("the image is too small");
    assert_eq!(sha256_file(&dir.path().join("small")), before);
}

/// As in qemu-img, with clusters that exist as well.
#[test]
fn compressed_clusters_are_written_into_an_image() {
    require!("qemu-img");
    for options in ["", "cluster_size=4k", "compression_type=zstd", "refcount_bits=1", "extended_l2=on"] {
        let dir = tempdir();
        let own: Vec<&str> = ["-o", options].into_iter().filter(|_| !options.is_empty()).collect();
        std::fs::write(dir.path().join("new.raw"), prose(1, 3 << 20)).unwrap();
        for image in ["theirs", "ours"] {
            run_in(
                "qemu-img",
                dir.path(),
                &[&["create", "-q", "-f", "qcow2"], &own[..], &[image, "6M"]].concat(),
            );
        }
        let line = ["convert", "-n", "-c", "-O", "qcow2", "new.raw"];
        run_in("qemu-img", dir.path(), &[&line[..], &["theirs"]].concat());
        imgtool(line).args(["--verify", "ours"]).within(dir.path()).ok();
        let len = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(len("ours") < 2 << 20 || options.ends_with("bits=1"), "{options}: {} bytes", len("ours"));
        run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", "ours"]);
        run_in("qemu-img", dir.path(), &["compare", "theirs", "ours"]);
        // qemu-img can't replace what is there already.
        std::fs::write(dir.path().join("new.raw"), prose(2, 3 << 20)).unwrap();
        imgtool(line).args(["--verify", "ours"]).within(dir.path()).ok();
        run_in("qemu-img", dir.path(), &["check", "-f", "qcow2", "ours"]);
        imgtool(["compare", "new.raw", "ours"]).within(dir.path()).ok();
    }
    let dir = tempdir();
    scene(dir.path(), "qcow2", "data_file=data");
    let line = ["convert", "-n", "-c", "-O", "qcow2", "--allow-external", "chain", "new.raw", "image"];
    imgtool(line).within(dir.path()).go().exits(2).says("a data file holds no compressed clusters");
}

#[test]
fn owner_mode_and_links_of_the_file_stay() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    require!("qemu-img");
    let dir = tempdir();
    scene(dir.path(), "qcow2", "");
    let image = dir.path().join("image");
    std::fs::hard_link(&image, dir.path().join("other-name")).unwrap();
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o640)).unwrap();
    let before = std::fs::metadata(&image).unwrap();
    imgtool(["convert", "-n", "-O", "qcow2", "new.raw", "image"]).within(dir.path()).ok();
    let after = std::fs::metadata(&image).unwrap();
    assert_eq!((before.ino(), before.mode(), after.nlink()), (after.ino(), after.mode(), 2));
}

/// Without a stated format, the content of the target decides: no image is overwritten as a raw disk.
#[test]
fn an_image_without_a_stated_format_is_never_overwritten_as_raw() {
    require!("qemu-img");
    let lines = |name: &str| {
        let target = format!("disk={name}");
        [
            vec!["convert".to_owned(), "-n".into(), "new.raw".into(), name.into()],
            vec!["convert".into(), "disk=new.raw".into(), "--target".into(), target],
        ]
    };
    for (format, options) in [("qcow2", "preallocation=full"), ("vhdx", "subformat=fixed")] {
        for (name, line) in
            ["image", "vm.img"].into_iter().flat_map(|name| lines(name).map(|line| (name, line)))
        {
            let dir = tempdir();
            scene(dir.path(), format, options);
            std::fs::rename(dir.path().join("image"), dir.path().join(name)).unwrap();
            imgtool(&line).within(dir.path()).ok();
            std::fs::rename(dir.path().join(name), dir.path().join("image")).unwrap();
            let expected = [&new_content()[..], &vec![b'o'; 3 << 20]].concat();
            assert!(content(dir.path(), format, &[]) == expected, "{format}: {line:?}");
        }
    }
    // What can't be written into, or contradicts the name, stays.
    for (format, options, name, words) in [
        ("vdi", "static=on", "image", "a vdi image that exists can't be written into"),
        ("vpc", "subformat=fixed,force_size=on", "image", "can't be written into"),
        ("vmdk", "", "vm.img", "a vmdk image that exists can't be written into"),
        ("qcow2", "preallocation=full", "x.raw", "-O qcow2 writes into the image"),
    ] {
        for line in lines(name) {
            let dir = tempdir();
            scene(dir.path(), format, options);
            std::fs::rename(dir.path().join("image"), dir.path().join(name)).unwrap();
            imgtool(&line).within(dir.path()).go().exits(1).says(words).says("-O raw");
            let run = imgtool(&line).args(["-O", "raw", "--force"]).within(dir.path());
            run.go().ends_with(0);
            assert!(std::fs::read(dir.path().join(name)).unwrap().starts_with(&new_content()), "{line:?}");
        }
    }
    // A raw target is as before, also one that begins like no format.
    let dir = tempdir();
    std::fs::write(dir.path().join("new.raw"), new_content()).unwrap();
    for line in lines("plain") {
        std::fs::write(dir.path().join("plain"), noise(8, 4 << 20)).unwrap();
        imgtool(&line).within(dir.path()).ok();
        assert!(std::fs::read(dir.path().join("plain")).unwrap().starts_with(&new_content()), "{line:?}");
    }
}
