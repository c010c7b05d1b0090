//! Whatever goes wrong: a final name is always a finished output.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::images::{self, Image};
use crate::support::run::PROGRAM;
use crate::support::{devices, oracles};
use crate::support::{fixture, imgtool, names, sha256_file, snapshot, tempdir, text};

/// The unfinished outputs in a directory and those below it.
fn partials(directory: &Path) -> Vec<String> {
    snapshot(directory).into_keys().filter(|name| name.contains(".partial-")).collect()
}

/// A conversion of a piped archive that waits for the rest of it, its output begun.
fn stalled(out: &Path) -> Child {
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let mut child = imgtool(["convert", "-", "--to", "qcow2", text(out)]).start();
    child.stdin.as_mut().unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap();
    let began = Instant::now();
    while partials(out.parent().unwrap()).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "no output was begun");
        assert!(child.try_wait().unwrap().is_none(), "the program did not wait for its input");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

pub fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for the end, but not forever.
pub fn ends(mut child: Child, what: &str) -> std::process::ExitStatus {
    // Its input stays open: the program must not wait for more of it.
    let stdin = child.stdin.take();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{what}: the program went on");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop(stdin);
    status
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        for out in ["out.qcow2", "new/"] {
            let dir = tempdir();
            let child = stalled(&dir.path().join(out));
            kill(&child, signal);
            assert!(!ends(child, signal).success(), "{signal}");
            assert!(names(dir.path()).is_empty(), "{signal}: {:?}", names(dir.path()));
        }
    }
}

#[test]
fn a_kill_leaves_only_the_temporary_name() {
    let dir = tempdir();
    let child = stalled(&dir.path().join("out.qcow2"));
    kill(&child, "-KILL");
    assert!(!ends(child, "SIGKILL").success());
    let left = names(dir.path());
    assert!(left.iter().all(|name| name.starts_with(".out.qcow2.partial-")), "{left:?}");
}

#[test]
fn a_failed_source_takes_the_whole_archive_with_it() {
    let dir = tempdir();
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let (whole, cut) = (dir.path().join("whole.raw"), dir.path().join("cut.vma"));
    Image::hole("w", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&whole);
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("out.vma");
    imgtool(["convert", text(&whole), text(&cut), "--to", "vma", text(&out)]).go().exits(1).says("cut.vma");
    let from_pipe = imgtool(["convert", text(&whole), "-", "--to", "vma", text(&out)]);
    from_pipe.pipe_from(&cut).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}

/// Two disks in every format a directory or an archive can be made of, and how long that takes.
struct Busy {
    dir: tempfile::TempDir,
    format: &'static str,
    /// What a run that was left alone made.
    wanted: BTreeMap<String, String>,
    takes: Duration,
}

impl Busy {
    fn new(format: &'static str) -> Self {
        let dir = tempdir();
        for seed in [1, 2] {
            let image = Image::hole("x", 6 << 20).with(70_000, images::noise(seed, 5 << 20));
            image.write_raw(&dir.path().join(format!("disk{seed}.raw")));
        }
        let mut busy = Self { dir, format, wanted: BTreeMap::new(), takes: Duration::ZERO };
        let began = Instant::now();
        let mut child = busy.start();
        assert!(child.wait().unwrap().success());
        busy.takes = began.elapsed();
        busy.wanted = snapshot(busy.dir.path());
        busy.clear();
        busy
    }

    fn out(&self) -> &'static str {
        if self.format == "vma" { "out.vma" } else { "out/" }
    }

    fn start(&self) -> Child {
        imgtool(["convert", "disk1.raw", "disk2.raw", "--to", self.format, self.out()])
            .within(self.dir.path())
            .start()
    }

    fn clear(&self) {
        let out = self.dir.path().join(self.out().trim_end_matches('/'));
        if out.is_dir() {
            std::fs::remove_dir_all(out).unwrap();
        } else if out.exists() {
            std::fs::remove_file(out).unwrap();
        }
    }

    /// Runs it and sends `signal` after a share of the time that it takes.
    fn hit(&self, signal: &str, share: f64) -> Option<i32> {
        let child = self.start();
        std::thread::sleep(self.takes.mul_f64(share));
        // It may have ended already.
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
        ends(child, signal).code()
    }
}

/// How often each format is killed and interrupted, in threes: `IMGTOOL_TEST_ROUNDS`, for more than an
/// everyday run of the tests has time for.
fn rounds() -> u32 {
    std::env::var("IMGTOOL_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

/// When to strike for the nth of `count` times: shares of what a run takes, from its beginning to a
/// little behind its end.
fn moment(nth: u32, count: u32) -> f64 {
    (f64::from(nth) + 0.5) / f64::from(count) * 1.15
}

/// Every final name holds what it should, or is not there.
fn nothing_unfinished(busy: &Busy, what: &str) {
    for (name, digest) in snapshot(busy.dir.path()) {
        if !name.contains(".partial-") && digest != "dir" {
            assert_eq!(Some(&digest), busy.wanted.get(&name), "{what}: {name} is not finished");
        }
    }
}

#[test]
fn kills_at_any_moment_leave_only_temporary_names_which_the_next_run_removes() {
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let busy = Busy::new(format);
        let mut left_behind = 0;
        let kills = 3 * rounds();
        for nth in 0..kills {
            busy.hit("-KILL", moment(nth, kills));
            let what = format!("{format}: kill {nth}");
            nothing_unfinished(&busy, &what);
            let left = partials(busy.dir.path()).len();
            left_behind += left;
            let line = ["convert", "--force", "disk1.raw", "disk2.raw", "--to", format, busy.out()];
            let run = imgtool(line).within(busy.dir.path()).ok();
            assert_eq!(
                run.stderr.matches("a run that was killed had left").count(),
                left,
                "{what}: {}",
                run.stderr
            );
            assert_eq!(snapshot(busy.dir.path()), busy.wanted, "{what}");
            busy.clear();
        }
        eprintln!("{format}: {kills} kills, {left_behind} unfinished files");
    }
}

#[test]
fn signals_at_any_moment_leave_all_or_nothing() {
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let busy = Busy::new(format);
        let before = snapshot(busy.dir.path());
        let signals = 3 * rounds();
        let mut interrupted = 0;
        for nth in 0..signals {
            let signal = ["-INT", "-TERM", "-HUP"][nth as usize % 3];
            let code = busy.hit(signal, moment(nth, signals));
            interrupted += u32::from(code != Some(0));
            let after = snapshot(busy.dir.path());
            let what = format!("{format}: {signal} {nth}: exit code {code:?}");
            match code {
                Some(0) => assert_eq!(after, busy.wanted, "{what}"),
                // Before the program listens, the signal ends it: it has no code then.
                Some(1) | None => assert_eq!(after, before, "{what}"),
                Some(_) => panic!("{what}"),
            }
            busy.clear();
        }
        eprintln!("{format}: {signals} signals, {interrupted} before the end");
    }
}

#[test]
fn a_run_does_not_take_the_unfinished_output_of_another() {
    let dir = tempdir();
    let first = stalled(&dir.path().join("out.qcow2"));
    let theirs = partials(dir.path());
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&raw);
    let run = imgtool(["convert", "disk.raw", "--to", "qcow2", "out.qcow2"]).within(dir.path()).ok();
    assert!(!run.stderr.contains("killed"), "{}", run.stderr);
    assert_eq!(partials(dir.path()), theirs);
    kill(&first, "-TERM");
    assert!(!ends(first, "the first").success());
    assert_eq!(names(dir.path()), ["disk.raw", "out.qcow2"]);
}

#[test]
fn nohup_is_respected() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    let line = format!(
        "trap '' HUP; '{PROGRAM}' convert -r 8M disk.raw --to raw out.raw & sleep 0.1; kill -HUP $!; wait $!"
    );
    let status = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    assert!(status.status.success(), "{status:?}");
    assert_eq!(names(dir.path()), ["disk.raw", "out.raw"]);
}

#[test]
fn a_source_that_is_cut_while_it_is_read_is_an_error() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        Image::hole("x", 16 << 20).with(0, images::noise(1, 16 << 20)).write_raw(&raw);
        let source = dir.path().join(format!("source.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&source)]).ok();
        std::fs::remove_file(&raw).unwrap();
        let out = dir.path().join("out.qcow2");
        // Slowly: two seconds are left when it begins.
        let child = imgtool(["convert", "-r", "8M", text(&source), "--to", "qcow2", text(&out)]).start();
        let began = Instant::now();
        while partials(dir.path()).is_empty() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let file = std::fs::File::options().write(true).open(&source).unwrap();
        file.set_len(2 << 20).unwrap();
        assert_eq!(ends(child, format).code(), Some(1), "{format}");
        assert_eq!(names(dir.path()), [format!("source.{format}")]);
        std::fs::remove_file(&source).unwrap();
    }
}

#[test]
fn a_reader_that_leaves_is_an_error() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    for format in ["raw", "vma"] {
        let line = format!(
            "set -o pipefail; '{PROGRAM}' convert disk.raw --to {format} - | head -c 1000 > /dev/null"
        );
        let run = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{format}: {stderr}");
        assert!(stderr.contains("Broken pipe"), "{format}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"]);
    }
}

/// The places of panics, but for one: a thread that the system could begin but not give its stack for
/// signals ends in the standard library, before any code of ours, which calls a panic what is an abort.
fn our_panics(stderr: &str) -> Vec<&str> {
    let lines: Vec<&str> = stderr.lines().collect();
    let panics = lines.iter().enumerate().filter(|(_, line)| line.contains("panicked"));
    let ours = panics.filter(|(number, line)| {
        let message = lines.get(number + 1).copied().unwrap_or_default();
        !(line.contains("library/std/src/sys/")
            && message.starts_with("failed to allocate an alternative stack"))
    });
    ours.map(|(_, line)| *line).collect()
}

#[test]
fn only_one_panic_is_not_ours() {
    let theirs = "\nthread '<unnamed>' (7) panicked at library/std/src/sys/pal/unix/stack_overflow.rs:1:2:\n\
                  failed to allocate an alternative stack: Cannot allocate memory (os error 12)\n";
    let ours = "\nthread 'main' panicked at src/main.rs:1:2:\nfailed to allocate an alternative stack\n";
    assert_eq!(our_panics(theirs), [""; 0]);
    assert_eq!(
        our_panics(&format!("{theirs}{ours}{theirs}")),
        ["thread 'main' panicked at src/main.rs:1:2:"]
    );
}

#[test]
fn little_memory_is_enough_or_an_error_but_never_an_unfinished_output() {
    oracles::require!("prlimit");
    let dir = tempdir();
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&dir.path().join("disk.raw"));
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let out = format!("out.{format}");
        let within = |mib: u64| {
            let limit = format!("--as={}", mib << 20);
            let line = ["convert", "--force", "--threads", "8", "disk.raw", "--to", format, &out];
            Command::new("prlimit")
                .arg(limit)
                .arg(PROGRAM)
                .args(line)
                .env("SOURCE_DATE_EPOCH", "1790000000")
                // The standard library takes a trace when memory is short, runs short itself, and waits for
                // itself forever.
                .env("RUST_BACKTRACE", "0")
                .current_dir(dir.path())
                .output()
                .unwrap()
        };
        let run = within(1024);
        assert!(run.status.success(), "{format} in 1 GiB: {run:?}");
        let wanted = sha256_file(&dir.path().join(&out));
        std::fs::remove_file(dir.path().join(&out)).unwrap();
        for mib in [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512] {
            let run = within(mib);
            let stderr = String::from_utf8_lossy(&run.stderr);
            assert!(our_panics(&stderr).is_empty(), "{format} in {mib} MiB: {stderr}");
            match std::fs::remove_file(dir.path().join(&out)) {
                Ok(()) => assert!(run.status.success(), "{format} in {mib} MiB: {stderr}"),
                Err(_) => assert!(!run.status.success(), "{format} in {mib} MiB: {stderr}"),
            }
        }
        imgtool(["convert", "disk.raw", "--to", format, &out]).within(dir.path()).ok();
        assert_eq!(sha256_file(&dir.path().join(&out)), wanted);
        std::fs::remove_file(dir.path().join(&out)).unwrap();
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

/// A shell line within a file system of 8 MiB at `small`, if this user may mount one.
fn in_a_small_file_system(directory: &Path, line: &str) -> Option<std::process::Output> {
    std::fs::create_dir_all(directory.join("small")).unwrap();
    let script = format!("mount -t tmpfs -o size=8m none small || exit 99; cd small || exit 99; {line}");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "bash", "-c", &script])
        .env("IMGTOOL", PROGRAM)
        .current_dir(directory)
        .output()
        .ok()?;
    let refused =
        output.status.code() == Some(99) || String::from_utf8_lossy(&output.stderr).contains("unshare");
    if refused {
        let wanted = std::env::var_os("CI").is_some() && devices::may_administer();
        assert!(!wanted, "no right to mount a file system: {output:?}");
        oracles::skip("this user may not mount a file system");
    }
    (!refused).then_some(output)
}

#[test]
fn a_small_file_system_that_fills_up_leaves_nothing_behind() {
    let dir = tempdir();
    Image::hole("x", 24 << 20).with(0, images::noise(1, 24 << 20)).write_raw(&dir.path().join("disk.raw"));
    Image::hole("x", 24 << 20).with(0, images::noise(1, 3 << 20)).write_raw(&dir.path().join("small.raw"));
    std::fs::write(dir.path().join("zeros.raw"), vec![0; 24 << 20]).unwrap();
    let source = fixture("two-disks.vma.zst");
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        // Known before the first byte, with both numbers.
        let line = format!("$IMGTOOL convert ../disk.raw --to {format} out; code=$?; ls -A; exit $code");
        let Some(run) = in_a_small_file_system(dir.path(), &line) else { return };
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b""[..]), "{format}: {stderr}");
        assert!(stderr.contains("no room") && stderr.contains("8388608"), "{format}: {stderr}");
        // Found out on the way: from a pipe, compressed, or because the person insists.
        for how in [
            format!("$IMGTOOL convert --force ../disk.raw --to {format} out"),
            format!("cat ../disk.raw | $IMGTOOL convert --force - --to {format} new/out"),
            format!("$IMGTOOL convert --force ../disk.raw --to {format} dir/"),
        ] {
            let line = format!("mkdir new; {how}; code=$?; rmdir new; ls -A; exit $code");
            let run = in_a_small_file_system(dir.path(), &line).unwrap();
            let stderr = String::from_utf8_lossy(&run.stderr);
            assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b""[..]), "{how}: {stderr}");
            assert!(stderr.contains("No space left on device"), "{how}: {stderr}");
        }
        // What fits is not refused, however large it looks.
        for fits in ["zeros.raw", "small.raw"] {
            let line = format!("$IMGTOOL convert ../{fits} --to {format} out && ls -A");
            let run = in_a_small_file_system(dir.path(), &line).unwrap();
            assert!(run.stdout.starts_with(b"out"), "{fits} to {format}: {run:?}");
        }
    }
    let line = format!(
        "head -c 7M /dev/zero > ballast; $IMGTOOL convert '{}' --to raw out; code=$?; ls -A; exit $code",
        text(&source)
    );
    let run = in_a_small_file_system(dir.path(), &line).unwrap();
    assert_eq!((run.status.code(), run.stdout.as_slice()), (Some(1), &b"ballast\n"[..]), "{run:?}");
}

#[test]
fn a_limit_for_file_sizes_leaves_nothing_behind() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&raw);
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        // No file may grow beyond 2 MiB.
        let command = format!("ulimit -f 2048; exec '{PROGRAM}' convert disk.raw --to {format} out.{format}");
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{format}: {stderr}");
        assert!(stderr.contains(&format!("out.{format}")), "{format}: {stderr}");
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

#[test]
fn standard_output_that_is_full_is_an_error() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&raw);
    for format in ["raw", "vma"] {
        let command = format!("exec '{PROGRAM}' convert disk.raw --to {format} - > /dev/full");
        let run = Command::new("bash").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        assert_eq!(run.status.code(), Some(1), "{format}: {}", String::from_utf8_lossy(&run.stderr));
        assert_eq!(names(dir.path()), ["disk.raw"], "{format}");
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let dir = tempdir();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("file/out/");
    imgtool(["convert", text(&fixture("two-disks.vma.zst")), "--to", "raw", text(&out)]).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}
