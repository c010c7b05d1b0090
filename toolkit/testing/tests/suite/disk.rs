//! `Disk` and `DiskReader`: a disk of an image as a handle, and as `Read` and `Seek`.

use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

use imgtool_core::{DeviceId, Disk, ErrorKind, ImageSource};
use imgtool_testing::conformance::{Content, Fill, Image, MemorySource, Order};

fn two_disks() -> Image {
    Image::disk("a", 200_000, Content::zero().with(0..150_000, Fill::Random)).and_disk(
        "b",
        70_001,
        Content::zero().with(70_000..70_001, Fill::Random),
    )
}

fn source(image: &Image) -> Arc<dyn ImageSource> {
    Arc::new(MemorySource::new(image))
}

#[test]
fn reader_reads_and_seeks_like_a_file() {
    let disk = Disk::by_name(source(&two_disks()), "b").unwrap();
    assert_eq!(disk.size(), 70_001);
    let mut bytes = vec![0; 70_001];
    disk.read_at(&mut bytes, 0).unwrap();
    let mut reader = disk.reader();
    let mut whole = Vec::new();
    reader.read_to_end(&mut whole).unwrap();
    assert!(whole == bytes);
    assert_eq!(reader.seek(SeekFrom::End(-1)).unwrap(), 70_000);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, bytes[70_000..]);
    assert_eq!(reader.seek(SeekFrom::Current(-70_001)).unwrap(), 0);
    assert_eq!(reader.seek(SeekFrom::Start(1 << 40)).unwrap(), 1 << 40);
    assert_eq!(reader.read(&mut [0; 10]).unwrap(), 0, "a read beyond the end returns 0");
    reader.seek(SeekFrom::End(-70_002)).unwrap_err();
    assert_eq!(reader.stream_position().unwrap(), 1 << 40, "a failed seek keeps the position");
}

#[test]
fn refuses_missing_devices_and_streams() {
    let image = two_disks();
    assert_eq!(Disk::by_name(source(&image), "c").unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(Disk::new(source(&image), DeviceId(77)).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(Disk::only(source(&image), "the image").unwrap_err().kind(), ErrorKind::Unsupported);
    let stream = source(&image.read_as(Order::Stream));
    assert_eq!(Disk::by_name(stream, "b").unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn keeps_the_image_open_and_every_range_within_the_disk() {
    let disk = Disk::by_name(source(&two_disks()), "b").unwrap();
    let other = disk.clone();
    drop(disk);
    assert_eq!(other.extents(0..70_001).unwrap().len(), 2);
    assert!(other.extents(5..5).unwrap().is_empty());
    for range in [70_000..70_002, 70_002..70_003, 0..u64::MAX] {
        let error = other.extents(range.clone()).unwrap_err();
        assert_eq!((error.kind(), error.device_name()), (ErrorKind::OutOfBounds, Some("b")), "{range:?}");
        assert!(other.map(range.clone()).is_err() && other.rough_extents(range, 4096).is_err());
    }
    assert_eq!(other.read_at(&mut [0; 2], 70_000).unwrap_err().kind(), ErrorKind::OutOfBounds);
    assert!(other.locate(0..70_002).is_none());
}
