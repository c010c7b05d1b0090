//! libvhdi-python and libvmdk-python, independent readers of chains of images.

use std::path::Path;
use std::process::{Command, Stdio};

use super::run;
use crate::text;

fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// True if the interpreter `IMGTOOL_TEST_PYTHON`, by default python3, can import both modules.
pub(super) fn libyal_found() -> bool {
    let mut command = Command::new(python());
    let command = command.args(["-c", "import pyvhdi, pyvmdk"]).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

const SCRIPT: &str = r#"
import sys
module, child, parent, raw = sys.argv[1:5]
if module == "pyvhdi":
    import pyvhdi
    make = pyvhdi.file
    opened = lambda disk: None
else:
    import pyvmdk
    make = pyvmdk.handle
    opened = lambda disk: disk.open_extent_data_files()
below, disk = make(), make()
for handle, path in (below, parent), (disk, child):
    handle.open(path)
    opened(handle)
disk.set_parent(below)
size, at = disk.get_media_size(), 0
with open(raw, "rb") as expected:
    while at < size:
        n = min(1 << 20, size - at)
        want = expected.read(n)
        assert size - at - n < 4096 or len(want) == n, "the disk is larger: %d bytes" % size
        assert disk.read_buffer_at_offset(n, at) == want.ljust(n, b"\0"), "content differs at %d..%d" % (at, at + n)
        at += n
    assert not expected.read(1), "the disk is smaller: %d bytes" % size
"#;

/// Asserts that libvhdi ("pyvhdi") or libvmdk ("pyvmdk") reads the content of a raw file, possibly rounded
/// up, from an image over its parent.
#[track_caller]
pub fn libyal_reads_child(module: &str, child: &Path, parent: &Path, raw: &Path) {
    run(&python(), &["-c", SCRIPT, module, text(child), text(parent), text(raw)]);
}
