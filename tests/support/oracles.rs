//! Programs that we did not write, asked about our images, and used to make theirs.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::text;

/// Whether a program can be run. If not, says so where nobody overlooks it; with `CI` set that is
/// a failure.
#[track_caller]
pub fn have(tool: &str) -> bool {
    let found = if tool == "dissect" { dissect_found() } else { program_found(tool) };
    if !found {
        missing(tool);
    }
    found
}

/// Says that the running test can't run on this machine, where nobody overlooks it: `.ci/run` counts
/// these lines and shows them at its end.
pub fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Not eprintln: the test harness keeps that to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

/// Returns from a test unless these programs can be run.
macro_rules! require {
    ($($tool:literal),+ $(,)?) => {
        if $(!$crate::support::oracles::have($tool))||+ {
            return;
        }
    };
}
pub(crate) use require;

#[track_caller]
fn missing(tool: &str) {
    static TOLD: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test} needs {tool}, which is not installed");
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.get_or_insert_default().insert(format!("{test} {tool}")) {
        skip(&format!("{tool} is not installed"));
    }
}

fn program_found(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(extra).any(|directory| directory.join(tool).is_file())
}

fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

fn dissect_found() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Command::new(python())
            .args(["-c", "import dissect.archive.vma, dissect.hypervisor"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
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

/// Runs a program.
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

/// qemu-img finds the same content in both; the longer may go on with zeros.
#[track_caller]
pub fn qemu_compare(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    run("qemu-img", &["compare", "-f", a_format, "-F", b_format, text(a), text(b)]);
}

/// qemu-img finds no fault and no leak.
#[track_caller]
pub fn qemu_check(path: &Path, format: &str) {
    run("qemu-img", &["check", "-q", "-f", format, text(path)]);
}

/// Makes an image of another format with qemu-img.
#[track_caller]
pub fn qemu_make(raw: &Path, format: &str, options: &str, to: &Path) {
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    if options.contains("-c") {
        args.push("-c");
    }
    let options = options.trim_start_matches("-c").trim();
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(raw), text(to)]);
    run("qemu-img", &args);
}

/// What `qemu-img info --output=json` says.
#[track_caller]
pub fn qemu_info(path: &Path, format: &str) -> serde_json::Value {
    let output = run("qemu-img", &["info", "--output=json", "-f", format, text(path)]);
    serde_json::from_slice(&output.stdout).expect("qemu-img prints JSON")
}

/// A device as an independent reader sees it.
#[derive(Debug, PartialEq, Eq, serde::Deserialize)]
pub struct SeenDevice {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: u64,
    /// The digest of its content.
    pub sha256: String,
}

/// An archive as an independent reader sees it.
#[derive(Debug, serde::Deserialize)]
pub struct SeenArchive {
    /// Its devices, by id.
    pub devices: Vec<SeenDevice>,
    /// Its configurations and their digests.
    pub configs: std::collections::BTreeMap<String, String>,
}

const DISSECT: &str = r#"
import hashlib, json, sys
def digest(stream, size):
    h, left = hashlib.sha256(), size
    while left:
        chunk = stream.read(min(left, 1 << 20))
        if not chunk:
            raise SystemExit(f"short read: {left} bytes are missing")
        h.update(chunk)
        left -= len(chunk)
    return h.hexdigest()
def archive(fh):
    from dissect.archive.vma import VMA
    vma = VMA(fh)
    devices = [dict(name=d.name, size=d.size, sha256=digest(d.open(), d.size)) for d in vma.devices()]
    return dict(devices=devices, configs={n: hashlib.sha256(vma.config(n)).hexdigest() for n in vma.configs()})
def disk(kind, fh):
    if kind == "vhdx":
        from dissect.hypervisor.disk.vhdx import VHDX
        disk = stream = VHDX(fh)
    else:
        from dissect.hypervisor.disk.qcow2 import QCow2
        disk = QCow2(fh)
        stream = disk.open()
    return dict(name="", size=disk.size, sha256=digest(stream, disk.size))
kind, *paths = sys.argv[1:]
seen = []
for path in paths:
    with open(path, "rb") as fh:
        try:
            seen.append(archive(fh) if kind == "vma" else disk(kind, fh))
        except BaseException as e:
            raise SystemExit(f"{path}: {e!r}")
print(json.dumps(seen))
"#;

#[track_caller]
fn dissect<T: serde::de::DeserializeOwned>(kind: &str, paths: &[&Path]) -> Vec<T> {
    let mut args = vec!["-c", DISSECT, kind];
    args.extend(paths.iter().map(|path| text(path)));
    let output = run(&python(), &args);
    serde_json::from_slice(&output.stdout).expect("the script prints JSON")
}

/// What dissect.archive finds in VMA archives.
#[track_caller]
pub fn dissect_vma(paths: &[&Path]) -> Vec<SeenArchive> {
    dissect("vma", paths)
}

/// What dissect.hypervisor finds in disk images of one format ("vhdx", "qcow2").
#[track_caller]
pub fn dissect_disks(kind: &str, paths: &[&Path]) -> Vec<SeenDevice> {
    dissect(kind, paths)
}
