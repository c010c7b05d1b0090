//! Runs the seeds and the findings through their targets.
//!
//! The test runs in its own process with little memory: an image that makes the program allocate as much as
//! it asks for ends the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use imgtool_fuzz::targets;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Maximum number of bytes that this process may allocate, besides its code. The program promises to stay
/// within 256 MiB; the rest is for the test's own threads and buffers.
const MOST_MEMORY: u64 = 320 << 20;

/// Maximum time for one input, in a debug build on a busy machine. Our limit: it catches loops whose count
/// comes from the image.
const MOST_TIME: Duration = Duration::from_secs(60);

fn inputs(kind: &str, target: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(kind).join(target);
    let mut inputs: Vec<PathBuf> = fs::read_dir(directory)
        .map(|entries| entries.map(|entry| entry.expect("a directory").path()).collect())
        .unwrap_or_default();
    inputs.sort();
    inputs
}

#[test]
fn seeds_and_findings_pass_within_limits() {
    let limit = Rlimit { current: Some(MOST_MEMORY), maximum: getrlimit(Resource::Data).maximum };
    setrlimit(Resource::Data, limit).expect("a limit");
    for target in targets::ALL {
        let seeds = inputs("seeds", target.name);
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        for input in seeds.into_iter().chain(inputs("findings", target.name)) {
            // Shown if the target panics or the process is killed.
            println!("{}", input.display());
            let started = Instant::now();
            (target.run)(&fs::read(&input).expect("readable"));
            let took = started.elapsed();
            assert!(took < MOST_TIME, "{} took {took:?}", input.display());
        }
    }
}

#[test]
fn replay_does_not_swallow_panics() {
    // The replay would be worthless if panics got lost.
    let lost = std::panic::catch_unwind(|| targets::run("no such target", b""));
    assert!(lost.is_err());
}
