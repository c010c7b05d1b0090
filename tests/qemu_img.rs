//! The program in the place of qemu-img: the same command lines through both.

use imgtool_testing::oracles;

mod callers;
mod commands;
mod devices;
mod pair;
mod promises;

/// True if the installed qemu-img has the flags of version 10. If it has not, reports the running test as skipped.
fn is_recent() -> bool {
    let version = String::from_utf8_lossy(&oracles::run("qemu-img", &["--version"]).stdout).into_owned();
    let major = version.strip_prefix("qemu-img version ").and_then(|rest| rest.split('.').next());
    let is_recent = major.and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 10);
    if !is_recent {
        oracles::unable("qemu-img is older than version 10", false);
    }
    is_recent
}
