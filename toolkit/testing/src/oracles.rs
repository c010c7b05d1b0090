//! Independent programs that check our images and make images for our drivers.
//!
//! If a program is missing, the test prints `SKIPPED: …` on standard error and passes; with `CI` set in the
//! environment, it fails. `.ci/run` lists and counts these lines.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

mod cot;
mod dissect;
mod libvhdi;
mod libvmdk;
mod libyal;
mod qemu;

pub use cot::{cot_reads, cot_samples};
pub use dissect::{
    SeenArchive, SeenDevice, dissect_compare_vhdx, dissect_disks, dissect_ovf_disks, dissect_read_qcow2,
    dissect_reads_vdi_chain, dissect_vma,
};
pub use libvhdi::{VhdiMount, vhdi_info};
pub use libvmdk::{VmdkMount, seven_zip};
pub use libyal::libyal_reads_child;
pub use qemu::{assert_clean_qcow2, qemu_check, qemu_compare, qemu_img, qemu_info, qemu_make};

/// True if a program is installed (for `dissect`, `libyal` and `cot`: if the packages can be imported; for `ovmf`
/// and `kernel`: if the firmware and [`kernel_package`] are there). If it is not, reports the running test as skipped, or fails it with `CI` set.
#[track_caller]
pub fn have(tool: &str) -> bool {
    let found = match tool {
        "dissect" => dissect::dissect_found(),
        "libyal" => libyal::libyal_found(),
        "cot" => cot::cot_found(),
        "ovmf" => ovmf().iter().all(|path| path.is_file()),
        "kernel" => kernel_package().is_some_and(|path| path.is_dir()),
        _ => program_found(tool),
    };
    if !found {
        missing(tool);
    }
    found
}

/// Returns the firmware of the package `ovmf`: its code, and the variables of a new machine.
pub fn ovmf() -> [PathBuf; 2] {
    ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"].map(PathBuf::from)
}

/// Returns the directory with the unpacked package of a Linux kernel, which `.ci/run` names in the environment.
pub fn kernel_package() -> Option<PathBuf> {
    std::env::var_os("IMGTOOL_TEST_KERNEL").map(PathBuf::from)
}

/// Reports on standard error that the running test is skipped. `.ci/run` lists and counts these lines.
fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Not `eprintln!`: the test harness discards its output if the test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

/// Reports the running test as skipped for lack of something that no package provides, such as a device or
/// the right to mount. With `CI` set, fails if `must_work`: if the device and the rights exist.
#[track_caller]
pub fn unable(why: &str, must_work: bool) {
    assert!(!(must_work && std::env::var_os("CI").is_some()), "{why}");
    skip(why);
}

/// Returns from a test unless these programs can be run.
#[macro_export]
macro_rules! require {
    ($($tool:literal),+ $(,)?) => {
        if $(!$crate::oracles::have($tool))||+ {
            return;
        }
    };
}

#[track_caller]
fn missing(tool: &str) {
    static REPORTED: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test} needs {tool}, which is not installed");
    let mut reported = REPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    if reported.get_or_insert_default().insert(format!("{test} {tool}")) {
        skip(&format!("{tool} is not installed"));
    }
}

fn program_found(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&path).chain(extra).any(|directory| directory.join(tool).is_file())
}

/// Runs a program that must succeed.
#[track_caller]
pub fn run(tool: &str, args: &[&str]) -> Output {
    let output = try_run(tool, args);
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a program, which may fail.
#[track_caller]
pub fn try_run(tool: &str, args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    Command::new(tool)
        .args(args)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{tool}: {e}"))
}

/// Runs a program in a directory and returns its exit code (-1 after a signal), standard output and standard
/// error.
#[track_caller]
pub fn try_run_in(tool: &str, directory: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(tool).args(args).current_dir(directory).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs a program in a directory and returns its standard output. The program must succeed.
#[track_caller]
pub fn run_in(tool: &str, directory: &Path, args: &[&str]) -> String {
    let (code, out, err) = try_run_in(tool, directory, args);
    assert_eq!(code, 0, "{tool} {args:?}: {out}{err}");
    out
}

/// Runs a program in a directory and returns the JSON that it prints. The program must succeed.
#[track_caller]
pub fn run_json_in(tool: &str, directory: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&run_in(tool, directory, args)).unwrap()
}

/// Runs a program with `input` as standard input and returns its standard output. The program must succeed.
#[track_caller]
pub fn filter(tool: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{tool}: {e}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    let output = std::thread::scope(|scope| {
        // A program may close its input before it has read all of it.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("wait for the program")
    });
    assert!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
