//! QEMU's image locks: an image that another program may write is neither read nor replaced, and no program
//! begins to write one that is being read.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// qemu-io with an image open and locked, until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    /// Opens an image; `"-r"` for reading. Waits until it is open.
    fn open(directory: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It waits for commands after its prompt.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A run of imgtool that waits for more input or for a reader of its output, until it is dropped.
struct Waiting(Child);

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// True if qemu-io can open an image with these arguments.
fn qemu_opens(directory: &Path, args: &[&str]) -> bool {
    let (code, out, err) = oracles::try_run_in("qemu-io", directory, &[args, &["-c", "length"]].concat());
    let refused = err.contains("lock");
    assert_eq!(refused, code != 0, "{args:?}: {out}{err}");
    !refused
}

/// Waits until qemu-io can no longer open the image for writing.
fn wait_until_locked(directory: &Path, args: &[&str]) {
    let began = Instant::now();
    while qemu_opens(directory, args) {
        assert!(began.elapsed() < Duration::from_secs(30), "{args:?} was never locked");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Creates `disk.raw`, `disk.qcow2` and `overlay.qcow2`, whose backing file is `disk.qcow2`.
fn disks() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 3 << 20)).write_raw(&dir.path().join("disk.raw"));
    let make = |args: &[&str]| drop(oracles::run_in("qemu-img", dir.path(), args));
    make(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    make(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "overlay.qcow2"]);
    dir
}

/// Every command that reads, with the format and the name of an image.
const READERS: [&[&str]; 6] = [
    &["info"],
    &["map"],
    &["check"],
    &["checksum"],
    &["measure", "-O", "qcow2"],
    &["convert", "--to", "raw"],
];

#[test]
fn refuses_a_source_that_another_program_writes() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    for (format, image) in [("qcow2", "disk.qcow2"), ("raw", "disk.raw")] {
        let writer = QemuIo::open(dir.path(), &["-f", format, image]);
        let before = snapshot(dir.path());
        for reader in READERS {
            if (reader[0], format) == ("check", "raw") {
                continue;
            }
            let mut line = [reader, &["-f", format, image]].concat();
            line.extend((reader[0] == "convert").then_some("out.raw"));
            let run = imgtool(&line).within(dir.path()).go();
            run.exits(1).says("in use").says(image).says("-U");
            assert_eq!(snapshot(dir.path()), before, "{line:?}");
        }
        let run = imgtool(["compare", "-f", format, image, "-F", format, image]).within(dir.path()).go();
        run.exits(2).says("in use").says(image).says("-U");
        imgtool(["info", "-U", image]).within(dir.path()).ok();
        let line = ["convert", "-U", "-f", format, image, "--to", "raw", "out.raw"];
        imgtool(line).within(dir.path()).ok().says("was in use by another program").says(image);
        std::fs::remove_file(dir.path().join("out.raw")).unwrap();
        drop(writer);
        let run = imgtool(line).within(dir.path()).ok();
        assert!(!run.stderr.contains("in use"), "no note without another user: {}", run.stderr);
        std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    }
}

#[test]
fn refuses_a_backing_file_that_another_program_writes() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    let line = ["convert", "--allow-external", "chain", "overlay.qcow2", "--to", "raw", "out.raw"];
    let writer = QemuIo::open(dir.path(), &["-f", "qcow2", "disk.qcow2"]);
    imgtool(line).within(dir.path()).go().exits(1).says("in use").says("disk.qcow2");
    imgtool(line).args(["-U"]).within(dir.path()).ok().says("was in use").says("disk.qcow2");
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    // A new overlay needs only the size.
    imgtool(["create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "new.qcow2"])
        .within(dir.path())
        .ok();
    drop(writer);
    // A running virtual machine holds the backing file of its overlay only for reading.
    let machine = QemuIo::open(dir.path(), &["-f", "qcow2", "overlay.qcow2"]);
    imgtool(["convert", "disk.qcow2", "--to", "raw", "out.raw"]).within(dir.path()).ok();
    drop(machine);
}

/// The conversion waits for the reader of its standard output, which never reads.
#[test]
fn no_program_begins_to_write_a_source() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    for (line, format, image) in [
        ("convert disk.qcow2 --to raw -", "qcow2", "disk.qcow2"),
        ("convert -f raw disk.raw --to raw -", "raw", "disk.raw"),
        ("convert --allow-external chain overlay.qcow2 --to raw -", "qcow2", "disk.qcow2"),
    ] {
        let line = line.split(' ').collect::<Vec<_>>();
        let reading = Waiting(imgtool(&line).within(dir.path()).start_piped());
        wait_until_locked(dir.path(), &["-f", format, image]);
        assert!(qemu_opens(dir.path(), &["-r", "-f", format, image]), "{line:?}: others may read");
        imgtool(["convert", "-f", format, image, "--to", "raw", "second.raw"]).within(dir.path()).ok();
        std::fs::remove_file(dir.path().join("second.raw")).unwrap();
        drop(reading);
        assert!(qemu_opens(dir.path(), &["-f", format, image]), "{line:?}: the lock ends with the run");
    }
}

/// A shell may keep standard input open: the lock must not belong to it.
#[test]
fn locks_of_standard_input_end_with_the_run() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    let shell = |line: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-c", line]).env("IMGTOOL", PROGRAM).current_dir(dir.path()).output().unwrap()
    };
    let line =
        "exec 3<disk.qcow2; $IMGTOOL convert - --to raw out.raw <&3 && qemu-io -f qcow2 -c length disk.qcow2";
    let output = shell(line);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    let writer = QemuIo::open(dir.path(), &["-f", "qcow2", "disk.qcow2"]);
    let output = shell("$IMGTOOL convert - --to raw out.raw < disk.qcow2");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use"), "{output:?}");
    drop(writer);
}

/// A target is written although it is in use only if the user insists, and not without a word.
#[test]
fn a_target_in_use_is_named_when_it_is_written() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    std::fs::copy(dir.path().join("disk.raw"), dir.path().join("target.raw")).unwrap();
    let line = ["convert", "-n", "-f", "raw", "disk.raw", "--to", "raw", "target.raw"];
    let user = QemuIo::open(dir.path(), &["-f", "raw", "target.raw"]);
    imgtool(line).within(dir.path()).go().exits(1).says("in use");
    let forced = imgtool(line).args(["--force"]).within(dir.path()).ok();
    forced.says("target.raw was written although it is in use");
    drop(user);
    let free = imgtool(line).args(["--force"]).within(dir.path()).ok();
    assert!(!free.stderr.contains("although"), "{}", free.stderr);
}

/// These commands have no flag that forces them.
#[test]
fn changes_of_an_image_in_use_offer_no_flag() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    let user = QemuIo::open(dir.path(), &["-f", "qcow2", "disk.qcow2"]);
    for line in [&["resize", "disk.qcow2", "+1M"][..], &["check", "-r", "all", "disk.qcow2"]] {
        let run = imgtool(line).within(dir.path()).go().exits(1).says("stop the program that uses it");
        assert!(!run.stderr.contains("--force"), "{}", run.stderr);
    }
    drop(user);
}

#[test]
fn replaces_no_file_in_use() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    let before = snapshot(dir.path());
    for mode in [&["-f", "qcow2", "disk.qcow2"][..], &["-r", "-f", "qcow2", "disk.qcow2"]] {
        let user = QemuIo::open(dir.path(), mode);
        for line in [
            &["convert", "-f", "raw", "disk.raw", "--to", "qcow2", "--force", "disk.qcow2"][..],
            &["create", "-f", "qcow2", "--force", "disk.qcow2", "1M"],
        ] {
            imgtool(line).within(dir.path()).go().exits(1).says("in use").says("disk.qcow2");
            assert_eq!(snapshot(dir.path()), before, "{mode:?}: {line:?}");
        }
        drop(user);
    }
    imgtool(["create", "-f", "qcow2", "--force", "disk.qcow2", "1M"]).within(dir.path()).ok();
}

/// The file that is replaced at the end is not used by others until then.
#[test]
fn no_program_begins_to_use_a_file_that_is_replaced() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    let line = ["convert", "-", "--to", "qcow2", "--force", "disk.qcow2"];
    let mut child = imgtool(line).within(dir.path()).start();
    child.stdin.as_mut().unwrap().write_all(&images::noise(2, 1 << 20)).unwrap();
    let waiting = Waiting(child);
    wait_until_locked(dir.path(), &["-r", "-f", "qcow2", "disk.qcow2"]);
    imgtool(["create", "-f", "qcow2", "--force", "disk.qcow2", "1M"])
        .within(dir.path())
        .go()
        .ends_with(1)
        .says("in use");
    drop(waiting);
    assert!(qemu_opens(dir.path(), &["-f", "qcow2", "disk.qcow2"]));
}

#[test]
fn refuses_to_write_in_place_what_is_in_use() {
    require!("qemu-io", "qemu-img");
    let dir = disks();
    std::fs::write(dir.path().join("target.raw"), vec![1; 4 << 20]).unwrap();
    let line = ["convert", "-n", "disk.qcow2", "--to", "raw", "target.raw"];
    for mode in [&["-f", "raw", "target.raw"][..], &["-r", "-f", "raw", "target.raw"]] {
        let user = QemuIo::open(dir.path(), mode);
        imgtool(line).within(dir.path()).go().exits(1).says("has locked it").says("target.raw");
        drop(user);
    }
    // The writer's own locks: its input stays open.
    let args = ["convert", "-n", "-f", "raw", "-", "--to", "raw", "target.raw"];
    let mut child = imgtool(args).within(dir.path()).start();
    child.stdin.as_mut().unwrap().write_all(&images::noise(2, 1 << 20)).unwrap();
    let writing = Waiting(child);
    wait_until_locked(dir.path(), &["-f", "raw", "target.raw"]);
    let before = oracles::try_run_in("qemu-img", dir.path(), &["info", "-U", "-f", "raw", "target.raw"]);
    assert_eq!(before.0, 0, "qemu-img reads it with -U: {before:?}");
    let run = imgtool(["convert", "-f", "raw", "target.raw", "--to", "raw", "copy.raw"]).within(dir.path());
    run.go().ends_with(1).says("in use");
    imgtool(line).within(dir.path()).go().ends_with(1).says("has locked it");
    drop(writing);
    imgtool(line).within(dir.path()).ok();
}

/// NFS without its lock service answers ENOLCK, other file systems EOPNOTSUPP.
#[test]
fn notes_files_that_have_no_locks() {
    require!("strace", "qemu-img");
    let dir = disks();
    std::fs::write(dir.path().join("target.raw"), vec![1; 4 << 20]).unwrap();
    for (error, force) in [("ENOLCK", "--force"), ("EOPNOTSUPP", "-n")] {
        let paths = ["disk.qcow2", "target.raw"].map(|name| dir.path().join(name));
        let output = Command::new("strace")
            .args([
                "-f",
                "-o",
                "/dev/null",
                "-e",
                "trace=fcntl",
                "-e",
                &format!("inject=fcntl:error={error}"),
            ])
            .args(["-P", text(&paths[0]), "-P", text(&paths[1]), PROGRAM, "convert", "--to", "raw", force])
            .args([&paths[0], &paths[1]])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{error}: {said}");
        for name in ["disk.qcow2", "target.raw"] {
            assert!(said.contains(&format!("{name} can't be locked")), "{error}: {said}");
        }
    }
}
