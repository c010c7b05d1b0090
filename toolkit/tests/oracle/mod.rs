//! Programs that we did not write, as judges.

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

/// What `program` makes of `input`; `None` (and a visible line) where it is not installed, which CI
/// does not let pass.
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
    let mut stdin = child.stdin.take().expect("it is piped");
    let output = std::thread::scope(|scope| {
        // A program that does not read its input closes it early: that is its affair.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("wait for the oracle")
    });
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    Some(output.stdout)
}
