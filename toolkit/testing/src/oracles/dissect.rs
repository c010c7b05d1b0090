//! dissect.archive and dissect.hypervisor, independent readers in Python.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::run;
use crate::text;

fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// True if the interpreter `IMGTOOL_TEST_PYTHON`, by default python3, can import both packages.
pub(super) fn dissect_found() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Command::new(python())
            .args(["-c", "import dissect.archive.vma, dissect.hypervisor"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}

/// A device as an independent reader sees it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct SeenDevice {
    /// Device id in an archive; 0 for a disk image.
    #[serde(default)]
    pub id: u32,
    /// Device name; empty for a disk image.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

/// An archive as an independent reader sees it.
#[derive(Debug, Deserialize)]
pub struct SeenArchive {
    /// Devices, by id.
    pub devices: Vec<SeenDevice>,
    /// SHA-256 of each configuration file, by its name.
    pub configs: BTreeMap<String, String>,
}

/// Returns the names of the files of all disks of an OVF descriptor, in the order of its hardware.
#[track_caller]
pub fn dissect_ovf_disks(descriptor: &Path) -> Vec<String> {
    const SCRIPT: &str = "import json, sys\n\
        from dissect.hypervisor.descriptor.ovf import OVF\n\
        print(json.dumps(list(OVF(open(sys.argv[1])).disks())))";
    let output = run(&python(), &["-c", SCRIPT, text(descriptor)]);
    serde_json::from_slice(&output.stdout).unwrap()
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
    devices = [dict(id=d.id, name=d.name, size=d.size, sha256=digest(d.open(), d.size)) for d in vma.devices()]
    return dict(devices=devices, configs={n: hashlib.sha256(vma.config(n)).hexdigest() for n in vma.configs()})
def disk(kind, fh):
    if kind == "vhdx":
        from dissect.hypervisor.disk.vhdx import VHDX
        disk = stream = VHDX(fh)
    elif kind == "vdi":
        from dissect.hypervisor.disk.vdi import VDI
        disk = VDI(fh)
        stream = disk.open()
    elif kind == "vhd":
        from dissect.hypervisor.disk.vhd import VHD
        disk = stream = VHD(fh)
    elif kind == "hds":
        from dissect.hypervisor.disk.hdd import HDS
        disk = stream = HDS(fh)
    elif kind == "vmdk":
        from pathlib import Path
        from dissect.hypervisor.disk.vmdk import VMDK
        disk = stream = VMDK(Path(fh.name))
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

/// Runs a script with arguments and returns its standard output.
#[track_caller]
fn python_script(script: &str, args: &[&str]) -> Vec<u8> {
    run(&python(), &[&["-c", script], args].concat()).stdout
}

#[track_caller]
fn dissect<T: DeserializeOwned>(kind: &str, paths: &[&Path]) -> Vec<T> {
    let mut args = vec![kind];
    args.extend(paths.iter().map(|path| text(path)));
    serde_json::from_slice(&python_script(DISSECT, &args)).expect("the script prints JSON")
}

/// Returns the content of VMA archives as dissect.archive reads it.
#[track_caller]
pub fn dissect_vma(paths: &[&Path]) -> Vec<SeenArchive> {
    dissect("vma", paths)
}

/// Returns the content of disk images of one format ("vhdx", "vhd", "vdi", "vmdk", "hds", "qcow2") as
/// dissect.hypervisor reads it.
#[track_caller]
pub fn dissect_disks(kind: &str, paths: &[&Path]) -> Vec<SeenDevice> {
    dissect(kind, paths)
}

const COMPARE: &str = r"
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

/// Asserts that dissect.hypervisor reads the content of a raw file from a VHDX file. Holes of the raw file
/// beyond its first 64 MiB are not compared.
#[track_caller]
pub fn dissect_compare_vhdx(vhdx: &Path, raw: &Path) {
    python_script(COMPARE, &[text(vhdx), text(raw)]);
}

const VDI_CHAIN: &str = r"
import sys
from dissect.hypervisor.disk.vdi import VDI
*images, raw = [open(path, 'rb') for path in sys.argv[1:]]
stream = None
for image in images:
    disk = VDI(image, parent=stream)
    stream = disk.open()
# One block at a time: dissect.hypervisor 3.21 takes neighbours in the disk for neighbours in the file.
for at in range(0, disk.size, disk.block_size):
    n = min(disk.block_size, disk.size - at)
    assert stream.read(n) == raw.read(n).ljust(n, b'\0'), 'content differs at %d..%d' % (at, at + n)
assert not raw.read(1), 'the disk is smaller: %d bytes' % disk.size
";

/// Asserts that dissect.hypervisor reads the content of a raw file, possibly rounded up, from the last of
/// `chain`, VDI images with blocks of one size of which each is the parent of the next.
#[track_caller]
pub fn dissect_reads_vdi_chain(chain: &[&Path], raw: &Path) {
    let mut args: Vec<&str> = chain.iter().map(|path| text(path)).collect();
    args.push(text(raw));
    python_script(VDI_CHAIN, &args);
}

const RANGES: &str = "
import sys
from dissect.hypervisor.disk.qcow2 import QCow2
disk = QCow2(open(sys.argv[1], 'rb'))
for part in sys.argv[2:]:
    start, length = map(int, part.split(':'))
    stream = disk.open() if hasattr(disk, 'open') else disk
    stream.seek(start)
    sys.stdout.buffer.write(stream.read(length))
";

/// Returns the bytes in `ranges` of a qcow2 disk, concatenated, as dissect.hypervisor reads them.
#[track_caller]
pub fn dissect_read_qcow2(path: &Path, ranges: &[Range<u64>]) -> Vec<u8> {
    let parts: Vec<String> =
        ranges.iter().map(|range| format!("{}:{}", range.start, range.end - range.start)).collect();
    let mut args = vec![text(path)];
    args.extend(parts.iter().map(String::as_str));
    python_script(RANGES, &args)
}
