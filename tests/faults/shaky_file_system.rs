//! Conversions on a file system whose n-th read or write fails, is served in part or is slow: between any two
//! formats, the output is right to the last byte, or there is none.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::Duration;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{tempdir, text};

use crate::support::imgtool;
use crate::support::shaky::{Fault, Shaky, When};

const FORMATS: [&str; 4] = ["raw", "qcow2", "vhdx", "vma"];

/// A faulty file system with a disk in every format, and the expected output of each conversion.
struct Bench {
    shaky: Shaky,
    /// Expected output by the formats of source and target.
    wanted: BTreeMap<(&'static str, &'static str), Vec<u8>>,
}

impl Bench {
    fn new() -> Option<Self> {
        let shaky = Shaky::mount()?;
        let dir = tempdir();
        let raw = dir.path().join("disk.raw");
        Image::hole("x", 3 << 20).with(70_000, images::noise(1, 1 << 20)).write_raw(&raw);
        let mut wanted = BTreeMap::new();
        for from in FORMATS {
            let name = format!("disk.{from}");
            if from != "raw" {
                imgtool(["convert", "disk.raw", "--to", from, &name]).within(dir.path()).ok();
            }
            shaky.put(&name, std::fs::read(dir.path().join(&name)).unwrap());
        }
        let bench = Self { shaky, wanted: BTreeMap::new() };
        for from in FORMATS {
            for to in FORMATS {
                bench.shaky.plan(None, None);
                assert_eq!(bench.convert(from, to), Some(0), "{from} to {to}");
                wanted.insert((from, to), bench.shaky.take("out.img").unwrap());
            }
        }
        Some(Self { wanted, ..bench })
    }

    fn convert(&self, from: &str, to: &str) -> Option<i32> {
        let (source, target) = (self.shaky.path(&format!("disk.{from}")), self.shaky.path("out.img"));
        let run = imgtool(["convert", "--threads", "2", text(&source), "--to", to, text(&target)]).go();
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        run.status.code()
    }

    /// Runs a conversion with faults. Either the output is right, or there is none and the exit code is 1;
    /// nothing else is left.
    #[track_caller]
    fn run(&self, (from, to): Pair, reads: Option<Hit>, writes: Option<Hit>) -> Ran {
        self.shaky.plan(reads, writes);
        let code = self.convert(from, to);
        let hits = self.shaky.hits();
        let what = format!("{from} to {to}, reads {reads:?}, writes {writes:?}: {hits} hit, {code:?}");
        let out = self.shaky.take("out.img");
        match code {
            Some(0) => assert!(out.as_ref() == self.wanted.get(&(from, to)), "{what}: another output"),
            Some(1) => assert!(out.is_none(), "{what}: there is an output"),
            _ => panic!("{what}"),
        }
        assert_eq!(self.shaky.names().len(), FORMATS.len(), "{what}: {:?}", self.shaky.names());
        Ran { hits, failed: code == Some(1) }
    }

    /// Runs a conversion in which one call is hit; it fails exactly if that call does. Returns true if there
    /// was such
    /// a call.
    #[track_caller]
    fn nth(&self, pair: Pair, reads: Option<Hit>, writes: Option<Hit>) -> bool {
        let ran = self.run(pair, reads, writes);
        let fails = [reads, writes].into_iter().flatten().any(|(fault, _)| fault == Fault::Fails);
        assert_eq!(ran.failed, fails && ran.hits > 0, "{pair:?}: reads {reads:?}, writes {writes:?}");
        ran.hits > 0
    }
}

/// Formats of source and target.
type Pair = (&'static str, &'static str);
type Hit = (Fault, When);

struct Ran {
    hits: u64,
    failed: bool,
}

fn pairs() -> impl Iterator<Item = (&'static str, &'static str)> {
    FORMATS.into_iter().flat_map(|from| FORMATS.into_iter().map(move |to| (from, to)))
}

#[test]
fn short_reads_and_writes_do_not_change_the_output() {
    let Some(bench) = Bench::new() else { return };
    let mut hits = 0;
    for pair in pairs() {
        for fault in [Fault::Short, Fault::VeryShort] {
            let always = Some((fault, When::Always));
            let ran = bench.run(pair, always, always);
            assert!(!ran.failed, "{pair:?}: {fault:?}");
            hits += ran.hits;
        }
    }
    eprintln!("{hits} calls served in part");
    assert!(hits > 16 * 256, "{hits}");
}

/// Covers every read and every write of each format, one after the other.
#[test]
fn handles_a_fault_in_every_single_read_and_write() {
    let Some(bench) = Bench::new() else { return };
    let from_each = FORMATS.into_iter().flat_map(|from| [(from, "raw"), (from, "vma")]);
    let to_each = FORMATS.into_iter().flat_map(|to| [("raw", to), ("vma", to)]);
    // Failures last, like those of a broken disk: the kernel splits a call, and if only the second part
    // failed, the program would see a short read and try again.
    for (fault, when) in
        [(Fault::Short, When::Nth as fn(u64) -> When), (Fault::Slow, When::Nth), (Fault::Fails, When::From)]
    {
        let (mut reads, mut writes) = (0, 0);
        for pair in from_each.clone() {
            reads += (1..).take_while(|nth| bench.nth(pair, Some((fault, when(*nth))), None)).count();
        }
        for pair in to_each.clone() {
            writes += (1..).take_while(|nth| bench.nth(pair, None, Some((fault, when(*nth))))).count();
        }
        eprintln!("{fault:?}: {reads} reads, {writes} writes");
        assert!(reads >= 8 * 8 && writes >= 8 * 4, "{fault:?}: {reads} reads, {writes} writes");
    }
}

/// Lengths in bytes of the writes and reads on a pipe, none of them as the program would like.
const MORSELS: [usize; 6] = [1, 4095, 17, 511, 4096, 1000];

#[test]
fn small_pipe_transfers_do_not_change_the_output() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 1 << 20).with(70_000, images::noise(1, 300_000)).write_raw(&raw);
    for from in FORMATS {
        let source = dir.path().join(format!("disk.{from}"));
        if from != "raw" {
            imgtool(["convert", text(&raw), "--to", from, text(&source)]).ok();
        }
        let bytes = std::fs::read(&source).unwrap();
        for to in ["raw", "vma"] {
            let line = ["convert", "-", "--to", to, "-"];
            let wanted = imgtool(line).pipe_from(&source).ok().stdout;
            let mut child = imgtool(line).start_piped();
            let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
            let got = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut rest = bytes.as_slice();
                    for len in MORSELS.into_iter().cycle() {
                        let (morsel, behind) = rest.split_at(len.min(rest.len()));
                        stdin.write_all(morsel).unwrap();
                        rest = behind;
                        if rest.is_empty() {
                            break;
                        }
                    }
                    drop(stdin);
                });
                let mut got = Vec::new();
                for len in MORSELS.into_iter().cycle() {
                    let before = got.len();
                    (&mut stdout).take(len as u64).read_to_end(&mut got).unwrap();
                    if got.len() == before {
                        break;
                    }
                    // Keeps the pipe full most of the time.
                    std::thread::sleep(Duration::from_micros(50));
                }
                got
            });
            assert!(child.wait().unwrap().success(), "{from} to {to}");
            assert!(got == wanted, "{from} to {to}: another output");
        }
    }
}
