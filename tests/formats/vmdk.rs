//! VMDK through the program: disks of several files, streams in pipes, snapshots, and sizes beyond 2 TiB.

use std::os::unix::fs::FileExt;
use std::path::Path;

use imgtool_testing::images;
use imgtool_testing::{assert_same, names, oracles, require, sha256_file, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Variants that consist of several files.
const SEVERAL: [&str; 4] = ["monolithicFlat", "vmfs", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

fn write_raw(directory: &Path) -> std::path::PathBuf {
    let raw = directory.join("disk.raw");
    images::every_mask().write_raw(&raw);
    raw
}

#[test]
fn disks_of_several_files_need_no_flag() {
    require!("qemu-img");
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let size = std::fs::metadata(&raw).unwrap().len();
    assert_eq!(size % 512, 0);
    for subformat in SEVERAL {
        let (theirs, ours) = (dir.path().join("theirs.vmdk"), dir.path().join(format!("{subformat}.vmdk")));
        let option = format!("subformat={subformat}");
        if subformat != "vmfs" {
            oracles::qemu_make(&raw, "vmdk", &option, &theirs);
            imgtool(["convert", text(&theirs), "--force", "--to", "raw", "back.raw"]).within(dir.path()).ok();
            assert_same(&raw, &dir.path().join("back.raw"), subformat);
        }
        imgtool(["convert", "--verify", text(&raw), "-o", &option, text(&ours)]).ok();
        oracles::qemu_compare(&raw, "raw", &ours, "vmdk");
        imgtool(["compare", text(&raw), text(&ours)]).ok();
        imgtool(["check", text(&ours)]).ok();
    }
}

#[test]
fn several_files_appear_together_and_replace_nothing() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    for subformat in SEVERAL {
        let out = dir.path().join(subformat);
        std::fs::create_dir(&out).unwrap();
        let option = format!("subformat={subformat}");
        let target = out.join("a.vmdk");
        imgtool(["convert", text(&raw), "-o", &option, text(&target)]).ok();
        let files = names(&out);
        assert_eq!(files.len(), 2, "{files:?}");
        // Each of them keeps the others from being written.
        for name in files {
            let other = dir.path().join(format!("{subformat}-{name}"));
            std::fs::create_dir(&other).unwrap();
            std::fs::write(other.join(&name), "old").unwrap();
            let before = snapshot(&other);
            let target = other.join("a.vmdk");
            imgtool(["convert", text(&raw), "-o", &option, text(&target)])
                .go()
                .exits(1)
                .says("already exists");
            assert_eq!(snapshot(&other), before, "{subformat}: {name}");
        }
    }
}

#[test]
fn streams_pass_through_pipes_in_both_directions() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let file = dir.path().join("disk.vmdk");
    imgtool(["convert", text(&raw), text(&file)]).ok();
    let piped = imgtool(["convert", "-q", text(&raw), "--to", "vmdk", "-"]).ok();
    assert!(piped.stdout == std::fs::read(&file).unwrap(), "a pipe and a file receive other bytes");
    imgtool(["convert", "-f", "vmdk", "-", "--to", "raw", "back.raw"])
        .within(dir.path())
        .pipe_from(&file)
        .ok();
    assert_same(&raw, &dir.path().join("back.raw"), "a stream from a pipe");
    let mut cut = piped.stdout;
    cut.truncate(cut.len() - 1);
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "-f", "vmdk", "-", "--to", "raw", "cut.raw"]).within(dir.path());
    run.pipe_bytes(cut).go().exits(1).says("ends early");
    assert_eq!(snapshot(dir.path()), before);
    imgtool(["convert", text(&raw), "-o", "subformat=vmfs", "--to", "vmdk", "-"]).go().exits(2);
}

#[test]
fn snapshots_need_permission_for_their_parents() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let path = |name: &str| dir.path().join(name);
    oracles::qemu_make(&raw, "vmdk", "subformat=twoGbMaxExtentSparse", &path("base.vmdk"));
    let (base, top) = (path("base.vmdk"), path("top.vmdk"));
    oracles::qemu_img(&["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", text(&base), text(&top)]);
    oracles::run("qemu-io", &["-f", "vmdk", "-c", "write -P 9 10k 70k", text(&top)]);
    oracles::qemu_img(&["convert", "-f", "vmdk", "-O", "raw", text(&top), text(&path("merged.raw"))]);
    let refused = imgtool(["convert", text(&top), text(&path("out.raw"))]).go().exits(1);
    refused.says("--allow-external").says("base.vmdk");
    imgtool(["convert", "--allow-external", "chain", text(&top), text(&path("out.raw"))]).ok();
    assert_eq!(sha256_file(&path("out.raw")), sha256_file(&path("merged.raw")));
}

#[test]
fn disks_beyond_two_tib_keep_their_ends() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    let file = std::fs::File::create(&raw).unwrap();
    let size = (3 << 40) + 512;
    file.set_len(size).unwrap();
    for at in [0, (2 << 40) - 100, size - 512] {
        file.write_all_at(&[7; 300], at).unwrap();
    }
    for subformat in ["streamOptimized", "monolithicSparse", "vmfs"] {
        let out = dir.path().join(format!("{subformat}.vmdk"));
        imgtool(["convert", text(&raw), "-o", &format!("subformat={subformat}"), text(&out)]).ok();
        imgtool(["compare", text(&raw), text(&out)]).ok();
        imgtool(["check", text(&out)]).ok();
    }
    let split = dir.path().join("split.vmdk");
    let refused = imgtool(["convert", text(&raw), "-o", "subformat=twoGbMaxExtentFlat", text(&split)]).go();
    refused.exits(1).says("1537 extents");
}

#[test]
fn files_beside_a_linked_target_are_beside_the_real_one() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    for subformat in SEVERAL {
        let sub = dir.path().join(subformat);
        std::fs::create_dir(&sub).unwrap();
        let (real, link) = (sub.join("real.vmdk"), dir.path().join("link.vmdk"));
        std::fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let before = names(dir.path());
        let option = format!("subformat={subformat}");
        imgtool(["convert", "--force", "--verify", text(&raw), "-o", &option, text(&link)]).ok();
        assert_eq!(names(dir.path()), before, "{subformat}");
        for image in [&real, &link] {
            imgtool(["compare", text(&raw), text(image)]).ok();
        }
        std::fs::remove_file(&link).unwrap();
    }
}

#[test]
fn the_size_of_a_disk_is_that_of_all_its_files() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let target = dir.path().join("a.vmdk");
    let run =
        imgtool(["convert", "--output", "json", text(&raw), "-o", "subformat=vmfs", text(&target)]).ok();
    let len = |name: &str| {
        let meta = std::fs::metadata(dir.path().join(name)).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&meta) * 512
    };
    let expected = len("a.vmdk") + len("a-flat.vmdk");
    assert!(expected > len("a.vmdk") + (1 << 16));
    assert_eq!(run.json()["outputs"][0]["actual-size"], expected);
    let info = imgtool(["info", "--output", "json", text(&target)]).ok().json();
    assert_eq!(info["actual-size"], expected);
    let extent = &info["format-specific"]["data"]["extents"][0];
    assert_eq!(extent["format"], "VMFS");
    assert!(extent["filename"].as_str().unwrap().ends_with("a-flat.vmdk"), "{extent}");
    let human = imgtool(["info", text(&target)]).ok().text();
    let descriptor = std::fs::read_to_string(&target).unwrap();
    let cid = descriptor.split_once("CID=").unwrap().1.lines().next().unwrap();
    assert!(human.contains(&format!("content identifier: {cid}")), "{human}");
}

/// The facts are those of qemu-img, under the same keys, for its images and for ours.
#[test]
fn info_shows_the_extents_of_qemu_img() {
    require!("qemu-img");
    let dir = tempdir();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let raw = write_raw(dir.path());
    let info = |program: &str, name: &str| -> serde_json::Value {
        let text = oracles::run_in(program, dir.path(), &["info", "--output=json", name]);
        serde_json::from_str(&text).unwrap()
    };
    for subformat in SEVERAL.into_iter().chain(["monolithicSparse", "streamOptimized"]) {
        let option = format!("subformat={subformat}");
        let (theirs, ours) = (format!("sub/theirs-{subformat}.vmdk"), format!("sub/{subformat}.vmdk"));
        imgtool(["convert", "disk.raw", "-o", &option, &ours]).within(dir.path()).ok();
        if subformat != "vmfs" {
            oracles::qemu_make(&raw, "vmdk", &option, &dir.path().join(&theirs));
        }
        for name in [theirs, ours].iter().filter(|name| dir.path().join(name).exists()) {
            let (expected, found) = (info("qemu-img", name), info(PROGRAM, name));
            let expected = expected["format-specific"]["data"].as_object().unwrap();
            assert!(expected.contains_key("extents"), "{name}");
            for (key, value) in expected {
                assert_eq!(&found["format-specific"]["data"][key], value, "{name}: {key}");
            }
        }
    }
}

#[test]
fn a_stream_is_not_compressed_again() {
    let dir = tempdir();
    write_raw(dir.path());
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "disk.raw", "a.vmdk.zst"]).within(dir.path()).go().exits(2);
    run.says("compressed inside").says("leave out the extension .zst");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_split_disk_of_many_files_passes_its_limit() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    let file = std::fs::File::create(&raw).unwrap();
    let extent = 2047u64 << 20;
    for (count, fits) in [(500, true), (501, false)] {
        file.set_len(count * extent).unwrap();
        file.write_all_at(&[7; 300], (count - 1) * extent + 100).unwrap();
        let out = dir.path().join(count.to_string());
        std::fs::create_dir(&out).unwrap();
        let target = out.join("a.vmdk");
        let option = "subformat=twoGbMaxExtentSparse";
        let run = imgtool(["convert", "--verify", text(&raw), "-o", option, text(&target)]).go();
        if !fits {
            run.exits(1).says("501 extents; the limit is 500");
            assert_eq!(names(&out), Vec::<String>::new());
            continue;
        }
        run.exits(0);
        assert_eq!(names(&out).len(), 501);
        imgtool(["compare", text(&raw), text(&target)]).ok();
        imgtool(["check", text(&target)]).ok();
    }
}

/// More extents than our own limit for new images, and than the soft limit of open files allows.
#[test]
fn reads_a_split_disk_of_600_extents() {
    require!("qemu-img");
    let dir = tempdir();
    let extent = images::noise(1, 64 << 10);
    std::fs::write(dir.path().join("extent.raw"), &extent).unwrap();
    let line = ["convert", "-o", "subformat=twoGbMaxExtentSparse", "extent.raw", "one.vmdk"];
    imgtool(line).within(dir.path()).ok();
    let mut descriptor = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
                          createType=\"twoGbMaxExtentSparse\"\n"
        .to_owned();
    for number in 1..=600 {
        descriptor += &format!("RW 128 SPARSE \"disk-s{number:03}.vmdk\"\n");
        let path = dir.path().join(format!("disk-s{number:03}.vmdk"));
        std::fs::copy(dir.path().join("one-s001.vmdk"), path).unwrap();
    }
    let image = dir.path().join("disk.vmdk");
    std::fs::write(&image, descriptor).unwrap();
    std::fs::write(dir.path().join("disk.raw"), extent.repeat(600)).unwrap();
    let script =
        "ulimit -Sn 256; \"$IMGTOOL\" compare disk.vmdk disk.raw && exec \"$IMGTOOL\" check disk.vmdk";
    let status = std::process::Command::new("sh")
        .args(["-c", script])
        .env("IMGTOOL", PROGRAM)
        .current_dir(dir.path())
        .status();
    assert!(status.unwrap().success());
    oracles::qemu_compare(&image, "vmdk", &dir.path().join("disk.raw"), "raw");
}

/// QEMU's first write destroys a stream, so `create` makes no stream.
#[test]
fn created_images_are_for_machines() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    let path = dir.path().join("new.vmdk");
    imgtool(["create", "-q", "-f", "vmdk", text(&path), "8M"]).ok();
    oracles::run("qemu-io", &["-f", "vmdk", "-c", "write -P 9 1M 70k", text(&path)]);
    oracles::run("qemu-io", &["-f", "vmdk", "-c", "read -P 9 1M 70k", text(&path)]);
    imgtool(["check", text(&path)]).ok();
    let info = imgtool(["info", text(&path)]).ok();
    assert!(info.text().contains("monolithicSparse"), "{}", info.text());
}

/// Makes `base.vmdk` and a child that has this name for it.
fn child_of(directory: &Path, hint: &str) {
    write_raw(directory);
    let sparse = ["-o", "subformat=monolithicSparse"];
    imgtool(["convert", "-q", "disk.raw", "base.vmdk"]).args(sparse).within(directory).ok();
    imgtool(["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "kid.vmdk"])
        .within(directory)
        .ok();
    let kid = directory.join("kid.vmdk");
    let mut bytes = std::fs::read(&kid).unwrap();
    let (old, new) = ("Hint=\"base.vmdk\"", format!("Hint=\"{hint}\""));
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    // The descriptor ends in zeros, some of which make room.
    let end = at + bytes[at..].iter().position(|byte| *byte == 0).unwrap();
    bytes.drain(end..end + new.len() - old.len());
    bytes.splice(at..at + old.len(), new.bytes());
    std::fs::write(kid, bytes).unwrap();
}

/// The name of the parent is a path of ESX or Windows; the parent is beside the child.
#[test]
fn a_moved_parent_is_found_by_every_command() {
    for hint in ["/vmfs/volumes/datastore1/web/base.vmdk", "C:\\VMs\\web\\base.vmdk"] {
        let dir = tempdir();
        child_of(dir.path(), hint);
        let chain = ["--allow-external", "chain", "kid.vmdk"];
        imgtool(["convert"]).args(chain).args(["kid.raw"]).within(dir.path()).ok();
        assert_same(&dir.path().join("disk.raw"), &dir.path().join("kid.raw"), hint);
        let info =
            imgtool(["info", "--output", "json", "--backing-chain"]).args(chain).within(dir.path()).ok();
        assert_eq!(info.json().as_array().unwrap().len(), 2, "{}", info.text());
        let check = imgtool(["check"]).args(chain).within(dir.path()).ok();
        assert!(!check.text().contains("not its parent"), "{}", check.text());
        std::fs::remove_file(dir.path().join("base.vmdk")).unwrap();
        let lost = imgtool(["convert"]).args(chain).args(["lost.raw"]).within(dir.path()).go().exits(1);
        assert!(!lost.stderr.contains("can't can't"), "{}", lost.stderr);
    }
}

/// The bytes of a disk without its descriptor, and variants that have no form for a pipe.
#[test]
fn hints_lead_to_the_descriptor_and_to_the_variant_for_pipes() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let path = dir.path().join("d.vmdk");
    imgtool(["convert", "-q", text(&raw), "-o", "subformat=monolithicFlat", text(&path)]).ok();
    let flat = dir.path().join("d-flat.vmdk");
    let refused = imgtool(["convert", text(&flat), text(&dir.path().join("y.qcow2"))]).go().exits(1);
    refused.says("may be a part of the disk 'd.vmdk'");
    let refused = imgtool(["convert", text(&raw), "-O", "vmdk", "-o", "subformat=vmfs", "-"]).go().exits(2);
    refused.says("only vmdk with subformat=streamOptimized").says("-o subformat=streamOptimized");
    let refused = imgtool(["convert", text(&raw), "-O", "vhd", "-"]).go().exits(2);
    refused.says("only vhd with subformat=fixed");
}

/// A parent that was moved, and that the user allows by its path, is found by its name and identifier.
#[test]
fn an_allowed_parent_is_found_wherever_it_is() {
    let dir = tempdir();
    let raw = write_raw(dir.path());
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("sub")).unwrap();
    imgtool(["convert", "-q", text(&raw), "-O", "vhd", text(&path("base.vhd"))]).ok();
    imgtool(["create", "-q", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", text(&path("kid.vhd"))]).ok();
    std::fs::rename(path("kid.vhd"), path("sub/kid.vhd")).unwrap();
    let (kid, base) = (path("sub/kid.vhd"), path("base.vhd"));
    imgtool(["compare", "--allow-external", text(&base), text(&kid), text(&base)]).ok();
    imgtool(["compare", "--allow-external", "chain", text(&kid), text(&base)]).go().exits(2);
    // Another image of that name is another parent.
    imgtool(["create", "-q", "--force", "-f", "vhd", text(&base), "8M"]).ok();
    let refused = imgtool(["compare", "--allow-external", text(&base), text(&kid), text(&raw)]).go();
    refused.exits(2).says("is not the image");
    let info = imgtool(["info", "--backing-chain", "--allow-external", text(&base), text(&kid)]).go();
    info.exits(1).says("its identifier is another");
}
