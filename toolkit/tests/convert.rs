//! `Conversion`, a conversion in one call, and `DeviceReader`, a disk as `Read` and `Seek`.

#![allow(clippy::unwrap_used)]

mod toy;

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Mutex;

use imgtool_toolkit::conformance::{self, Content, Fill, Image, MemorySource};
use imgtool_toolkit::{
    CancelToken, Conversion, CreateOptions, DeviceId, DeviceReader, ErrorKind, ImageSource, Progress,
};
use toy::{Flaw, Toy};

const TOY: Toy = Toy(Flaw::None);

fn two_disks() -> Image {
    Image::disk("a", 200_000, Content::zero().with(0..150_000, Fill::Random)).and_disk(
        "b",
        70_001,
        Content::zero().with(70_000..70_001, Fill::Random),
    )
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Adds up the progress of each device.
#[derive(Default)]
struct Sum(Mutex<[u64; 2]>);

impl Progress for Sum {
    fn advance(&self, device: DeviceId, len: u64, _zero: u64) {
        self.0.lock().unwrap()[device.0 as usize] += len;
    }
}

#[test]
fn converts_all_devices_and_reports_all_bytes() {
    let directory = conformance::scratch();
    let path = directory.path().join("image.toy");
    let sum = Sum::default();
    let mut source = MemorySource::new(&two_disks());
    let totals = Conversion::new(&TOY).threads(3).progress(&sum).to_file(&mut source, &path).unwrap();
    assert_eq!(totals.guest_bytes, 270_001);
    assert_eq!(*sum.0.lock().unwrap(), [200_000, 70_001]);
    let mut written = conformance::open(&TOY, &path).unwrap();
    conformance::assert_content(&mut *written, &two_disks(), 1);
    assert_eq!(entries(directory.path()), 1);
}

#[test]
fn converts_one_device_by_name() {
    let directory = conformance::scratch();
    let path = directory.path().join("b.toy");
    Conversion::new(&TOY).disk("b").to_file(&mut MemorySource::new(&two_disks()), &path).unwrap();
    let written = conformance::open(&TOY, &path).unwrap();
    let sizes: Vec<u64> = written.info().devices.iter().map(|device| device.size).collect();
    assert_eq!(sizes, [70_001]);
}

#[test]
fn refusals_leave_no_file() {
    let directory = conformance::scratch();
    let path = directory.path().join("image.toy");
    let mut source = MemorySource::new(&two_disks());
    let error = Conversion::new(&TOY).disk("c").to_file(&mut source, &path).unwrap_err();
    assert_eq!((error.kind(), error.hint_text()), (ErrorKind::Usage, Some("devices: drive-scsi0, b")));
    let mut options = CreateOptions::default();
    options.options.insert("colour".to_owned(), "blue".to_owned());
    let error = Conversion::new(&TOY).options(options).to_file(&mut source, &path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = Conversion::new(&TOY).cancel(cancel).to_file(&mut source, &path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(entries(directory.path()), 0);
}

#[test]
fn replaces_an_existing_file_only_with_overwrite() {
    let directory = conformance::scratch();
    let path = directory.path().join("image.toy");
    std::fs::write(&path, "old").unwrap();
    let mut source = MemorySource::new(&two_disks());
    let error = Conversion::new(&TOY).to_file(&mut source, &path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    Conversion::new(&TOY).overwrite(true).to_file(&mut source, &path).unwrap();
    conformance::assert_content(&mut *conformance::open(&TOY, &path).unwrap(), &two_disks(), 1);
}

#[test]
fn reader_reads_and_seeks_like_a_file() {
    let source = MemorySource::new(&two_disks());
    let file = {
        let mut bytes = vec![0; 70_001];
        source.random().unwrap().read_at(source.info().devices[1].id, &mut bytes, 0).unwrap();
        bytes
    };
    let mut reader = DeviceReader::by_name(&source, "b").unwrap();
    assert_eq!(reader.size(), 70_001);
    let mut whole = Vec::new();
    reader.read_to_end(&mut whole).unwrap();
    assert!(whole == file);
    assert_eq!(reader.seek(SeekFrom::End(-1)).unwrap(), 70_000);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, file[70_000..]);
    assert_eq!(reader.seek(SeekFrom::Current(-70_001)).unwrap(), 0);
    assert_eq!(reader.seek(SeekFrom::Start(1 << 40)).unwrap(), 1 << 40);
    assert_eq!(reader.read(&mut [0; 10]).unwrap(), 0, "a read beyond the end returns 0");
    reader.seek(SeekFrom::End(-70_002)).unwrap_err();
    assert_eq!(reader.stream_position().unwrap(), 1 << 40, "a failed seek keeps the position");
}

#[test]
fn reader_refuses_missing_devices_and_streams() {
    let source = MemorySource::new(&two_disks());
    assert_eq!(DeviceReader::by_name(&source, "c").err().unwrap().kind(), ErrorKind::Usage);
    assert_eq!(DeviceReader::new(&source, DeviceId(77)).err().unwrap().kind(), ErrorKind::Usage);
    let stream = MemorySource::new(&two_disks().read_as(conformance::Order::Stream));
    assert_eq!(DeviceReader::by_name(&stream, "b").err().unwrap().kind(), ErrorKind::Unsupported);
}
