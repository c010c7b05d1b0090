//! Differencing images over their parents.

use imgtool_core::ErrorKind;
use imgtool_testing::conformance;
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
}

#[test]
fn refuses_an_image_that_is_its_own_parent() {
    let directory = tempfile::tempdir().unwrap();
    let child = Builder::new(2).child_of([9; 16], "child.vhd");
    let path = save(directory.path(), "child.vhd", &child.bytes());
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("back to an image of the same chain"), "{error}");
}
