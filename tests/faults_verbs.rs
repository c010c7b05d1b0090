//! What goes wrong while other verbs than `convert` write, and around the directory and the target.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::faults::{ends, kill};
use crate::support::images::{self, Image};
use crate::support::oracles::require;
use crate::support::run::PROGRAM;
use crate::support::{assert_same, imgtool, names, snapshot, tempdir, text};

/// A disk of 8 MiB as `disk.raw`, and an archive of it, `disk.vma`.
fn with_disk() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&dir.path().join("disk.raw"));
    imgtool(["convert", "disk.raw", "--to", "vma", "disk.vma"]).within(dir.path()).ok();
    dir
}

/// Every verb that writes, and what it makes.
const WRITING: [(&[&str], &str); 6] = [
    (&["create", "-f", "raw", "-o", "preallocation=full", "new.raw", "8M"], "new.raw"),
    (&["create", "-f", "qcow2", "-o", "preallocation=full", "new.qcow2", "8M"], "new.qcow2"),
    (&["create", "-f", "vhdx", "new.vhdx", "8M"], "new.vhdx"),
    (&["vma", "create", "new.vma", "disk=disk.raw"], "new.vma"),
    (&["vma", "extract", "disk.vma", "out"], "out"),
    (&["convert", "disk.raw", "--to", "vma", "new.vma.zst"], "new.vma.zst"),
];

fn sh(directory: &Path, line: &str) -> Output {
    // Signals have their usual effect, also where the tests were started with nohup or in the background.
    let mut command = Command::new("env");
    command
        .args(["--default-signal=HUP,INT", "bash", "-c", line])
        .env("IMGTOOL", PROGRAM)
        .env("SOURCE_DATE_EPOCH", "1790000000");
    command.current_dir(directory).output().unwrap()
}

fn remove(path: &Path) {
    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
}

/// A source that is written to meanwhile has no one state that could be converted; that is said.
#[test]
fn a_source_that_changes_while_it_is_read_is_told() {
    require!("strace");
    let dir = with_disk();
    let stop = "strace -f -o log -e trace=pwritev,pwrite64,copy_file_range -e inject=pwritev,pwrite64,copy_file_range:signal=SIGSTOP:when=1";
    let meanwhile = |what: &str| {
        let line = format!(
            "{stop} $IMGTOOL convert disk.raw --to qcow2 out.qcow2 & \
             until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do sleep 0.01; done; \
             {what}; child=$(cat /proc/$!/task/$!/children); \
             while kill -CONT $child 2>/dev/null; do sleep 0.01; done; wait $!"
        );
        let run = sh(dir.path(), &line);
        assert_eq!(run.status.code(), Some(0));
        remove(&dir.path().join("out.qcow2"));
        remove(&dir.path().join("log"));
        String::from_utf8_lossy(&run.stderr).contains("disk.raw was written to while it was read")
    };
    assert!(!meanwhile("true"));
    assert!(!meanwhile("cat disk.raw >/dev/null; chmod 600 disk.raw"));
    assert!(!meanwhile("cp disk.raw other && mv other disk.raw"), "the old file is read");
    assert!(meanwhile("printf x | dd of=disk.raw bs=1 seek=4096 conv=notrunc status=none"));
    assert!(meanwhile("printf x >> disk.raw"));
}

#[test]
fn a_limit_for_file_sizes_stops_every_verb_that_writes() {
    let dir = with_disk();
    let before = snapshot(dir.path());
    for (args, made) in WRITING {
        // 2 MiB: not enough for any of them.
        let run = sh(dir.path(), &format!("ulimit -f 2048; exec $IMGTOOL {}", args.join(" ")));
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains(made) && stderr.contains("File too large"), "{args:?}: {stderr}");
        assert_eq!(snapshot(dir.path()), before, "{args:?}");
    }
}

#[test]
fn a_signal_while_any_verb_writes_or_flushes_leaves_all_or_nothing() {
    require!("strace");
    let dir = with_disk();
    let before = names(dir.path());
    let mut interrupted = 0;
    for (args, made) in WRITING {
        imgtool(args).within(dir.path()).ok();
        let wanted = names(dir.path());
        remove(&dir.path().join(made));
        for (number, when) in [(0, "pwrite64,pwritev"), (1, "fsync"), (2, "pwrite64,pwritev,fsync")] {
            let signal = ["SIGINT", "SIGTERM", "SIGHUP"][number];
            let line = format!(
                "strace -f -o /dev/null -e trace={when} -e inject={when}:signal={signal}:when=2 $IMGTOOL {}",
                args.join(" ")
            );
            let run = sh(dir.path(), &line);
            let what = format!("{line}: {run:?}");
            if run.status.success() {
                assert_eq!(names(dir.path()), wanted, "{what}");
                if !["new.raw", "out"].contains(&made) {
                    imgtool(["check", made]).within(dir.path()).ok();
                }
                remove(&dir.path().join(made));
            } else {
                assert_eq!(names(dir.path()), before, "{what}");
                interrupted += 1;
            }
        }
    }
    assert!(interrupted > 0, "no signal came in time");
}

/// What a verb that only reads keeps for itself (an image in a pipe is copied) goes with it.
#[test]
fn a_signal_ends_every_verb_that_only_reads() {
    let dir = with_disk();
    imgtool(["convert", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    imgtool(["create", "-f", "qcow2", "huge.qcow2", "64T"]).within(dir.path()).ok();
    let bytes = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let before = snapshot(dir.path());
    let lines: [&[&str]; 8] = [
        &["info", "-"],
        &["check", "-"],
        &["map", "-"],
        &["measure", "--to", "qcow2", "-"],
        &["checksum", "-"],
        &["compare", "-", "disk.raw"],
        // Hashing all those zeros takes days.
        &["checksum", "huge.qcow2"],
        &["vma", "verify", "-"],
    ];
    for (number, line) in lines.into_iter().enumerate() {
        let signal = ["-INT", "-TERM", "-HUP"][number % 3];
        let temporary = tempdir();
        let run = imgtool(line).within(dir.path()).env("TMPDIR", text(temporary.path()));
        let mut child = run.start();
        if line.contains(&"-") && line[0] != "vma" {
            // More than a pipe holds: it is read, and the rest waited for.
            child.stdin.as_mut().unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none(), "{line:?} did not wait");
        kill(&child, signal);
        let status = ends(child, signal);
        assert!(status.code() == Some(1) || status.signal().is_some(), "{line:?}: {status}");
        assert!(names(temporary.path()).is_empty(), "{line:?}");
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
}

#[test]
fn a_signal_during_a_long_flush_does_not_call_finished_outputs_interrupted() {
    require!("strace");
    let dir = with_disk();
    let before = names(dir.path());
    for (args, made) in WRITING {
        // Longer than the program waits for its work to stop.
        let line = format!(
            "strace -f -o /dev/null -e trace=fsync -e inject=fsync:signal=SIGTERM:delay_exit=3000000:when=1 \
             $IMGTOOL {}",
            args.join(" ")
        );
        let run = sh(dir.path(), &line);
        match run.status.code() {
            Some(0) => remove(&dir.path().join(made)),
            Some(1) => {}
            _ => panic!("{line}: {run:?}"),
        }
        assert_eq!(names(dir.path()), before, "{line}: {run:?}");
    }
}

#[test]
fn of_two_runs_for_one_target_one_wins_and_the_other_says_so() {
    let dir = with_disk();
    // Slowly, so that both are at work at once.
    let line = "$IMGTOOL convert -q -r 16M disk.raw new.qcow2 & $IMGTOOL convert -q -r 16M disk.raw new.qcow2; \
                first=$?; wait $!; echo $first $?";
    let run = sh(dir.path(), line);
    let codes = String::from_utf8_lossy(&run.stdout).trim().to_owned();
    assert!(["0 1", "1 0"].contains(&&*codes), "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).to_lowercase().contains("exists"), "{run:?}");
    imgtool(["compare", "disk.raw", "new.qcow2"]).within(dir.path()).ok();
    assert_eq!(names(dir.path()), ["disk.raw", "disk.vma", "new.qcow2"]);
}

#[test]
fn a_directory_that_vanishes_meanwhile_is_an_error() {
    let dir = with_disk();
    for out in ["out/new.qcow2", "out/"] {
        let directory = dir.path().join("out");
        std::fs::create_dir(&directory).unwrap();
        let run = imgtool(["convert", "-q", "-r", "16M", "disk.raw", "--to", "qcow2", out]);
        let mut child = run.within(dir.path()).start();
        let began = Instant::now();
        while names(&directory).is_empty() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{out}");
        assert_eq!(names(dir.path()), ["disk.raw", "disk.vma"], "{out}");
    }
}

#[test]
fn targets_of_every_kind_are_written_or_refused() {
    let dir = with_disk();
    let path = dir.path();
    std::os::unix::fs::symlink("nowhere", path.join("dangling")).unwrap();
    std::os::unix::fs::symlink("victim", path.join("link")).unwrap();
    std::fs::write(path.join("victim"), b"old").unwrap();
    std::fs::create_dir(path.join("directory")).unwrap();
    let before = snapshot_without_links(path);
    let convert = |options: &[&str], to: &str| {
        let all = [&["convert", "-q"], options, &["disk.raw", "--to", "raw", to]].concat();
        imgtool(all).within(path).go()
    };
    convert(&[], "dangling").exits(1).says("leads nowhere");
    convert(&["--force"], "dangling").exits(1).says("leads nowhere");
    convert(&[], "link").exits(1).says("exists");
    convert(&[], "victim").exits(1).says("exists");
    convert(&[], "/dev/full").exits(1).says("No space left");
    convert(&[], "disk.raw/new.raw").exits(1);
    assert_eq!(snapshot_without_links(path), before);
    // A link that the user named is followed; it stays a link.
    convert(&["--force"], "link").exits(0);
    assert!(std::fs::symlink_metadata(path.join("link")).unwrap().is_symlink());
    assert_same(&path.join("disk.raw"), &path.join("victim"), "through the link");
    convert(&[], "directory").exits(0);
    assert_same(&path.join("disk.raw"), &path.join("directory/disk.raw"), "into the directory");
    convert(&[], "/dev/null").exits(0);
    let run = sh(path, "mkfifo pipe; cat pipe > got & $IMGTOOL convert -q disk.raw --to raw pipe && wait");
    assert!(run.status.success(), "{run:?}");
    assert_same(&path.join("disk.raw"), &path.join("got"), "through the pipe");
}

/// Names and content of the regular files.
fn snapshot_without_links(directory: &Path) -> Vec<(String, u64)> {
    let of = |name: String| std::fs::metadata(directory.join(&name)).ok().map(|meta| (name, meta.len()));
    names(directory).into_iter().filter_map(of).collect()
}
