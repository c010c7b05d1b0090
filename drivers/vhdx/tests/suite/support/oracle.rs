//! Programs that read and write VHDX and that we did not write.

use std::path::Path;
use std::process::{Command, Output};

/// Whether a program can be run. When it can't, the test is skipped visibly; in CI it fails.
pub fn available(program: &str, probe: &[&str]) -> bool {
    let there = Command::new(program).args(probe).output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(std::env::var_os("CI").is_none(), "{program} is missing, which CI must have");
        eprintln!("SKIPPED: {program} is missing");
    }
    there
}

/// Whether qemu-img is there.
pub fn has_qemu() -> bool {
    available("qemu-img", &["--version"])
}

fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// Whether dissect.hypervisor is there.
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

/// Runs qemu-img, which must succeed.
pub fn qemu_img(args: &[&str]) -> String {
    String::from_utf8_lossy(&run("qemu-img", args).stdout).into_owned()
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Compares a VHDX file with a raw file by dissect.hypervisor, skipping what is a hole in the raw
/// file beyond its first 64 MiB.
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
