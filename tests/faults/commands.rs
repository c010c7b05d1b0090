//! Signals and limits during every command, whether it writes or only reads.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

use imgtool_testing::{names, require, snapshot, tempdir, text};

use super::{ends, kill, remove, sh, with_disk};
use crate::support::imgtool;

/// Every command that writes, with the name of its output.
const WRITING: [(&[&str], &str); 6] = [
    (&["create", "-f", "raw", "-o", "preallocation=full", "new.raw", "8M"], "new.raw"),
    (&["create", "-f", "qcow2", "-o", "preallocation=full", "new.qcow2", "8M"], "new.qcow2"),
    (&["create", "-f", "vhdx", "new.vhdx", "8M"], "new.vhdx"),
    (&["vma", "create", "new.vma", "disk=disk.raw"], "new.vma"),
    (&["vma", "extract", "disk.vma", "out"], "out"),
    (&["convert", "disk.raw", "--to", "vma", "new.vma.zst"], "new.vma.zst"),
];

#[test]
fn file_size_limit_stops_every_writing_command() {
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
fn signal_during_write_or_flush_leaves_all_outputs_or_none() {
    require!("strace");
    let dir = with_disk();
    let before = names(dir.path());
    let (mut interrupted, mut finished) = (0, 0);
    for (args, made) in WRITING {
        imgtool(args).within(dir.path()).ok();
        let wanted = names(dir.path());
        remove(&dir.path().join(made));
        for (number, when) in [(0, "pwrite64,pwritev"), (1, "fsync"), (2, "pwrite64,pwritev,fsync")] {
            let (signal, signo) = [("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 1)][number];
            let line = format!(
                "strace -f -o /dev/null -e trace={when} -e inject={when}:signal={signal}:when=2 $IMGTOOL {}",
                args.join(" ")
            );
            let run = sh(dir.path(), &line);
            let what = format!("{line}: {run:?}");
            match run.status.code() {
                Some(0) => {
                    assert_eq!(names(dir.path()), wanted, "{what}");
                    if !["new.raw", "out"].contains(&made) {
                        imgtool(["check", made]).within(dir.path()).ok();
                    }
                    remove(&dir.path().join(made));
                    finished += 1;
                }
                // strace dies like the program that it runs.
                _ if run.status.signal() == Some(signo) => {
                    assert_eq!(names(dir.path()), before, "{what}");
                    interrupted += 1;
                }
                _ => panic!("{what}"),
            }
        }
    }
    // The second flush is of the directory, when the outputs have their names. A signal at a write races with
    // the rest of the work.
    assert!(interrupted > 0 && finished > 0, "{interrupted} interrupted, {finished} finished");
}

/// Waits until a program has a handler for `signal`: SigCgt in proc(5).
fn wait_until_listening(child: &Child, signal: i32) {
    let path = format!("/proc/{}/status", child.id());
    let began = Instant::now();
    loop {
        let status = std::fs::read_to_string(&path).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        if u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal - 1) & 1 == 1 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "it does not listen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A command that only reads removes its temporary file, the copy of an image from a pipe.
#[test]
fn signal_ends_every_read_only_command() {
    let dir = with_disk();
    imgtool(["convert", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    imgtool(["create", "-f", "qcow2", "huge.qcow2", "64T"]).within(dir.path()).ok();
    let bytes = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let before = snapshot(dir.path());
    // Commands that read content handle signals before they die of them; a signal kills the others at once.
    let lines: [(&[&str], bool); 8] = [
        (&["info", "-"], false),
        (&["check", "-"], false),
        (&["map", "-"], false),
        (&["measure", "--to", "qcow2", "-"], false),
        (&["checksum", "-"], true),
        (&["compare", "-", "disk.raw"], true),
        // Hashing all those zeros takes days.
        (&["checksum", "huge.qcow2"], true),
        (&["vma", "verify", "-"], true),
    ];
    for (number, (line, listens)) in lines.into_iter().enumerate() {
        let (signal, signo) = [("-INT", 2), ("-TERM", 15), ("-HUP", 1)][number % 3];
        let temporary = tempdir();
        let run = imgtool(line).within(dir.path()).env("TMPDIR", text(temporary.path()));
        let mut child = run.start();
        if line.contains(&"-") && line[0] != "vma" {
            // More than a pipe holds: the program has read some of it and waits for the rest.
            child.stdin.as_mut().unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap();
        }
        if listens {
            wait_until_listening(&child, signo);
        }
        assert!(child.try_wait().unwrap().is_none(), "{line:?} did not wait");
        kill(&child, signal);
        let status = ends(child, signal);
        assert_eq!(status.signal(), Some(signo), "{line:?}: {status}");
        assert!(names(temporary.path()).is_empty(), "{line:?}");
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
}

#[test]
fn signal_during_a_slow_flush_leaves_all_outputs_or_none() {
    require!("strace");
    let dir = with_disk();
    let before = names(dir.path());
    for (args, made) in WRITING {
        // The delay is longer than the program waits for its work to stop.
        let line = format!(
            "strace -f -o /dev/null -e trace=fsync -e inject=fsync:signal=SIGTERM:delay_exit=3000000:when=1 \
             $IMGTOOL {}",
            args.join(" ")
        );
        let run = sh(dir.path(), &line);
        // The program notices the signal while it flushes or while it renames the outputs. In the second
        // case, it finishes.
        match run.status.code() {
            Some(0) => remove(&dir.path().join(made)),
            _ => assert_eq!(run.status.signal(), Some(15), "{line}: {run:?}"),
        }
        assert_eq!(names(dir.path()), before, "{line}: {run:?}");
    }
}
