//! What a program opens, as strace sees it.

use std::path::{Component, Path, PathBuf};
use std::process::Command;

use imgtool_testing::text;

use super::run::PROGRAM;

/// What the program, its loader and its runtime open for themselves, and unnamed temporary files.
const OF_THE_SYSTEM: [&str; 12] = [
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
    "/sys/",
    "/dev/null",
];

/// Runs the program with these arguments in `directory` and tells what it opened, or tried to open, that is
/// neither below the directory nor of the system; connections and programs that it started, too.
#[track_caller]
pub fn opened_outside(directory: &Path, args: &[&str]) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    Command::new("strace")
        .args(["-f", "-y", "-s", "8192", "-o", text(log.path())])
        .args(["-e", "trace=open,openat,openat2,creat,connect,execve", PROGRAM])
        .args(args)
        // cargo's: the loader would look through all of it.
        .env_remove("LD_LIBRARY_PATH")
        .current_dir(directory)
        .output()
        .unwrap();
    let trace = std::fs::read_to_string(log.path()).unwrap();
    assert!(trace.contains("execve(") && trace.contains("+++ exited"), "{args:?}: {trace}");
    let home = std::fs::canonicalize(directory).unwrap();
    // A thread that ended within a call is shown with a call of no name.
    let is_call = |line: &&str| line.contains("(") && !line.contains("resumed>") && !line.contains("???(");
    let calls = trace.lines().filter(is_call);
    calls.skip(1).filter(|call| is_outside(&home, call)).map(str::to_owned).collect()
}

fn is_outside(home: &Path, call: &str) -> bool {
    if !call.contains("open") && !call.contains("creat(") {
        return true;
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

/// A path with its dots done, links not looked at.
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
