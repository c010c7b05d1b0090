//! Conversions on file systems that lack renames with flags or links, or that report failure for what they
//! have done: the exit code and the files agree, nothing is left behind, and old files stay whole.

use imgtool_testing::images::{self, Image};
use imgtool_testing::{tempdir, text};

use crate::support::imgtool;
use crate::support::run::Outcome;
use crate::support::shaky::{Habit, Shaky, When};

/// Ways in which a file system can name files, from the best to the worst.
const NAMINGS: [&[Habit]; 4] =
    [&[], &[Habit::NoLinks], &[Habit::NoRenameFlags], &[Habit::NoRenameFlags, Habit::NoLinks]];

/// An odd file system, a disk and an archive of two disks outside of it.
struct Bench {
    shaky: Shaky,
    dir: tempfile::TempDir,
    disk: Vec<u8>,
}

impl Bench {
    fn new() -> Option<Self> {
        let shaky = Shaky::mount()?;
        let dir = tempdir();
        let raw = dir.path().join("disk.raw");
        Image::hole("x", 300_032).with(4096, images::noise(1, 200_000)).write_raw(&raw);
        imgtool(["vma", "create", "two.vma", "a=disk.raw", "b=disk.raw"]).within(dir.path()).ok();
        let disk = std::fs::read(&raw).unwrap();
        Some(Self { shaky, dir, disk })
    }

    fn run(&self, habits: &[Habit], args: &[&str]) -> Outcome {
        self.shaky.adopt(habits);
        let run = imgtool(args).within(self.dir.path()).go();
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        run
    }

    /// Converts the disk to `x.raw`.
    fn one(&self, habits: &[Habit], flags: &[&str]) -> Outcome {
        let out = self.shaky.path("x.raw");
        self.run(habits, &[&["convert"], flags, &["disk.raw", text(&out)]].concat())
    }

    /// Converts the archive to `a.raw` and `b.raw`.
    fn two(&self, habits: &[Habit], flags: &[&str]) -> Outcome {
        let out = self.shaky.path("");
        self.run(habits, &[&["convert"], flags, &["two.vma", "--to", "raw", text(&out)]].concat())
    }

    /// Puts old files in the place of the outputs, and only these.
    fn put_old(&self, names: &[&str]) {
        self.clear();
        names.iter().for_each(|name| self.shaky.put(name, format!("old {name}").into_bytes()));
    }

    fn clear(&self) {
        for name in self.shaky.names() {
            self.shaky.take(&name);
        }
    }

    /// Asserts that there are only these files, each with the content of the disk.
    #[track_caller]
    fn holds_new(&self, names: &[&str], what: &str) {
        assert_eq!(self.shaky.names(), names, "{what}");
        for name in names {
            assert!(self.shaky.content(name).as_ref() == Some(&self.disk), "{what}: {name} is not the disk");
        }
    }

    /// Asserts that there are only these files, each with its old content.
    #[track_caller]
    fn holds_old(&self, names: &[&str], what: &str) {
        assert_eq!(self.shaky.names(), names, "{what}");
        for name in names {
            let old = format!("old {name}").into_bytes();
            assert_eq!(self.shaky.content(name), Some(old), "{what}: {name}");
        }
    }
}

#[test]
fn names_outputs_without_rename_flags_and_links() {
    let Some(bench) = Bench::new() else { return };
    for habits in NAMINGS {
        let what = format!("{habits:?}");
        bench.clear();
        let run = bench.one(habits, &[]).ends_with(0);
        bench.holds_new(&["x.raw"], &what);
        let is_unsafe = habits.len() == 2;
        assert_eq!(run.stderr.contains("can neither rename"), is_unsafe, "{what}: {}", run.stderr);
        bench.put_old(&["x.raw"]);
        bench.one(habits, &[]).ends_with(1).says("already exists");
        bench.holds_old(&["x.raw"], &what);
        bench.one(habits, &["--force"]).ends_with(0);
        bench.holds_new(&["x.raw"], &what);
        // An empty file is no conflict.
        bench.clear();
        bench.shaky.put("x.raw", Vec::new());
        bench.one(habits, &[]).ends_with(0);
        bench.holds_new(&["x.raw"], &what);
        bench.clear();
        bench.two(habits, &[]).ends_with(0);
        bench.holds_new(&["a.raw", "b.raw"], &what);
        bench.put_old(&["a.raw", "b.raw"]);
        bench.two(habits, &["--force"]).ends_with(0);
        bench.holds_new(&["a.raw", "b.raw"], &what);
    }
}

#[test]
fn refuses_file_systems_without_renames_before_the_copy() {
    let Some(bench) = Bench::new() else { return };
    bench.put_old(&["x.raw"]);
    bench.shaky.plan(None, None);
    bench.one(&[Habit::NoRenames, Habit::NoLinks], &["--force"]).ends_with(1).says("can't rename a file in");
    bench.holds_old(&["x.raw"], "no renames");
    assert_eq!(bench.shaky.writes(), 0, "content was written before the refusal");
}

#[test]
fn completed_renames_that_report_failure_count_as_done() {
    let Some(bench) = Bench::new() else { return };
    for habits in NAMINGS {
        for old in [&[][..], &["a.raw", "b.raw"]] {
            for when in [When::Always, When::Nth(1), When::Nth(2), When::Nth(3)] {
                let habits = [habits, &[Habit::RenameReportsFailure(when)]].concat();
                let what = format!("{habits:?} over {old:?}");
                bench.put_old(old);
                let run = bench.two(&habits, if old.is_empty() { &[] } else { &["--force"] });
                assert_eq!(run.status.code(), Some(0), "{what}: {}", run.stderr);
                bench.holds_new(&["a.raw", "b.raw"], &what);
            }
        }
    }
}

#[test]
fn completed_links_that_report_failure_count_as_done() {
    let Some(bench) = Bench::new() else { return };
    let habits = [Habit::NoRenameFlags, Habit::LinkReportsFailure];
    bench.two(&habits, &[]).ends_with(0);
    bench.holds_new(&["a.raw", "b.raw"], "new");
    bench.put_old(&["a.raw", "b.raw"]);
    bench.two(&habits, &["--force"]).ends_with(0);
    bench.holds_new(&["a.raw", "b.raw"], "replaced");
}

/// A reserved name whose inode can't be read is free again after the run.
#[test]
fn unreadable_attributes_leave_no_reservation() {
    let Some(bench) = Bench::new() else { return };
    let habits = [Habit::NoRenameFlags, Habit::NoLinks];
    bench.one(&habits, &[]).ends_with(0);
    let (reads, mut failed) = (bench.shaky.attributes(), 0);
    for nth in 1..=reads {
        bench.clear();
        let run = bench.one(&[&habits[..], &[Habit::AttributesFail(When::Nth(nth))]].concat(), &[]);
        let is_done = run.status.success();
        failed += u64::from(!is_done);
        let expected = is_done.then_some(&bench.disk);
        assert!(bench.shaky.content("x.raw").as_ref() == expected, "read {nth} of {reads}: {}", run.stderr);
    }
    assert!(failed > 0, "none of {reads} reads failed");
}

#[test]
fn failed_rename_leaves_all_disks_or_none() {
    let Some(bench) = Bench::new() else { return };
    let mut failed = 0;
    for habits in NAMINGS {
        for old in [&[][..], &["a.raw", "b.raw"]] {
            for nth in 1.. {
                let habits = [habits, &[Habit::RenameFails(When::Nth(nth))]].concat();
                let what = format!("{habits:?} over {old:?}");
                bench.put_old(old);
                let run = bench.two(&habits, if old.is_empty() { &[] } else { &["--force"] });
                if run.status.code() == Some(0) {
                    assert!(bench.shaky.renames() < nth, "{what}: a failed rename was ignored");
                    bench.holds_new(&["a.raw", "b.raw"], &what);
                    break;
                }
                assert_eq!(run.status.code(), Some(1), "{what}: {}", run.stderr);
                failed += 1;
                let keeps_old = !habits.contains(&Habit::NoRenameFlags) || !habits.contains(&Habit::NoLinks);
                if keeps_old || old.is_empty() || !run.stderr.contains("could not keep the old file") {
                    bench.holds_old(old, &what);
                } else {
                    // The first disk has replaced its old file for good, and the message says so.
                    assert_eq!(bench.shaky.names(), ["a.raw", "b.raw"], "{what}");
                    assert!(bench.shaky.content("a.raw").as_ref() == Some(&bench.disk), "{what}");
                    assert_eq!(bench.shaky.content("b.raw"), Some(b"old b.raw".to_vec()), "{what}");
                }
            }
        }
    }
    eprintln!("{failed} failed renames");
    assert!(failed >= 4 * 2 + 3, "{failed}");
}

#[test]
fn single_late_flush_failure_leaves_no_output() {
    let Some(bench) = Bench::new() else { return };
    for habit in [Habit::FirstFlushFails, Habit::FirstDirectoryFlushFails] {
        for old in [&[][..], &["a.raw", "b.raw"]] {
            bench.put_old(old);
            let flags: &[&str] = if old.is_empty() { &[] } else { &["--force"] };
            bench.two(&[habit], flags).ends_with(1).says("can't flush");
            bench.holds_old(old, &format!("{habit:?} over {old:?}"));
        }
    }
}

#[test]
fn respects_case_insensitive_names() {
    let Some(bench) = Bench::new() else { return };
    let habits = [Habit::IgnoresCase];
    imgtool(["vma", "create", "case.vma", "a=disk.raw", "A=disk.raw"]).within(bench.dir.path()).ok();
    let out = bench.shaky.path("");
    bench.run(&habits, &["convert", "case.vma", "--to", "raw", text(&out)]).ends_with(0);
    let names = bench.shaky.names();
    assert_eq!(names.len(), 2, "{names:?}");
    bench.put_old(&["x.raw"]);
    let (lower, upper) = (bench.shaky.path("x.raw"), bench.shaky.path("X.RAW"));
    bench.run(&habits, &["convert", "disk.raw", text(&upper)]).ends_with(1).says("already exists");
    bench.run(&habits, &["convert", "--force", text(&lower), text(&upper)]).ends_with(1).says("same file");
    bench.holds_old(&["x.raw"], "case");
}

#[test]
fn rejects_unstable_bytes_and_false_lengths() {
    let Some(bench) = Bench::new() else { return };
    bench.one(&[Habit::UnstableReads], &["--verify"]).ends_with(1);
    bench.holds_old(&[], "unstable reads of the output");
    bench.shaky.put("disk.raw", bench.disk.clone());
    let source = bench.shaky.path("disk.raw");
    let line = ["convert", "-f", "raw", text(&source), "out.raw"];
    bench.run(&[Habit::LongLengths], &line).ends_with(1);
    assert!(!bench.dir.path().join("out.raw").exists());
}
