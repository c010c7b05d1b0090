//! `imgtool::open`: random access to images and archives of any format.

use imgtool::ErrorKind;
use imgtool::contracts::OpenOptions;
use imgtool_testing::images::{Image, noise};
use imgtool_testing::{fixture, tempdir};

use super::{TWO_DISKS, assert_two_disks, digest};

#[test]
fn reads_a_compressed_archive_by_position() {
    let image = imgtool::open(fixture("two-disks.vma.zst")).unwrap();
    assert_eq!(image.format(), "vma");
    assert_two_disks(&image.disks().unwrap());
    let configurations: Vec<&str> =
        image.info().attachments.iter().map(|configuration| configuration.name.as_str()).collect();
    assert_eq!(configurations, ["qemu-server.conf", "qemu-server.fw"]);
}

#[test]
fn disk_outlives_its_image_handle() {
    let (name, size, sha256) = TWO_DISKS[1];
    let disk = imgtool::open(fixture("two-disks.vma.gz")).unwrap().disk(name).unwrap();
    assert_eq!((disk.size(), digest(&disk).as_str()), (size, sha256));
}

#[test]
fn refuses_reads_and_extents_beyond_the_disk() {
    let dir = tempdir();
    let path = dir.path().join("disk.raw");
    Image::hole("disk", 100_000).with(0, noise(1, 5000)).write_raw(&path);
    let disks = imgtool::open(&path).unwrap().disks().unwrap();
    let mut two = [0; 2];
    assert_eq!(disks[0].read_at(&mut two, 99_999).unwrap_err().kind(), ErrorKind::OutOfBounds);
    assert_eq!(disks[0].extents(0..100_001).unwrap_err().kind(), ErrorKind::OutOfBounds);
    disks[0].read_at(&mut two, 99_998).unwrap();
}

#[test]
fn missing_disk_error_lists_the_others() {
    let error = imgtool::open(fixture("two-disks.vma.zst")).unwrap().disk("drive-scsi1").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let hint = error.hint_text().unwrap();
    assert!(TWO_DISKS.iter().any(|(name, ..)| hint.contains(name)), "{hint}");
}

#[test]
fn explicit_format_overrides_detection() {
    let registry = imgtool::registry();
    let options = OpenOptions::default();
    let path = fixture("sparse.vma");
    let image = imgtool::open_with(&registry, &path, Some("raw"), &options).unwrap();
    assert_eq!(image.disks().unwrap()[0].size(), std::fs::metadata(&path).unwrap().len());
    let error = imgtool::open_with(&registry, &path, Some("qcow2"), &options).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::WrongFormat);
}
