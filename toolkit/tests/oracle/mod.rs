//! Oracles: programs by others whose results the tests compare with.

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

/// Runs `program` with `input` and returns its output; `None`, with a printed line, if it is not installed.
///
/// # Panics
/// If the program fails, or is missing while `CI` is set.
pub fn run(program: &str, args: &[&str], input: &[u8]) -> Option<Vec<u8>> {
    let spawned = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            assert!(std::env::var_os("CI").is_none(), "{program} is missing");
            println!("SKIPPED: {program} is not installed");
            return None;
        }
        spawned => spawned.expect("start the oracle"),
    };
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let output = std::thread::scope(|scope| {
        // A program may close its input before the end.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("wait for the oracle")
    });
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    Some(output.stdout)
}
