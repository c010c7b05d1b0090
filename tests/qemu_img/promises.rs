//! The promises that the name of qemu-img gives up, and those that it keeps.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use imgtool_testing::images::Image;
use imgtool_testing::{require, snapshot, tempdir};

use super::pair::Workshop;
use crate::support::devices::may_administer;
use crate::support::imgtool;
use crate::support::run::PROGRAM;

#[test]
fn compat_flag_has_the_effect_of_the_name() {
    let dir = tempdir();
    Image::hole("x", 1 << 20).write_raw(&dir.path().join("disk.raw"));
    std::fs::write(dir.path().join("old.qcow2"), b"old").unwrap();
    // Without the flag, the file is kept, and the name decides the format.
    imgtool(["convert", "disk.raw", "old.qcow2"]).within(dir.path()).go().exits(1).says("already exists");
    for line in ["--compat convert disk.raw old.qcow2", "convert disk.raw old.qcow2 --compat"] {
        let run = imgtool(line.split(' ')).within(dir.path()).go().ends_with(0);
        assert_eq!((run.text().as_str(), run.stderr.as_str()), ("", ""), "{line}");
        assert_eq!(std::fs::metadata(dir.path().join("old.qcow2")).unwrap().len(), 1 << 20, "{line}");
    }
    // Behind --, it is a name.
    imgtool(["info", "--", "--compat"]).within(dir.path()).go().exits(1).says("imgtool: error: --compat");
}

#[test]
fn version_has_the_form_of_qemu_img() {
    let dir = tempdir();
    let link = dir.path().join("qemu-img");
    symlink(PROGRAM, &link).unwrap();
    let said = |args: &[&str]| {
        let output = Command::new(&link).args(args).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        String::from_utf8(output.stdout).unwrap()
    };
    for flag in ["--version", "-V"] {
        let text = said(&[flag]);
        let version = text.strip_prefix("qemu-img version ").unwrap().split(' ').next().unwrap();
        assert!(version.split('.').all(|part| part.parse::<u32>().is_ok()), "{text}");
        assert!(text.lines().next().unwrap().contains("imgtool"), "{text}");
    }
    let help = said(&["--help"]);
    let formats = help.lines().last().unwrap().strip_prefix("Supported formats: ").unwrap();
    for format in ["raw", "qcow2", "vmdk", "vpc", "vhdx"] {
        assert!(formats.split(' ').any(|name| name == format), "{help}");
    }
    assert!(said(&["convert", "--help"]).contains("--target-is-zero"));
}

#[test]
fn refuses_missing_commands_by_name() {
    require!("qemu-img");
    let workshop = Workshop::new();
    for command in ["amend", "bench", "bitmap", "commit", "dd", "rebase", "snapshot"] {
        let (code, out, error) = workshop.ours(&format!("{command} base.qcow2"));
        assert_eq!((code, out.as_str()), (1, ""), "{command}");
        assert!(error.starts_with(&format!("qemu-img: imgtool has no {command}")), "{error}");
        assert!(error.contains("qemu-utils"), "{error}");
    }
}

#[test]
fn follows_chains_in_the_directory_of_the_image_alone() {
    require!("qemu-img");
    let workshop = Workshop::new();
    assert_eq!(workshop.ours("convert -O raw over.qcow2 n.raw"), (0, String::new(), String::new()));
    let dir = tempdir();
    let make = |line: &str| {
        imgtool_testing::oracles::run_in("qemu-img", dir.path(), &line.split(' ').collect::<Vec<_>>())
    };
    std::fs::create_dir(dir.path().join("vm")).unwrap();
    make("create -q -f qcow2 base.qcow2 1M");
    make("create -q -f qcow2 -b ../base.qcow2 -F qcow2 vm/disk.qcow2");
    let before = snapshot(dir.path());
    let line = ["--compat", "convert", "-O", "raw", "vm/disk.qcow2", "n.raw"];
    imgtool(line).within(dir.path()).go().exits(1).says("--allow-external");
    assert_eq!(snapshot(dir.path()), before);
    // What follows is missing, so the chain is not complete.
    let info = ["--compat", "info", "--backing-chain", "--output=json", "vm/disk.qcow2"];
    imgtool(info).within(dir.path()).go().exits(1).says("--allow-external");
    let allowed = ["--allow-external", "base.qcow2"];
    imgtool(line).args(allowed).within(dir.path()).go().ends_with(0);
}

/// As the disks of OpenStack Nova rest on images in another directory, and its command lines have no flag of
/// ours.
#[test]
fn the_environment_allows_directories_of_base_images() {
    require!("qemu-img");
    let dir = tempdir();
    let root = std::fs::canonicalize(dir.path()).unwrap();
    let make = |line: &str| {
        imgtool_testing::oracles::run_in("qemu-img", &root, &line.split(' ').collect::<Vec<_>>())
    };
    for directory in ["_base", "_base/deep", "vm", "secret"] {
        std::fs::create_dir(root.join(directory)).unwrap();
    }
    Image::hole("x", 1 << 20).with(4096, vec![7; 4096]).write_raw(&root.join("_base/deep/0123.raw"));
    std::fs::copy(root.join("_base/deep/0123.raw"), root.join("secret/key.raw")).unwrap();
    symlink(root.join("secret/key.raw"), root.join("_base/link.raw")).unwrap();
    let base = root.join("_base");
    for (disk, below) in
        [("disk", "_base/deep/0123.raw"), ("other", "secret/key.raw"), ("sly", "_base/link.raw")]
    {
        make(&format!("create -q -f qcow2 -b {}/{below} -F raw vm/{disk}", root.display()));
    }
    let convert = |name: &[&str], disk: &str, value: &str| {
        let line = ["convert", "-t", "none", "-O", "raw", "-f", "qcow2", disk, "n.raw"];
        imgtool(name).args(line).env("IMGTOOL_ALLOW_EXTERNAL_BELOW", value).within(&root).go()
    };
    let list = format!("/nonexistent:{}", base.display());
    convert(&["--compat"], "vm/disk", &list).ends_with(0);
    assert!(
        std::fs::read(root.join("n.raw")).unwrap()
            == std::fs::read(root.join("_base/deep/0123.raw")).unwrap()
    );
    std::fs::remove_file(root.join("n.raw")).unwrap();
    // Other directories stay closed, also by a link, and so does everything by the name of imgtool.
    for (name, disk) in [(&["--compat"][..], "vm/other"), (&["--compat"], "vm/sly"), (&[], "vm/disk")] {
        convert(name, disk, &list).exits(1).says("--allow-external");
    }
    convert(&["--compat"], "vm/disk", "_base").exits(1).says("expected absolute paths");
    assert!(!root.join("n.raw").exists());
}

#[test]
fn keeps_an_existing_file_until_the_new_one_is_finished() {
    require!("qemu-img");
    let dir = tempdir();
    std::fs::write(dir.path().join("old.raw"), b"precious").unwrap();
    std::fs::write(dir.path().join("cut.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let before = snapshot(dir.path());
    let line = ["--compat", "convert", "-f", "qcow2", "-O", "raw", "cut.qcow2", "old.raw"];
    let run = imgtool(line).within(dir.path()).go().exits(1);
    assert!(run.stderr.starts_with("qemu-img: "), "{}", run.stderr);
    assert_eq!(snapshot(dir.path()), before);
    // A source is never its own target.
    let line = ["--compat", "convert", "-f", "raw", "-O", "raw", "old.raw", "old.raw"];
    imgtool(line).within(dir.path()).go().exits(1).says("same file");
    let line = ["--compat", "convert", "-f", "raw", "old.raw", "."];
    imgtool(line).within(dir.path()).go().exits(1).says("is a directory");
}

#[test]
fn a_replaced_file_keeps_its_owner_and_permissions() {
    let dir = tempdir();
    let path = dir.path().join("old.raw");
    Image::hole("x", 1 << 20).write_raw(&dir.path().join("disk.raw"));
    // Only the superuser may give files away.
    const OTHER: u32 = 65_534;
    std::fs::write(&path, b"old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let is_given = std::os::unix::fs::chown(&path, Some(OTHER), Some(OTHER)).is_ok();
    let line = ["--compat", "convert", "-f", "raw", "-O", "raw", "disk.raw", "old.raw"];
    imgtool(line).within(dir.path()).go().ends_with(0);
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (1 << 20, 0o640));
    assert_eq!(meta.uid() == OTHER, is_given);
}

/// A worker without privileges may get a file, but not its directory.
#[test]
fn a_file_in_a_directory_that_can_not_be_changed_is_written_in_place() {
    require!("setpriv");
    let dir = tempdir();
    let mode = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let program = dir.path().join("program");
    std::fs::copy(PROGRAM, &program).unwrap();
    Image::hole("x", 1 << 20).with(0, vec![7; 70_000]).write_raw(&dir.path().join("disk.raw"));
    let closed = dir.path().join("closed");
    let file = closed.join("file");
    std::fs::create_dir(&closed).unwrap();
    std::fs::write(&file, b"old").unwrap();
    mode(dir.path(), 0o755);
    mode(&file, 0o666);
    mode(&closed, 0o555);
    let before = std::fs::metadata(&file).unwrap();
    let run = |line: &str| {
        // Only the superuser may become someone else, and is stopped by no permission.
        let mut command = match may_administer() {
            true => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid=65534", "--clear-groups"]).arg(&program);
                command
            }
            false => Command::new(&program),
        };
        command.args(line.split(' ')).current_dir(dir.path()).output().unwrap()
    };
    let failed = run("convert -f raw -O qcow2 disk.raw closed/file");
    assert_eq!(failed.status.code(), Some(1), "without a permission to overwrite");
    for (line, len) in [
        ("--compat create -f raw closed/file 4M", 4 << 20),
        ("--compat convert -f raw -O raw disk.raw closed/file", 1 << 20),
    ] {
        let output = run(line);
        assert!(output.status.success() && output.stderr.is_empty(), "{line}: {output:?}");
        let after = std::fs::metadata(&file).unwrap();
        assert_eq!((after.ino(), after.len()), (before.ino(), len), "{line}");
    }
    assert!(std::fs::read(&file).unwrap() == std::fs::read(dir.path().join("disk.raw")).unwrap());
    let missing = run("--compat convert -f raw -O raw disk.raw closed/other");
    assert_eq!(missing.status.code(), Some(1));
    if may_administer() {
        mode(&closed, 0o1777);
        let foreign = run("--compat convert -f raw -O qcow2 disk.raw closed/file");
        assert_eq!(foreign.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&foreign.stderr).contains("file of another user"), "{foreign:?}");
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 1 << 20);
    }
    mode(&closed, 0o755);
}

/// qemu-img makes images that a machine can write, and imgtool streams for import.
#[test]
fn vmdk_images_are_for_machines() {
    let dir = tempdir();
    Image::hole("x", 1 << 20).write_raw(&dir.path().join("disk.raw"));
    let line = ["--compat", "convert", "-f", "raw", "-O", "vmdk", "disk.raw", "new.vmdk"];
    imgtool(line).within(dir.path()).go().ends_with(0);
    let info = imgtool(["info", "--output", "json", "new.vmdk"]).within(dir.path()).ok().json();
    assert_eq!(info["format-specific"]["data"]["create-type"], "monolithicSparse");
}
