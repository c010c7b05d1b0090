//! The loop that mutates seeds, runs them through their targets, and has them judged.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::judge::{self, Verdict};
use super::{FORMATS, mutate, zst};
use crate::random::Random;
use crate::scenario::Scenario;
use crate::targets;

/// Time for one input from which on it is reported.
const SLOW: Duration = Duration::from_secs(10);

/// Counts of a run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Number of inputs.
    pub inputs: u64,
    /// Number of verdicts by format and kind, and the first input of each.
    pub verdicts: BTreeMap<String, (u64, u64)>,
    /// Broken promises: the seed of the input, and a message.
    pub failures: Vec<(u64, String)>,
}

/// An input that a seed number makes.
#[derive(Debug)]
pub struct Case {
    /// Name of its target.
    pub target: &'static str,
    /// The input.
    pub input: Vec<u8>,
}

/// The seeds of the targets.
#[derive(Debug)]
pub struct Seeds(Vec<(&'static str, Vec<PathBuf>)>);

impl Seeds {
    /// Finds the seeds in the directory `fuzz/` of the project.
    ///
    /// # Errors
    /// If they can't be listed.
    pub fn find() -> io::Result<Self> {
        let mut found = Vec::new();
        for target in FORMATS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds").join(target);
            let paths = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
            let mut paths = paths.collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            found.push((target, paths));
        }
        Ok(Self(found))
    }

    /// Makes the input of a number.
    ///
    /// # Errors
    /// If a seed can't be read.
    pub fn case(&self, number: u64) -> io::Result<Case> {
        let mut random = Random::new(number ^ 0x6669_656c_6473);
        let index = random.below(self.0.len() + 1);
        let Some((target, seeds)) = self.0.get(index) else {
            return Ok(Case { target: "outer", input: zst::make(&mut random) });
        };
        let seed = fs::read(&seeds[random.below(seeds.len())])?;
        let scenario = mutate(target, &Scenario::decode(&seed), &mut random);
        Ok(Case { target, input: scenario.encode() })
    }
}

/// Runs one case and has it judged. Messages of panics are failures.
///
/// # Errors
/// If the machine fails.
pub fn run(case: &Case, scratch: &Path) -> io::Result<Result<Option<Verdict>, String>> {
    let directory = tempfile::Builder::new().prefix("fields-").tempdir_in(scratch)?;
    let started = Instant::now();
    let done = catch_unwind(AssertUnwindSafe(|| -> io::Result<Option<Verdict>> {
        targets::run(case.target, &case.input);
        let Some(image) = targets::by_name(case.target).and_then(|target| target.image) else {
            return Ok(None);
        };
        if started.elapsed() > SLOW {
            panic!("takes {:?}", started.elapsed());
        }
        let format = case.target.split('_').next().unwrap_or_default();
        judge::compare(format, &image(&case.input), directory.path()).map(Some)
    }));
    match done {
        Ok(verdict) => Ok(Ok(verdict?)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Ok(Err(text.unwrap_or_default()))
        }
    }
}

impl Tally {
    /// Runs the case of a number, and adds it.
    ///
    /// # Errors
    /// If the machine fails.
    pub fn run(&mut self, seeds: &Seeds, number: u64, scratch: &Path) -> io::Result<()> {
        let case = seeds.case(number)?;
        self.inputs += 1;
        let name = match run(&case, scratch)? {
            Err(message) => {
                self.failures.push((number, format!("{}: {message}", case.target)));
                return Ok(());
            }
            Ok(None) => "agrees".to_owned(),
            Ok(Some(verdict @ (Verdict::Differs(_) | Verdict::LeftBehind(_)))) => {
                self.failures.push((number, format!("{}: {verdict:?}", case.target)));
                return Ok(());
            }
            Ok(Some(verdict)) => format!("{verdict:?}"),
        };
        self.verdicts.entry(format!("{} {name}", case.target)).or_insert((0, number)).0 += 1;
        Ok(())
    }
}
