//! Files that a program opens, as strace reports them.

use std::path::{Component, Path, PathBuf};
use std::process::Command;

use imgtool_testing::text;

use super::run::PROGRAM;

/// Path prefixes of files that the program, its loader and its runtime open for themselves.
const OF_THE_SYSTEM: [&str; 13] = [
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/lib/",
    "/lib64/",
    "/usr/lib/",
    "/usr/lib64/",
    "/usr/share/",
    "/proc/self/maps",
    "/proc/self/status",
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/sys/",
    "/dev/null",
];

/// Runs the program with these arguments in `directory`. Returns its calls that open, or try to open, a file
/// that is neither below the directory nor one of the system's, that connect to a socket, or that start a
/// program.
#[track_caller]
pub fn opened_outside(directory: &Path, args: &[&str]) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    Command::new("strace")
        .args(["-f", "-y", "-s", "8192", "-o", text(log.path())])
        .args(["-e", "trace=open,openat,openat2,creat,connect,execve", PROGRAM])
        .args(args)
        // Cargo sets this variable, and the loader would search all of its directories.
        .env_remove("LD_LIBRARY_PATH")
        .current_dir(directory)
        .output()
        .unwrap();
    let trace = std::fs::read_to_string(log.path()).unwrap();
    assert!(trace.contains("execve(") && trace.contains("+++ exited"), "{args:?}: {trace}");
    let home = std::fs::canonicalize(directory).unwrap();
    // strace shows a call without a name for a thread that ended within the call.
    let is_call = |line: &&str| line.contains("(") && !line.contains("resumed>") && !line.contains("???(");
    let calls = trace.lines().filter(is_call);
    calls.skip(1).filter(|call| is_outside(&home, call)).map(str::to_owned).collect()
}

fn is_outside(home: &Path, call: &str) -> bool {
    if !call.contains("open") && !call.contains("creat(") {
        return true;
    }
    // Such a descriptor names a file and can't read it. The sandbox makes some.
    if call.contains("O_PATH") {
        return false;
    }
    let Some(wanted) = call.split('"').nth(1) else { return true };
    let asked = resolved(home, wanted);
    // An unnamed temporary file: the directory is opened with O_TMPFILE.
    if call.contains("O_TMPFILE") {
        return asked != std::env::temp_dir() && !asked.starts_with(home);
    }
    let result = call.rsplit_once("= ").map_or("", |(_, result)| result);
    let got = result.split_once('<').and_then(|(_, path)| path.strip_suffix('>')).map(PathBuf::from);
    let is_fine = |path: &Path| {
        path.starts_with(home) || OF_THE_SYSTEM.iter().any(|prefix| text(path).starts_with(prefix))
    };
    !is_fine(&asked) || got.is_some_and(|path| !path.starts_with("/proc/") && !is_fine(&path))
}

/// Resolves `.` and `..` in a path, without following links.
fn resolved(home: &Path, path: &str) -> PathBuf {
    let mut all = PathBuf::new();
    for part in home.join(path).components() {
        match part {
            Component::ParentDir => {
                all.pop();
            }
            Component::CurDir => {}
            part => all.push(part),
        }
    }
    all
}
