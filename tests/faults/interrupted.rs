//! Kills and signals at any moment of a conversion.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{assert_same, fixture, names, snapshot, tempdir, text};

use super::{ends, kill, partials};
use crate::support::imgtool;
use crate::support::run::{PROGRAM, Run};

/// Starts a conversion that has begun its output and waits for the rest of a piped archive.
fn stalled(out: &Path) -> Child {
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let mut child = imgtool(["convert", "-", "--to", "qcow2", text(out)]).start();
    child.stdin.as_mut().unwrap().write_all(&bytes[..bytes.len() / 2]).unwrap();
    wait_for_partials(out.parent().unwrap());
    assert!(child.try_wait().unwrap().is_none(), "the program did not wait for its input");
    child
}

/// Waits until the program has begun an output.
fn wait_for_partials(directory: &Path) {
    let began = Instant::now();
    while partials(directory).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "no output was begun");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn interrupt_leaves_no_files() {
    for (signal, signo) in [
        ("-INT", 2),
        ("-TERM", 15),
        ("-HUP", 1),
        ("-QUIT", 3),
        ("-ALRM", 14),
        ("-USR2", 12),
        ("-VTALRM", 26),
        ("-PROF", 27),
        ("-XCPU", 24),
    ] {
        for out in ["out.qcow2", "new/"] {
            let dir = tempdir();
            let child = stalled(&dir.path().join(out));
            kill(&child, signal);
            assert_eq!(ends(child, signal).signal(), Some(signo), "{signal}");
            assert!(names(dir.path()).is_empty(), "{signal}: {:?}", names(dir.path()));
        }
    }
}

/// The first signal lets the work stop; the second one does not wait for it.
#[test]
fn second_interrupt_leaves_no_files() {
    let dir = tempdir();
    let child = stalled(&dir.path().join("out.qcow2"));
    kill(&child, "-INT");
    // The program may have died of the first one.
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).stderr(Stdio::null()).status();
    let signal = ends(child, "two signals").signal();
    assert!(matches!(signal, Some(2 | 15)), "{signal:?}");
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}

/// A shell stops its loop at Ctrl-C only if the program died of it.
#[test]
fn interrupt_ends_the_loop_of_a_shell() {
    let dir = tempdir();
    Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&dir.path().join("disk.raw"));
    let line = format!(
        "for i in 1 2 3; do '{PROGRAM}' convert -r 1M disk.raw --to raw out-$i.raw; echo again; done; echo next"
    );
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", "setsid", "--wait", "bash", "-c", &line]).current_dir(dir.path());
    let shell = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_partials(dir.path());
    // As a terminal does: to the whole group of processes, here the one of bash.
    let output = Command::new("pgrep").args(["-P", &shell.id().to_string()]).output().unwrap();
    let bash = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let group = if bash.is_empty() { shell.id().to_string() } else { bash };
    let group = Command::new("ps").args(["-o", "pgid=", "-p", &group]).output().unwrap();
    let group = String::from_utf8_lossy(&group.stdout).trim().to_owned();
    assert!(Command::new("kill").args(["-INT", "--", &format!("-{group}")]).status().unwrap().success());
    let output = shell.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "the loop went on");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

/// qemu-img documents SIGUSR1 as a request for the progress.
#[test]
fn usr1_prints_the_progress_and_ends_nothing() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    for flags in ["", "-q", "-p"] {
        let line = format!(
            "'{PROGRAM}' convert {flags} -r 4M disk.raw --to raw out.raw & sleep 0.4; kill -USR1 $!; sleep 0.1; \
             kill -USR1 $!; wait $!"
        );
        let output = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{flags}: {output:?}");
        assert_eq!(said.matches("imgtool: convert: ").count(), 2, "{flags}: {said}");
        assert!(said.contains("% of 4 MiB"), "{flags}: {said}");
        assert_same(&dir.path().join("disk.raw"), &dir.path().join("out.raw"), flags);
        std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    }
    // In the place of qemu-img, the report has its form.
    let line = format!(
        "'{PROGRAM}' --compat convert -r 4M -f raw -O raw disk.raw out.raw & sleep 0.4; kill -USR1 $!; wait $!"
    );
    let output = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(said.starts_with("    (") && said.ends_with("/100%)\n") && said.lines().count() == 1, "{said}");
    // A command without progress goes on as well.
    let mut child = imgtool(["info", "-"]).within(dir.path()).start();
    std::thread::sleep(Duration::from_millis(200));
    kill(&child, "-USR1");
    // It needs only the beginning.
    let _ = child.stdin.as_mut().unwrap().write_all(&std::fs::read(dir.path().join("disk.raw")).unwrap());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn signals_that_the_parent_ignores_stay_ignored() {
    let dir = tempdir();
    Image::hole("x", 4 << 20).with(0, images::noise(1, 4 << 20)).write_raw(&dir.path().join("disk.raw"));
    for signal in ["INT", "TERM", "HUP", "USR1"] {
        let line = format!(
            "trap '' {signal}; '{PROGRAM}' convert -r 8M disk.raw --to raw out.raw & sleep 0.2; \
             kill -{signal} $!; wait $!"
        );
        let output = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{signal}: {output:?}");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("convert: "), "{signal}: {output:?}");
        std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    }
}

#[test]
fn kill_leaves_only_the_partial_file() {
    let dir = tempdir();
    let child = stalled(&dir.path().join("out.qcow2"));
    kill(&child, "-KILL");
    assert_eq!(ends(child, "SIGKILL").signal(), Some(9));
    let left = names(dir.path());
    assert!(left.len() == 1 && left[0].starts_with(".out.qcow2.partial-"), "{left:?}");
}

/// The formats, one of them with images of two files each.
const FORMATS: [&str; 5] = ["raw", "qcow2", "vhdx", "vma", "vmdk -o subformat=vmfs"];

/// A conversion of two disks to one format, with options, and its duration.
struct Busy {
    dir: tempfile::TempDir,
    format: &'static str,
    /// Content of the directory after an uninterrupted run.
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
        let mut child = busy.run().start();
        assert!(child.wait().unwrap().success());
        busy.takes = began.elapsed();
        busy.wanted = snapshot(busy.dir.path());
        busy.clear();
        busy
    }

    fn out(&self) -> &'static str {
        if self.format == "vma" { "out.vma" } else { "out/" }
    }

    fn run(&self) -> Run {
        let run = imgtool(["convert", "disk1.raw", "disk2.raw", self.out(), "--to"]);
        run.args(self.format.split(' ')).within(self.dir.path())
    }

    fn clear(&self) {
        let out = self.dir.path().join(self.out().trim_end_matches('/'));
        if out.is_dir() {
            std::fs::remove_dir_all(out).unwrap();
        } else if out.exists() {
            std::fs::remove_file(out).unwrap();
        }
    }

    /// Runs the conversion, sends `signal` at `moment`, and returns its exit status.
    fn hit(&self, signal: &str, moment: Moment) -> ExitStatus {
        let child = match moment {
            Moment::Begun => {
                let child = self.run().args(["-r", "4M"]).start();
                wait_for_partials(self.dir.path());
                child
            }
            Moment::Share(share) => {
                let child = self.run().start();
                std::thread::sleep(self.takes.mul_f64(share));
                child
            }
        };
        // The program may have ended already.
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
        ends(child, signal)
    }
}

/// Returns the number of rounds of three kills and three signals for each format: `IMGTOOL_TEST_ROUNDS`, by
/// default 1.
fn rounds() -> u32 {
    std::env::var("IMGTOOL_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

/// The moment at which a signal is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    /// After an output has begun. The run is too slow to end before the signal.
    Begun,
    /// After this share of the duration of a run, which may have ended by then.
    Share(f64),
}

/// Returns the moment that is never too late, then `count` moments from the start of a run to a little after
/// its end.
fn moments(count: u32) -> impl Iterator<Item = (usize, Moment)> {
    let share = move |nth| Moment::Share((f64::from(nth) + 0.5) / f64::from(count) * 1.15);
    std::iter::once(Moment::Begun).chain((0..count).map(share)).enumerate()
}

/// Asserts that every file with a final name has its full content.
fn nothing_unfinished(busy: &Busy, what: &str) {
    for (name, digest) in snapshot(busy.dir.path()) {
        if !name.contains(".partial-") && digest != "dir" {
            assert_eq!(Some(&digest), busy.wanted.get(&name), "{what}: {name} is not finished");
        }
    }
}

#[test]
fn next_run_removes_partial_files_of_killed_runs() {
    for format in FORMATS {
        let busy = Busy::new(format);
        let mut left_behind = 0;
        let kills = 3 * rounds();
        for (nth, moment) in moments(kills) {
            busy.hit("-KILL", moment);
            let what = format!("{format}: kill {nth}, {moment:?}");
            nothing_unfinished(&busy, &what);
            let left = partials(busy.dir.path()).len();
            assert!(left > 0 || moment != Moment::Begun, "{what}: nothing is left");
            left_behind += left;
            let run = busy.run().args(["--force"]).ok();
            assert_eq!(run.stderr.matches("left by a killed run").count(), left, "{what}: {}", run.stderr);
            assert_eq!(snapshot(busy.dir.path()), busy.wanted, "{what}");
            busy.clear();
        }
        eprintln!("{format}: {kills} kills, {left_behind} unfinished files");
    }
}

#[test]
fn signals_at_any_time_leave_all_outputs_or_none() {
    for format in FORMATS {
        let busy = Busy::new(format);
        let before = snapshot(busy.dir.path());
        let signals = 3 * rounds();
        let mut interrupted = 0;
        for (nth, moment) in moments(signals) {
            let (signal, signo) = [("-INT", 2), ("-TERM", 15), ("-HUP", 1)][nth % 3];
            let status = busy.hit(signal, moment);
            interrupted += u32::from(!status.success());
            let after = snapshot(busy.dir.path());
            let what = format!("{format}: {signal} {nth}, {moment:?}: {status}");
            assert!(status.signal() == Some(signo) || moment != Moment::Begun, "{what}");
            if status.success() {
                assert_eq!(after, busy.wanted, "{what}");
            } else {
                assert_eq!((status.signal(), after), (Some(signo), before.clone()), "{what}");
            }
            busy.clear();
        }
        eprintln!("{format}: {signals} signals, {interrupted} before the end");
    }
}

#[test]
fn keeps_the_partial_file_of_a_concurrent_run() {
    let dir = tempdir();
    let first = stalled(&dir.path().join("out.qcow2"));
    let theirs = partials(dir.path());
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&raw);
    let run = imgtool(["convert", "disk.raw", "--to", "qcow2", "out.qcow2"]).within(dir.path()).ok();
    assert!(!run.stderr.contains("killed"), "{}", run.stderr);
    assert_eq!(partials(dir.path()), theirs);
    kill(&first, "-TERM");
    assert_eq!(ends(first, "the first").signal(), Some(15));
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
