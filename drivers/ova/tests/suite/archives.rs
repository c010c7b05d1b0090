//! Tar archives: their members, names and lengths, and what is refused.

use imgtool_core::ErrorKind;
use imgtool_ova::{OvaDriver, TarDriver};
use imgtool_testing::images::{noise, prose};
use imgtool_testing::oracles::{filter, run_in};
use imgtool_testing::tar::{Tar, header, pax_record, set_size, sum};
use imgtool_testing::{require, tempdir};

use crate::{bytes_of, contents, open, refusal, small, vmdk};

fn disk() -> Vec<u8> {
    prose(1, 512 * 40)
}

#[test]
fn disks_are_the_files_with_their_extensions() {
    let archive = Tar::new()
        .member("d/", b'5', b"")
        .file("./README.txt", b"notes")
        .file("d/one.raw", &disk())
        .file("./two.VMDK", &vmdk(&small(2)))
        .build();
    let found = contents(&TarDriver, &archive);
    assert_eq!(found[0], ("one".to_owned(), disk()));
    assert_eq!(found[1], ("two".to_owned(), bytes_of(&small(2))));
    assert_eq!(found.len(), 2);
}

#[test]
fn the_only_file_is_the_disk_if_its_content_is_one() {
    let mut boots = disk();
    boots[510..512].copy_from_slice(b"\x55\xaa");
    assert_eq!(contents(&TarDriver, &Tar::new().file("data", &boots).build())[0].1, boots);
    let error = refusal(&TarDriver, &Tar::new().file("letter", b"Dear reader, this is no disk").build());
    assert_eq!(error.kind(), ErrorKind::WrongFormat, "{error}");
    let error = refusal(&TarDriver, &Tar::new().file("a.txt", b"a").file("b.txt", b"b").build());
    let remedy = error.remedy().expect("advice").to_string();
    assert!(
        error.to_string().contains("no file in the archive") && remedy.contains("'a.txt', 'b.txt'"),
        "{error}"
    );
    assert_eq!(refusal(&TarDriver, &Tar::new().build()).kind(), ErrorKind::WrongFormat);
    assert!(refusal(&TarDriver, &Tar::new().member("d/", b'5', b"").build()).to_string().contains("no file"));
}

/// A guest may have written the beginning of its disk.
#[test]
fn the_content_of_a_raw_disk_decides_nothing() {
    let inner = vmdk(&small(0));
    assert_eq!(contents(&TarDriver, &Tar::new().file("disk.raw", &inner).build())[0].1, inner);
}

#[test]
fn reads_long_names_and_sizes_of_gnu_tar_and_pax() {
    let long = format!("{}/disk.raw", "d".repeat(200));
    let gnu =
        Tar::new().member("././@LongLink", b'L', format!("{long}\0").as_bytes()).file("cut", &disk()).build();
    let records = format!("{}{}", pax_record("path", &long), pax_record("size", &disk().len().to_string()));
    let mut other_size = header("cut", b'0', 0);
    set_size(&mut other_size, 5);
    sum(&mut other_size);
    let pax = Tar::new()
        .member("pax_global_header", b'g', pax_record("comment", "x").as_bytes())
        .member("PaxHeaders/cut", b'x', records.as_bytes())
        .raw(&other_size, &disk())
        .build();
    let mut base256 = header("disk.raw", b'0', 0);
    base256[124..128].copy_from_slice(b"\x80\0\0\0");
    base256[128..136].copy_from_slice(&(disk().len() as u64).to_be_bytes());
    sum(&mut base256);
    let base256 = Tar::new().raw(&base256, &disk()).build();
    for (archive, what) in [(gnu, "GNU"), (pax, "pax"), (base256, "base 256")] {
        assert_eq!(contents(&TarDriver, &archive), [("disk".to_owned(), disk())], "{what}");
    }
}

#[test]
fn reads_sparse_files_with_long_maps() {
    let mut disk = vec![0; 4096 * 200];
    let runs: Vec<(usize, usize)> = (0..60).map(|number| (4096 * 3 * number, 4096)).collect();
    for (at, len) in &runs {
        disk[*at..at + len].copy_from_slice(&noise(*at as u64, *len));
    }
    let archive = Tar::new().sparse("disk.raw", &disk, &runs).file("behind", b"x").build();
    assert_eq!(contents(&TarDriver, &archive), [("disk".to_owned(), disk.clone())]);
    let source = open(&TarDriver, &archive).unwrap();
    let extents = source.access().random().unwrap().extents(imgtool_core::DeviceId(0), 0..12_288).unwrap();
    assert_eq!(extents.iter().map(|extent| extent.len).collect::<Vec<_>>(), [4096, 8192]);
    for (runs, what) in [
        (&[(4096, 4096), (0, 4096)][..], "does not ascend"),
        (&[(0, 8192), (4096, 4096)], "does not ascend"),
        (&[(4096 * 199, 4096), (4096 * 200, 0)], ""),
    ] {
        let archive = Tar::new().sparse("disk.raw", &disk, runs).build();
        match what {
            "" => drop(open(&TarDriver, &archive).unwrap()),
            what => assert!(refusal(&TarDriver, &archive).to_string().contains(what), "{what}"),
        }
    }
    let mut short = Tar::new().sparse("disk.raw", &disk, &[(0, 4096)]).build();
    let mut block: [u8; 512] = short[..512].try_into().unwrap();
    block[483..495].copy_from_slice(b"00000007777\0");
    sum(&mut block);
    short[..512].copy_from_slice(&block);
    assert!(refusal(&TarDriver, &short).to_string().contains("leaves the file"));
}

#[test]
fn reads_the_archives_of_gnu_tar() {
    require!("tar", "gzip");
    let dir = tempdir();
    let mut disk = vec![0; 3 << 20];
    disk[..70_000].copy_from_slice(&noise(1, 70_000));
    disk[2 << 20..(2 << 20) + 9000].copy_from_slice(&prose(2, 9000));
    std::fs::write(dir.path().join("full.raw"), &disk).unwrap();
    run_in("cp", dir.path(), &["--sparse=always", "full.raw", "disk.raw"]);
    for format in ["ustar", "oldgnu", "gnu", "pax"] {
        run_in("tar", dir.path(), &[&format!("--format={format}"), "-cf", "a.tar", "disk.raw"]);
        let archive = std::fs::read(dir.path().join("a.tar")).unwrap();
        assert!(contents(&TarDriver, &archive)[0].1 == disk, "{format}");
    }
    for format in ["oldgnu", "gnu"] {
        run_in("tar", dir.path(), &[&format!("--format={format}"), "-S", "-cf", "a.tar", "disk.raw"]);
        let archive = std::fs::read(dir.path().join("a.tar")).unwrap();
        assert!(archive.len() < 1 << 20, "sparse");
        assert!(contents(&TarDriver, &archive)[0].1 == disk, "{format}");
    }
    run_in("tar", dir.path(), &["--format=pax", "-S", "-cf", "a.tar", "disk.raw"]);
    let error = refusal(&TarDriver, &std::fs::read(dir.path().join("a.tar")).unwrap());
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let packed = filter("gzip", &["-c"], &disk);
    assert!(contents(&TarDriver, &Tar::new().file("disk.raw.gz", &packed).build())[0].1 == disk);
    let error = refusal(&TarDriver, &Tar::new().file("disk.raw.gz", &disk).build());
    assert!(error.to_string().contains("stated to be compressed with gzip"), "{error}");
}

#[test]
fn refuses_hostile_archives() {
    let mut huge = header("disk.raw", b'0', 0);
    huge[124..136].copy_from_slice(b"\x80\0\0\0\x80\0\0\0\0\0\0\0");
    sum(&mut huge);
    let mut no_number = header("disk.raw", b'0', 0);
    no_number[124..136].copy_from_slice(b"0000000008x\0");
    sum(&mut no_number);
    let mut damaged = header("disk.raw", b'0', 3);
    damaged[0] ^= 1;
    let pax = |key: &str, value: &str| {
        Tar::new().member("x", b'x', pax_record(key, value).as_bytes()).file("disk.raw", b"x").build()
    };
    let global = Tar::new().member("x", b'g', pax_record("path", "y").as_bytes()).file("disk.raw", b"x");
    let long = |len: usize| Tar::new().member("x", b'L', &vec![b'a'; len]).file("disk.raw", b"x").build();
    for (archive, what) in [
        (Tar::new().file("disk.raw", b"a").file("./disk.raw", b"b").build(), "two members are called"),
        (Tar::new().file("../disk.raw", b"a").build(), "leads out"),
        (Tar::new().file("a/../../disk.raw", b"a").build(), "leads out"),
        (Tar::new().file("/disk.raw", b"a").build(), "leads out"),
        (pax("path", "a/../b.raw"), "leads out"),
        (pax("size", "9223372036854775808"), "below 2^63"),
        (pax("size", "9223372036854775807"), "ends within a member"),
        (pax("size", "-1"), "below 2^63"),
        (pax("GNU.sparse.major", "1"), "sparse file in a form"),
        (global.build(), "the same name or size"),
        (Tar::new().raw(&huge, b"").build(), "below 2^63"),
        (Tar::new().raw(&no_number, b"").build(), "below 2^63"),
        (Tar::new().raw(&damaged, b"abc").build(), "checksum"),
        (Tar::new().member("link", b'2', b"abc").build(), "is a link, but has"),
        (Tar::new().member("null", b'3', b"abc").build(), "is a device or FIFO, but has"),
        (Tar::new().member("d", b'5', b"abc").build(), "is a directory, but has"),
        (Tar::new().file("", b"a").build(), "has no name"),
        (long(5000), "the limit is 4096"),
        (Tar::new().member("x", b'x', &vec![b'1'; 70_000]).build(), "the limit is 65536"),
        (Tar::new().member("x", b'L', b"name").without_end(), "behind an extended header"),
    ] {
        let error = refusal(&TarDriver, &archive);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn leaves_out_links_and_devices_with_a_note() {
    let archive = Tar::new()
        .member("disk.vmdk", b'2', b"")
        .member("null", b'3', b"")
        .member("pipe", b'6', b"")
        .file("disk.raw", &disk())
        .build();
    let source = open(&TarDriver, &archive).unwrap();
    let notes = source.info().notes.join("\n");
    assert!(notes.contains("'disk.vmdk' is a link, and is left out"), "{notes}");
    assert!(notes.contains("'null' is a device or FIFO") && notes.contains("'pipe'"), "{notes}");
    assert_eq!(source.info().devices.len(), 1);
}

#[test]
fn notes_what_follows_the_end() {
    let whole = Tar::new().file("disk.raw", &disk());
    let notes = |archive: &[u8]| open(&TarDriver, archive).unwrap().info().notes.join("\n");
    assert_eq!(notes(&whole.clone().build()), "");
    assert_eq!(notes(&[whole.clone().build(), vec![0; 9000]].concat()), "");
    assert!(notes(&whole.clone().without_end()).contains("without an end mark"));
    assert!(notes(&[whole.clone().build(), b"junk".to_vec()].concat()).contains("other bytes follow"));
    let lone = [whole.without_end(), vec![0; 512], Tar::new().file("x", b"y").build()].concat();
    assert!(refusal(&TarDriver, &lone).to_string().contains("zeros lies before a member"));
}

#[test]
fn the_first_name_tells_packages_from_other_archives() {
    use imgtool_core::Driver;
    let probe =
        |archive: &[u8]| (OvaDriver.probe(archive, None).is_some(), TarDriver.probe(archive, None).is_some());
    assert_eq!(probe(&Tar::new().file("vm.OVF", b"<").build()), (true, false));
    assert_eq!(probe(&Tar::new().member("./", b'5', b"").file("vm.ovf", b"<").build()), (true, false));
    assert_eq!(probe(&Tar::new().file("disk.raw", &disk()).file("vm.ovf", b"<").build()), (false, true));
    let long = format!("{}.ovf", "a".repeat(150));
    assert_eq!(
        probe(&Tar::new().member("x", b'L', long.as_bytes()).file("cut", b"<").build()),
        (true, false)
    );
    let mut damaged = Tar::new().file("vm.ovf", b"<").build();
    damaged[0] ^= 1;
    assert_eq!(probe(&damaged), (false, false));
}
