//! Archives of one disk, as Google Compute Engine imports them: written, and read in one pass.

use std::io::Cursor;
use std::sync::Arc;

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, CreateOptions, Driver, ErrorKind, ImageSource, Input, Location, OpenOptions, Result,
};
use imgtool_ova::TarDriver;
use imgtool_testing::conformance;
use imgtool_testing::images::noise;
use imgtool_testing::oracles::{filter, run_in};
use imgtool_testing::tar::Tar;
use imgtool_testing::{require, tempdir};

use crate::{bytes_of, contents, options, small};

fn open(bytes: &[u8], options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    TarDriver
        .open(Input::from_reader(Location::Stdin, Box::new(Cursor::new(bytes.to_vec()))).unwrap(), options)
}

/// Reads the only disk in one pass.
fn content(source: &dyn ImageSource) -> Result<Vec<u8>> {
    let mut disk = vec![0xee; usize::try_from(source.info().devices[0].size).unwrap()];
    let Access::Stream(stream) = source.access() else { panic!("not in one pass") };
    let pool = BufferPool::new();
    while let Some(piece) = lock(stream).next_piece(&pool)? {
        let start = usize::try_from(piece.start).unwrap();
        let target = &mut disk[start..start + usize::try_from(piece.len).unwrap()];
        match &piece.data {
            Some(data) => target.copy_from_slice(data),
            None => target.fill(0),
        }
    }
    Ok(disk)
}

#[test]
fn gnu_tar_reads_what_is_written() {
    require!("tar");
    for seed in [0, 1, 19] {
        let image = small(seed);
        let options = CreateOptions { source_date_epoch: Some(1_700_000_000), ..CreateOptions::default() };
        let archive = conformance::make_bytes(&TarDriver, &options, &image);
        assert_eq!(&archive[257..265], b"ustar  \0");
        assert!(archive.len().is_multiple_of(10_240), "{}", archive.len());
        let dir = tempdir();
        std::fs::write(dir.path().join("a.tar"), &archive).unwrap();
        let listed = run_in("tar", dir.path(), &["--utc", "-tvf", "a.tar"]);
        let size = image.devices[0].0.size;
        assert_eq!(
            listed.split_whitespace().collect::<Vec<_>>(),
            ["-rw-r--r--", "0/0", &size.to_string(), "2023-11-14", "22:13", "disk.raw"]
        );
        run_in("tar", dir.path(), &["-xf", "a.tar"]);
        assert_eq!(std::fs::read(dir.path().join("disk.raw")).unwrap(), bytes_of(&image));
        assert_eq!(contents(&TarDriver, &archive), [("disk".to_owned(), bytes_of(&image))]);
        let source = open(&archive, &OpenOptions::default()).unwrap();
        assert_eq!(content(&*source).unwrap(), bytes_of(&image));
        assert!(source.notes().is_empty(), "{:?}", source.notes());
    }
}

#[test]
fn archives_of_gnu_tar_are_read_in_one_pass() {
    require!("tar");
    let dir = tempdir();
    let mut disk = vec![0; 3 << 20];
    disk[..5000].copy_from_slice(&noise(1, 5000));
    disk[2 << 20..][..100_000].copy_from_slice(&noise(2, 100_000));
    std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
    for form in ["--format=oldgnu", "--format=ustar", "--format=pax"] {
        run_in("tar", dir.path(), &[form, "-cf", "a.tar", "disk.raw"]);
        let source = open(&std::fs::read(dir.path().join("a.tar")).unwrap(), &options()).unwrap();
        assert_eq!(content(&*source).unwrap(), disk, "{form}");
        let mut facts = source.info().facts.iter();
        let stated = facts.find(|fact| fact.key == "tar-format").expect("the form").value.clone();
        // GNU tar needs no header of pax for this file, unless its time has a fraction of a second.
        let form = form.trim_start_matches("--format=");
        assert!(stated == form || form == "pax" && stated == "ustar", "{stated}");
    }
    let sparse = Tar::new().sparse("disk.raw", &disk, &[(0, 8192), (2 << 20, 102_400)]).build();
    assert_eq!(content(&*open(&sparse, &options()).unwrap()).unwrap(), disk);
}

#[test]
fn what_follows_the_disk_is_noticed() {
    let disk = bytes_of(&small(1));
    let with_note = Tar::new().file("disk.raw", &disk).file("README", b"hello").build();
    assert_eq!(content(&*open(&with_note, &options()).unwrap()).unwrap(), disk);
    let two = Tar::new().file("disk.raw", &disk).file("other.raw", &disk).build();
    let error = content(&*open(&two, &options()).unwrap()).expect_err("refused");
    assert!(error.to_string().contains("another disk, 'other.raw'"), "{error}");
    let whole = Tar::new().file("disk.raw", &disk).build();
    for cut in [600, 512 + disk.len() - 1] {
        let error = content(&*open(&whole[..cut], &options()).unwrap()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    // One that begins otherwise is copied first.
    let other = Tar::new().file("README", b"hello").file("disk.raw", &disk).build();
    assert!(open(&other, &options()).unwrap().access().random().is_some());
}

#[test]
fn new_archives_hold_one_disk_under_a_name_that_tells_the_truth() {
    require!("gzip");
    let image = small(1);
    let archive = conformance::make_bytes(&TarDriver, &CreateOptions::default(), &image);
    let packed = filter("gzip", &["-c"], &archive);
    assert!(packed.len() < archive.len() / 2);
    let (device, disk) = small(2).devices[0].clone();
    let two = image.and_disk("second", device.size, disk);
    let refused =
        std::panic::catch_unwind(|| conformance::make_bytes(&TarDriver, &CreateOptions::default(), &two));
    assert!(refused.is_err(), "two disks");
}
