//! Differencing images over their parents.

use imgtool_core::{Driver, ErrorKind, OpenOptions};
use imgtool_testing::conformance;
use imgtool_testing::images::noise;
use imgtool_testing::saved;
use imgtool_vhd::VhdDriver;

use crate::crafted::{BLOCK, Builder, UUID, filled, footer};
use crate::support::{check, content, open, save};

#[test]
fn reads_a_child_over_its_parent_by_sector() {
    let directory = tempfile::tempdir().unwrap();
    let parent = Builder::new(3).block(0, 1, 0xff).block(1, 2, 0xff);
    save(directory.path(), "base.vhd", &parent.bytes());
    // The first and the third sector of block 1 are in the child; block 3 is past the end of the parent.
    let child = Builder::new(4).child_of(UUID, "base.vhd").block(1, 0x22, 0b1010_0000);
    let path = save(directory.path(), "child.avhd", &child.bytes());
    let mut expected = filled(&[1, 2, 0, 0]);
    for sector in [0, 2] {
        let at = (BLOCK + sector * 512) as usize;
        expected[at..at + 512].fill(0x22);
    }
    assert!(content(&open(&path).unwrap()).unwrap() == expected);
    assert_eq!(check(&path).corruptions, 0);
}

#[test]
fn opens_a_fixed_parent_as_vhd() {
    let directory = tempfile::tempdir().unwrap();
    let disk = filled(&[1, 2]);
    let parent = [disk.clone(), footer(disk.len() as u64, 2, UUID)].concat();
    save(directory.path(), "base.vhd", &parent);
    let child = Builder::new(2).child_of(UUID, "base.vhd").block(1, 9, 0xff);
    let path = save(directory.path(), "child.vhd", &child.bytes());
    assert!(content(&open(&path).unwrap()).unwrap() == filled(&[1, 9]));
}

#[test]
fn refuses_parents_unless_allowed_or_if_they_are_another_image() {
    let directory = tempfile::tempdir().unwrap();
    let child = Builder::new(2).child_of(UUID, "base.vhd");
    let path = save(directory.path(), "child.vhd", &child.bytes());
    save(directory.path(), "base.vhd", &Builder::new(2).bytes());
    let error = conformance::open(&VhdDriver, &path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("base.vhd"), "{error}");
    assert!(open(&path).is_ok());
    save(directory.path(), "base.vhd", &Builder::new(2).child_of([1; 16], "x.vhd").bytes());
    let other = [filled(&[1, 2]), footer(2 * BLOCK, 2, [3; 16])].concat();
    save(directory.path(), "base.vhd", &other);
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("not the image"), "{error}");
    assert!(
        error.to_string().contains("its UUID is 03030303-0303-0303-0303-030303030303, not 0707"),
        "{error}"
    );
    // A salvage reads what is left, and says so.
    let options = OpenOptions { salvage: true, ..saved::open_options(VhdDriver, true) };
    let source = conformance::open_with(&VhdDriver, &path, &options).unwrap();
    assert!(
        source.doubts().iter().any(|doubt| doubt.reason.contains("not the image")),
        "{:?}",
        source.doubts()
    );
}

#[test]
fn a_check_compares_the_identifier_of_an_allowed_parent() {
    let directory = tempfile::tempdir().unwrap();
    let child = Builder::new(2).child_of(UUID, "base.vhd");
    let path = save(directory.path(), "child.vhd", &child.bytes());
    let check = |chain| {
        let options = saved::open_options(VhdDriver, chain);
        VhdDriver.check(conformance::input(&path).unwrap(), &options).unwrap()
    };
    save(directory.path(), "base.vhd", &Builder::new(2).bytes());
    assert!(check(true).findings.is_empty(), "{:?}", check(true).findings);
    let other = [filled(&[1, 2]), footer(2 * BLOCK, 2, [3; 16])].concat();
    save(directory.path(), "base.vhd", &other);
    assert_eq!(check(true).corruptions, 1);
    let alone = check(false);
    assert!(alone.corruptions == 0 && alone.findings[0].contains("only this file"), "{:?}", alone.findings);
}

/// The relative name leads to another image; the one that the child was made from is beside it.
#[test]
fn tries_all_names_for_the_image_with_the_right_uuid() {
    let directory = tempfile::tempdir().unwrap();
    let sub = directory.path().join("sub");
    std::fs::create_dir(&sub).unwrap();
    let fixed = |byte, uuid| [filled(&[byte, byte]), footer(2 * BLOCK, 2, uuid)].concat();
    let other = save(&sub, "base.vhd", &fixed(3, [3; 16]));
    save(directory.path(), "base.vhd", &fixed(7, UUID));
    let child = Builder::new(2).child_of(UUID, "base.vhd").named(r"sub\base.vhd");
    let path = save(directory.path(), "child.vhd", &child.bytes());
    assert!(content(&open(&path).unwrap()).unwrap() == filled(&[7, 7]));
    // Without the right one, the error is that of the other image, and not of the missing file.
    std::fs::remove_file(directory.path().join("base.vhd")).unwrap();
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("not the image"), "{error}");
    std::fs::remove_file(other).unwrap();
    assert_eq!(open(&path).map(|_| ()).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn reads_bitmaps_of_several_sectors() {
    let directory = tempfile::tempdir().unwrap();
    // 4 MiB have 8192 sectors, so the bitmap has two sectors.
    let size = 4 << 20;
    let (below, above) = (noise(1, 2 * size), noise(2, size));
    let parent = [below.clone(), footer(2 * size as u64, 2, UUID)].concat();
    save(directory.path(), "base.vhd", &parent);
    let bits = noise(3, 1024);
    let child =
        Builder::with_block_size(2, size as u64).child_of(UUID, "base.vhd").block_of(1, &above, &bits);
    let path = save(directory.path(), "child.vhd", &child.bytes());
    let mut expected = below;
    for sector in (0..8192).filter(|sector| bits[sector / 8] & (0x80 >> (sector % 8)) != 0) {
        let (from, to) = (sector * 512, size + sector * 512);
        expected[to..to + 512].copy_from_slice(&above[from..from + 512]);
    }
    assert!(content(&open(&path).unwrap()).unwrap() == expected);
    assert_eq!(check(&path).corruptions, 0);
}

#[test]
fn refuses_an_image_that_is_its_own_parent() {
    let directory = tempfile::tempdir().unwrap();
    let child = Builder::new(2).child_of([9; 16], "child.vhd");
    let path = save(directory.path(), "child.vhd", &child.bytes());
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("back to an image of the same chain"), "{error}");
}
