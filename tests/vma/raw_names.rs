//! Names that are not UTF-8, in archives and in file systems: bytes that `imgtool vma` hands on as they are.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use imgtool_testing::images::noise;
use imgtool_testing::tempdir;
use imgtool_testing::vma::{ArchiveBuilder, extent, guest_content, slot};

use super::vma;
use crate::support::imgtool;
use crate::support::run::Outcome;

/// "dévice" and "cönf" in Latin-1.
const DEVICE: &[u8] = b"d\xe9vice";
const CONFIG: &[u8] = b"c\xf6nf";
const SIZE: u64 = 65_536;

/// Writes `a.vma`: two disks and a configuration whose names are not UTF-8.
fn archive(directory: &Path) {
    let mut builder = ArchiveBuilder::new();
    for (id, name) in [(1, DEVICE), (2, b"d\xe8vice")] {
        let name = builder.blob(&[name, b"\0"].concat());
        builder.devices.push((id, name, SIZE));
    }
    let name = builder.blob(&[CONFIG, b"\0"].concat());
    let data = builder.blob(b"x");
    builder.configs.push((0, name, data));
    let builder = builder.extent(extent(&[slot(1, 0, 3), slot(2, 0, 1)]));
    std::fs::write(directory.join("a.vma"), builder.build()).unwrap();
}

fn disk(id: u8, mask: u16) -> Vec<u8> {
    guest_content(id, SIZE, &[slot(id, 0, mask)])
}

fn run(directory: &Path, args: &[&[u8]]) -> Outcome {
    imgtool(["vma"]).args(args.iter().map(|arg| OsStr::from_bytes(arg))).within(directory).go()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[test]
fn list_config_and_extract_keep_the_bytes_of_names() {
    let dir = tempdir();
    archive(dir.path());
    let listed = vma(dir.path(), "list a.vma").exits(0).stdout;
    assert!(contains(&listed, b"CFG: size: 1 name: c\xf6nf\nDEV: dev_id=1 size: 65536 devname: d\xe9vice\n"));
    assert_eq!(run(dir.path(), &[b"config", b"a.vma", b"-c", CONFIG]).exits(0).stdout, b"x");
    run(dir.path(), &[b"config", b"a.vma", b"-c", b"c\xf7nf"]).exits(255);
    let said = vma(dir.path(), "extract a.vma out").exits(0);
    assert!(contains(&said.stdout, b"DEVINFO out/tmp-disk-d\xe9vice.raw 65536\n"));
    let mut made: Vec<OsString> =
        std::fs::read_dir(dir.path().join("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    made.sort();
    // The second disk looks the same as text, so it gets a number instead.
    let other = "disk-d\u{fffd}vice-2.raw".as_bytes();
    assert_eq!(made, [CONFIG, b"disk-d\xe9vice.raw", other].map(OsStr::from_bytes));
    let first = dir.path().join("out").join(OsStr::from_bytes(b"disk-d\xe9vice.raw"));
    assert!(std::fs::read(first).unwrap() == disk(1, 3));
}

#[test]
fn selects_and_maps_devices_by_the_bytes_of_names() {
    let dir = tempdir();
    archive(dir.path());
    run(dir.path(), &[b"extract", b"a.vma", b"-d", DEVICE, b"one"]).exits(0);
    assert_eq!(std::fs::read_dir(dir.path().join("one")).unwrap().count(), 2);
    let target = dir.path().join(OsStr::from_bytes(b"t\xe9.raw"));
    std::fs::write(&target, vec![0x55; SIZE as usize]).unwrap();
    std::fs::write(dir.path().join("map"), b"skip=d\xe9vice\n1:d\xe8vice=t\xe9.raw\n").unwrap();
    vma(dir.path(), "extract -r map a.vma mapped").exits(0);
    assert!(std::fs::read(&target).unwrap() == disk(2, 1));
}

#[test]
fn create_opens_and_makes_files_by_the_bytes_of_names() {
    let dir = tempdir();
    std::fs::write(dir.path().join(OsStr::from_bytes(b"d\xe9.raw")), noise(1, 5000)).unwrap();
    run(dir.path(), &[b"create", b"\xe9.vma", b"a=d\xe9.raw"]).exits(0);
    run(dir.path(), &[b"create", b"exec:cat > e\xe9.vma", b"-d", b"format=raw:a=d\xe9.raw"]).exits(0);
    for name in [&b"\xe9.vma"[..], b"e\xe9.vma"] {
        run(dir.path(), &[b"verify", name]).exits(0);
    }
    std::fs::write(dir.path().join(OsStr::from_bytes(b"d\xe9.conf")), b"x").unwrap();
    let noted = run(dir.path(), &[b"create", b"c.vma", b"-c", b"d\xe9.conf", b"a=d\xe9.raw"]).exits(0);
    noted.says("not UTF-8: it is stored as 'd\u{fffd}.conf'");
    run(dir.path(), &[b"create", b"x.vma", b"d\xe9=d\xe9.raw"]).exits(1).says("A-Z a-z 0-9 . _ -");
}
