//! Foreign programs that read and write VHDX, for comparison.

use std::path::Path;
use std::process::{Command, Output};

/// True if a program runs. A missing program skips the test visibly; in CI it fails the test.
pub fn available(program: &str, probe: &[&str]) -> bool {
    let runs = Command::new(program).args(probe).output().is_ok_and(|output| output.status.success());
    if !runs {
        assert!(std::env::var_os("CI").is_none(), "{program} is missing, and CI must have it");
        eprintln!("SKIPPED: {program} is missing");
    }
    runs
}

/// True if qemu-img is installed.
pub fn has_qemu() -> bool {
    available("qemu-img", &["--version"])
}

/// The interpreter that has dissect.hypervisor.
fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// True if dissect.hypervisor is installed.
pub fn has_dissect() -> bool {
    available(&python(), &["-c", "import dissect.hypervisor.disk.vhdx"])
}

/// Runs a program, which must succeed.
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs qemu-img, which must succeed, and returns its output.
pub fn qemu_img(args: &[&str]) -> String {
    String::from_utf8_lossy(&run("qemu-img", args).stdout).into_owned()
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Compares a VHDX file, read by dissect.hypervisor, with a raw file. Beyond the first 64 MiB, holes of the
/// raw file are skipped.
pub fn dissect_compare(vhdx: &Path, raw: &Path) {
    let script = r"
import os, sys
from pathlib import Path
from dissect.hypervisor.disk.vhdx import VHDX
disk, raw = VHDX(Path(sys.argv[1])), open(sys.argv[2], 'rb')
size = os.path.getsize(sys.argv[2])
assert size <= disk.size < size + 4096, (disk.size, size)
def compare(start, end):
    while start < end:
        n = min(1 << 20, end - start)
        raw.seek(start); disk.seek(start)
        a, b = raw.read(n), disk.read(n)
        assert a == b, 'content differs at %d..%d' % (start, start + n)
        start += n
compare(0, min(size, 64 << 20))
at = 64 << 20
while at < size:
    try:
        at = os.lseek(raw.fileno(), at, os.SEEK_DATA)
    except OSError:
        break
    end = os.lseek(raw.fileno(), at, os.SEEK_HOLE)
    compare(at // 4096 * 4096, min(size, end))
    at = end
";
    run(&python(), &["-c", script, arg(vhdx), arg(raw)]);
}
