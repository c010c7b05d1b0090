//! Shrinking of a chain that breaks a promise.

use std::path::Path;
use std::time::{Duration, Instant};

use super::content::{Content, Fill};
use super::program::Program;
use super::run::{self, Failure, Totals};
use super::spec::{Chain, Step};

/// Maximum time for shrinking one chain.
const MOST_TIME: Duration = Duration::from_secs(90);

/// Returns a shorter chain that fails in the same way, and its failure.
pub fn shrink(program: &Program, chain: &Chain, failure: &Failure, scratch: &Path) -> (Chain, Failure) {
    let started = Instant::now();
    let mut best = (chain.clone(), failure.clone());
    best.0.steps.truncate(failure.step + 1);
    'again: while started.elapsed() < MOST_TIME {
        for mut candidate in candidates(&best.0) {
            candidate.settle();
            if candidate == best.0 || candidate.disks.is_empty() || candidate.steps.is_empty() {
                continue;
            }
            if let Err(failure) = run::run(program, &candidate, scratch, &mut Totals::default())
                && failure.kind == best.1.kind
            {
                best = (candidate, failure);
                continue 'again;
            }
            if started.elapsed() > MOST_TIME {
                break;
            }
        }
        break;
    }
    best
}

/// Returns chains that are simpler in one respect, the boldest first.
fn candidates(chain: &Chain) -> Vec<Chain> {
    let mut found = Vec::new();
    for index in 0..chain.steps.len() {
        let mut shorter = chain.clone();
        shorter.steps.remove(index);
        found.push(shorter);
    }
    for index in 0..chain.disks.len() {
        let mut fewer = chain.clone();
        fewer.disks.remove(index);
        found.push(fewer);
        for disk in simpler_disks(&chain.disks[index]) {
            let mut simpler = chain.clone();
            simpler.disks[index] = disk;
            found.push(simpler);
        }
    }
    for index in 0..chain.steps.len() {
        for step in simpler_steps(&chain.steps[index]) {
            let mut simpler = chain.clone();
            simpler.steps[index] = step;
            found.push(simpler);
        }
    }
    found
}

fn simpler_disks(disk: &Content) -> Vec<Content> {
    let mut found = Vec::new();
    for index in 0..disk.runs.len() {
        let mut fewer = disk.clone();
        fewer.runs.remove(index);
        found.push(fewer);
    }
    let end = disk.runs.iter().map(|run| run.at + run.len).max().unwrap_or(0).max(1);
    for size in [end, disk.size / 2, disk.size / 512 * 512, disk.size / 65_536 * 65_536] {
        if size > 0 && size < disk.size {
            let mut smaller = Content { size, runs: disk.runs.clone() };
            smaller.runs.retain(|run| run.at < size);
            smaller.runs.iter_mut().for_each(|run| run.len = run.len.min(size - run.at));
            found.push(smaller);
        }
    }
    for index in 0..disk.runs.len() {
        let run = disk.runs[index];
        for (at, len, fill) in [
            (run.at, run.len / 2, run.fill),
            (run.at, 1, run.fill),
            (run.at / 65_536 * 65_536, run.len, run.fill),
            (run.at, run.len, Fill::Noise),
        ] {
            let mut simpler = disk.clone();
            let len = len.max(1);
            if (at, len, fill) != (run.at, run.len, run.fill) {
                simpler.runs[index] = super::content::Run { fill, at, len };
                found.push(simpler);
            }
        }
    }
    found
}

fn simpler_steps(step: &Step) -> Vec<Step> {
    let mut found = Vec::new();
    let mut with = |change: &dyn Fn(&mut Step)| {
        let mut simpler = step.clone();
        change(&mut simpler);
        found.push(simpler);
    };
    with(&|step| step.refusal = None);
    with(&|step| step.packed.clear());
    with(&|step| step.from_pipe = false);
    with(&|step| step.to_pipe = false);
    with(&|step| step.in_place = None);
    with(&|step| step.in_place = step.in_place.map(|_| 0));
    with(&|step| step.outer.clear());
    with(&|step| step.threads = 1);
    for index in 0..step.options.len() {
        with(&|step| drop(step.options.remove(index)));
    }
    with(&|step| {
        step.format = "raw".to_owned();
        step.options.clear();
    });
    found
}
