//! `--verify`: a byte that changes between writing and reading back is found.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, names, oracles, require, snapshot, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Starts the program under strace, which stops it at its first flush: everything is written, and nothing is
/// read back yet. Returns strace and the process ID of the program.
fn stopped_at_flush(directory: &Path, args: &[&str]) -> (Child, u32) {
    stopped_at_nth_flush(directory, args, 1)
}

fn stopped_at_nth_flush(directory: &Path, args: &[&str], number: usize) -> (Child, u32) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let inject = format!("inject=fsync:signal=SIGSTOP:when={number}");
    let strace = Command::new("strace")
        .args(["-f", "-o", text(log.path()), "-e", "trace=fsync", "-e", &inject])
        .arg(PROGRAM)
        .args(args)
        .current_dir(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while !std::fs::read_to_string(log.path()).unwrap().contains("stopped by SIGSTOP") {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", strace.id())).unwrap();
    (strace, children.trim().parse().expect("one child"))
}

/// Returns the unfinished outputs below a directory.
fn partials(directory: &Path) -> Vec<PathBuf> {
    let found = snapshot(directory).into_keys().filter(|name| name.contains(".partial-"));
    found.map(|name| directory.join(name)).collect()
}

/// Flips a bit in the first occurrence of `pattern` in a file. Returns true if there is one.
fn flip(path: &Path, pattern: &[u8]) -> bool {
    let bytes = std::fs::read(path).unwrap();
    let Some(at) = bytes.windows(pattern.len()).position(|window| window == pattern) else { return false };
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&[bytes[at] ^ 4], at as u64).unwrap();
    true
}

fn go_on(strace: Child, pid: u32) -> (Option<i32>, String) {
    assert!(Command::new("kill").args(["-CONT", &pid.to_string()]).status().unwrap().success());
    let output = strace.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Sets the refcount of an unused cluster of a qcow2 image with clusters of 64 KiB to one. The file must contain the
/// cluster, or no check counts it.
fn leak(image: &Path, cluster: u64) {
    let file = std::fs::File::options().read(true).write(true).open(image).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let len = file.metadata().unwrap().len().max((cluster + 1) << 16);
    file.set_len(len).unwrap();
    let block = number(number(48));
    file.write_all_at(&[0, 1], block + 2 * cluster).unwrap();
}

/// An image that is written into may have had leaks before. New ones come from the run, or from another program.
#[test]
fn verify_finds_new_leaks_in_an_image_that_existed() {
    require!("strace", "qemu-img");
    let dir = tempdir();
    std::fs::write(dir.path().join("disk.raw"), images::noise(1, 1 << 20)).unwrap();
    let image = dir.path().join("x.qcow2");
    let fresh = || {
        oracles::run_in("qemu-img", dir.path(), &["create", "-q", "-f", "qcow2", "x.qcow2", "4M"]);
        leak(&image, 100);
    };
    let line = ["convert", "-n", "-O", "qcow2", "disk.raw", "x.qcow2"];
    let verified = [&line[..], &["--verify"]].concat();
    fresh();
    imgtool(&verified).within(dir.path()).ok();
    let count = Command::new("strace")
        .args(["-f", "-e", "trace=fsync", PROGRAM])
        .args(line)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let flushes = String::from_utf8_lossy(&count.stderr).matches("fsync(").count();
    // The last two belong to the naming of the outputs. The flush before the image is read back comes in their
    // place.
    let number = flushes - 1;
    for harm in [true, false] {
        fresh();
        let (strace, pid) = stopped_at_nth_flush(dir.path(), &verified, number);
        if harm {
            leak(&image, 101);
        }
        let (code, stderr) = go_on(strace, pid);
        assert_eq!(code, Some(i32::from(harm)), "{stderr}");
        assert!(!harm || stderr.contains("verification failed: the structure is damaged"), "{stderr}");
    }
}

#[test]
fn verify_finds_a_changed_byte_in_every_format() {
    require!("strace");
    let dir = tempdir();
    let content = images::noise(5, 300_000);
    Image::hole("x", 3 << 20).with(65_536, content.clone()).write_raw(&dir.path().join("disk.raw"));
    for to in ["raw", "qcow2", "vhdx", "vma"] {
        let out = format!("out.{to}");
        for harm in [true, false] {
            let (strace, pid) =
                stopped_at_flush(dir.path(), &["convert", "--verify", "disk.raw", "--to", to, &out]);
            let partial = partials(dir.path());
            assert_eq!(partial.len(), 1, "{to}");
            if harm {
                assert!(flip(&partial[0], &content[200_000..200_032]), "{to}: the content is not there");
            }
            let (code, stderr) = go_on(strace, pid);
            if harm {
                assert_eq!(code, Some(1), "{to}: {stderr}");
                assert!(
                    stderr.contains(&out) && stderr.contains("verification failed: the content differs"),
                    "{to}: {stderr}"
                );
                assert_eq!(names(dir.path()), ["disk.raw"], "{to}");
            } else {
                assert_eq!(code, Some(0), "{to}: {stderr}");
                std::fs::remove_file(dir.path().join(&out)).unwrap();
            }
        }
    }
}

/// Damage that the guest's content does not show: zeros cut off the end of a disk, the refcounts of a qcow2
/// image, the first header of a VHDX image.
#[test]
fn verify_finds_damage_outside_the_guest_content() {
    require!("strace");
    let dir = tempdir();
    Image::hole("x", 3 << 20).with(65_536, images::noise(5, 300_000)).write_raw(&dir.path().join("disk.raw"));
    let cut = |path: &Path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len((3 << 20) - 1_000_000).unwrap();
    };
    let first_refcount = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        let at = |position: usize| u64::from_be_bytes(bytes[position..][..8].try_into().unwrap());
        let block = at(usize::try_from(at(48)).unwrap());
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[0, 3], block).unwrap();
    };
    let header = |path: &Path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(b"HEAD", 64 << 10).unwrap();
    };
    for (to, word) in [("raw", "instead of 3145728"), ("qcow2", "structure"), ("vhdx", "structure")] {
        let out = format!("out.{to}");
        let (strace, pid) =
            stopped_at_flush(dir.path(), &["convert", "--verify", "disk.raw", "--to", to, &out]);
        let partial = &partials(dir.path())[0];
        match to {
            "raw" => cut(partial),
            "qcow2" => first_refcount(partial),
            _ => header(partial),
        }
        let (code, stderr) = go_on(strace, pid);
        assert_eq!(code, Some(1), "{to}: {stderr}");
        assert!(stderr.contains(&out) && stderr.contains(word), "{to}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"], "{to}");
    }
}

#[test]
fn verify_finds_a_changed_byte_in_any_output() {
    require!("strace");
    let source = fixture("two-disks.vma.zst");
    let dir = tempdir();
    for victim in ["drive-efidisk0", "drive-scsi0", "qemu-server.conf"] {
        let (strace, pid) =
            stopped_at_flush(dir.path(), &["convert", "--verify", text(&source), "--to", "raw", "out/"]);
        let all = partials(dir.path());
        let partial = all.iter().find(|path| text(path).contains(victim)).expect(victim);
        let bytes = std::fs::read(partial).unwrap();
        let at = bytes.iter().position(|byte| *byte != 0).unwrap();
        assert!(flip(partial, &bytes[at..bytes.len().min(at + 16)]));
        let (code, stderr) = go_on(strace, pid);
        assert_eq!(code, Some(1), "{victim}: {stderr}");
        assert!(stderr.contains(victim), "{victim}: {stderr}");
        assert!(names(dir.path()).is_empty(), "{victim}: {:?}", names(dir.path()));
    }
}

#[test]
fn verify_finds_a_changed_byte_in_data_file_or_base() {
    require!("strace");
    let dir = tempdir();
    let content = images::noise(5, 300_000);
    Image::hole("x", 3 << 20).with(65_536, content.clone()).write_raw(&dir.path().join("disk.raw"));
    let mut other = content.clone();
    other[100_000..110_000].fill(7);
    Image::hole("x", 3 << 20).with(65_536, other).write_raw(&dir.path().join("other.raw"));
    let absolute = format!("data_file={},data_file_raw=on", text(&dir.path().join("beside.raw")));
    for options in ["data_file=beside.raw", &absolute, "backing_file=other.raw,backing_fmt=raw"] {
        for harm in [true, false] {
            let before = snapshot(dir.path());
            let line = ["convert", "--verify", "disk.raw", "--to", "qcow2", "-o", options, "out.qcow2"];
            let (strace, pid) = stopped_at_flush(dir.path(), &line);
            // Without a data file, the rest of the disk is in the base image.
            let base = dir.path().join("other.raw");
            let victim = match partials(dir.path()).iter().find(|path| text(path).contains("beside")) {
                Some(partial) => partial.clone(),
                None => base.clone(),
            };
            if harm {
                assert!(flip(&victim, &content[200_000..200_032]), "{options}: the content is not there");
            }
            let (code, stderr) = go_on(strace, pid);
            assert_eq!(code, Some(i32::from(harm)), "{options}: {stderr}");
            if !harm {
                std::fs::remove_file(dir.path().join("out.qcow2")).unwrap();
                let _ = std::fs::remove_file(dir.path().join("beside.raw"));
                continue;
            }
            assert!(
                stderr.contains("out.qcow2") && stderr.contains("verification failed: the content differs"),
                "{stderr}"
            );
            assert_eq!(names(dir.path()), ["disk.raw", "other.raw"], "{options}");
            if victim == base {
                assert!(flip(&base, &{
                    let mut flipped = content[200_000..200_032].to_vec();
                    flipped[0] ^= 4;
                    flipped
                }));
            }
            assert_eq!(snapshot(dir.path()), before, "{options}");
        }
    }
}

/// The user must still allow the images that the base refers to, but not the names in the output's options.
#[test]
fn verify_opens_only_files_named_by_the_options() {
    require!("qemu-img");
    let dir = tempdir();
    Image::hole("x", 3 << 20).with(65_536, images::noise(1, 300_000)).write_raw(&dir.path().join("disk.raw"));
    Image::hole("x", 3 << 20)
        .with(65_536, images::noise(2, 300_000))
        .write_raw(&dir.path().join("lowest.raw"));
    let base = dir.path().join("base.qcow2");
    oracles::run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "lowest.raw", text(&base)]);
    let line = "convert --verify disk.raw --to qcow2 out.qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2,data_file=beside";
    let before = snapshot(dir.path());
    imgtool(line.split(' ')).within(dir.path()).go().exits(1).says("lowest.raw");
    assert_eq!(snapshot(dir.path()), before);
    let lowest = dir.path().join("lowest.raw");
    imgtool(line.split(' ').chain(["--allow-external", text(&lowest)])).within(dir.path()).ok();
    imgtool("compare --allow-external chain disk.raw out.qcow2".split(' ')).within(dir.path()).ok();
    // Over the existing output, under the same names.
    imgtool(line.split(' ').chain(["--force", "--allow-external", "chain"])).within(dir.path()).ok();
    imgtool("compare --allow-external chain disk.raw out.qcow2".split(' ')).within(dir.path()).ok();
}

/// Like a device, a target written in place keeps its length, which may exceed the size of its disk.
#[test]
fn verify_accepts_a_larger_target_written_in_place() {
    let dir = tempdir();
    Image::hole("x", 3 << 20).with(65_536, images::noise(1, 300_000)).write_raw(&dir.path().join("disk.raw"));
    std::fs::write(dir.path().join("larger.raw"), vec![1; 4 << 20]).unwrap();
    imgtool("convert --verify -n disk.raw --to raw larger.raw".split(' ')).within(dir.path()).ok();
    let (disk, target) = (dir.path().join("disk.raw"), dir.path().join("larger.raw"));
    let (disk, target) = (std::fs::read(disk).unwrap(), std::fs::read(target).unwrap());
    assert_eq!((disk.len(), target.len()), (3 << 20, 4 << 20));
    assert!(target.starts_with(&disk) && target[3 << 20..].iter().all(|&byte| byte == 1));
}

/// Compressed outputs are read back through their compression, and targets of a stream up to its size.
#[test]
fn intact_outputs_of_every_kind_pass() {
    require!("zstd", "gzip");
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 3 << 20).with(65_536, images::noise(1, 300_000)).write_raw(&raw);
    let bytes = std::fs::read(&raw).unwrap();
    for (name, program) in [("s.raw.zst", "zstd"), ("s.raw.gz", "gzip")] {
        std::fs::write(dir.path().join(name), oracles::filter(program, &["-c"], &bytes)).unwrap();
    }
    let pipe = |line: &str| imgtool(line.split(' ')).within(dir.path()).pipe_from(&raw).ok();
    for source in ["disk.raw", "-", "s.raw.zst", "s.raw.gz"] {
        let outputs = [
            "raw out.raw",
            "raw out.raw.zst",
            "raw out.raw.gz",
            "vma out.vma",
            "vma out.vma.gz",
            "vma out.vma.zst",
            "qcow2 out.qcow2",
            "vhdx out.vhdx",
        ];
        for output in outputs {
            pipe(&format!("convert --verify -f raw {source} --to {output}"));
            let (_, file) = output.split_once(' ').unwrap();
            imgtool(["compare", "disk.raw", file]).within(dir.path()).ok();
            std::fs::remove_file(dir.path().join(file)).unwrap();
        }
        for len in [3 << 20, 4 << 20] {
            for line in [
                "convert --verify -n -f raw SOURCE --to raw t.raw",
                "convert --verify -f raw x=SOURCE --target x=t.raw",
            ] {
                std::fs::write(dir.path().join("t.raw"), vec![1; len]).unwrap();
                pipe(&line.replace("SOURCE", source));
                let target = std::fs::read(dir.path().join("t.raw")).unwrap();
                assert!(target.len() == len && target.starts_with(&bytes), "{line}: {source}");
            }
        }
    }
}

#[test]
fn a_byte_that_changes_in_the_target_of_a_stream_is_found() {
    require!("strace", "gzip");
    let dir = tempdir();
    let content = images::noise(5, 300_000);
    Image::hole("x", 3 << 20).with(65_536, content.clone()).write_raw(&dir.path().join("disk.raw"));
    let bytes = std::fs::read(dir.path().join("disk.raw")).unwrap();
    std::fs::write(dir.path().join("s.raw.gz"), oracles::filter("gzip", &["-c"], &bytes)).unwrap();
    for harm in [true, false] {
        let target = dir.path().join("t.raw");
        std::fs::write(&target, vec![1; 3 << 20]).unwrap();
        let line = ["convert", "--verify", "-n", "-f", "raw", "s.raw.gz", "--to", "raw", "t.raw"];
        let (strace, pid) = stopped_at_flush(dir.path(), &line);
        if harm {
            assert!(flip(&target, &content[200_000..200_032]));
        }
        let (code, stderr) = go_on(strace, pid);
        assert_eq!(code, Some(i32::from(harm)), "{stderr}");
        assert_eq!(stderr.contains("verification failed: the content differs"), harm, "{stderr}");
    }
}

#[test]
fn salvaged_outputs_pass_and_the_losses_are_listed() {
    let dir = tempdir();
    let mut archive = std::fs::read(fixture("two-disks.vma.zst")).unwrap();
    archive.truncate(archive.len() / 2);
    std::fs::write(dir.path().join("cut.vma.zst"), archive).unwrap();
    for to in ["raw", "qcow2", "vhdx"] {
        let line = ["convert", "--salvage", "--verify", "cut.vma.zst", "--to", to, "out/"];
        imgtool(line).within(dir.path()).go().exits(3).says("lost");
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
    for name in ["out.vma", "out.vma.gz", "out.vma.zst"] {
        let line = ["convert", "--salvage", "--verify", "cut.vma.zst", "--to", "vma", name];
        imgtool(line).within(dir.path()).go().exits(3).says("lost");
    }
}
