//! Packages from pipes: in one pass where descriptor and manifest are in front, else through a copy.

use std::io::{self, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Driver, ErrorKind, ImageSource, Input, Location, OpenOptions, Result,
};
use imgtool_ova::OvaDriver;
use imgtool_testing::tar::{Tar, descriptor, manifest};

use crate::{bytes_of, options, package, small, vmdk};

fn open(bytes: &[u8], options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let reader = Box::new(Cursor::new(bytes.to_vec()));
    OvaDriver.open(Input::from_reader(Location::Stdin, reader).unwrap(), options)
}

/// Reads all disks in one pass.
fn contents(source: &dyn ImageSource) -> Result<Vec<Vec<u8>>> {
    let sizes = source.info().devices.iter().map(|device| usize::try_from(device.size).unwrap());
    let mut disks: Vec<Vec<u8>> = sizes.map(|size| vec![0xee; size]).collect();
    let Access::Stream(stream) = source.access() else { panic!("not in one pass") };
    let pool = BufferPool::new();
    while let Some(piece) = lock(stream).next_piece(&pool)? {
        let start = usize::try_from(piece.start).unwrap();
        let target = &mut disks[piece.device.0 as usize][start..start + usize::try_from(piece.len).unwrap()];
        match &piece.data {
            Some(data) => target.copy_from_slice(data),
            None => target.fill(0),
        }
    }
    Ok(disks)
}

/// Returns a package of one disk. `order` are the indices of descriptor, manifest and disk.
fn ordered(order: [usize; 3], capacity: u64) -> Vec<u8> {
    let file = vmdk(&small(1));
    let text = descriptor("vm", &[("d.vmdk", capacity)]);
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("d.vmdk", &file)]);
    let members = [("vm.ovf", text.as_bytes()), ("vm.mf", sums.as_bytes()), ("d.vmdk", &file)];
    order.iter().fold(Tar::new(), |tar, index| tar.file(members[*index].0, members[*index].1)).build()
}

fn size() -> u64 {
    small(1).devices[0].0.size
}

#[test]
fn reads_the_usual_package_in_one_pass() {
    let (bytes, image) = package();
    let source = open(&bytes, &options()).unwrap();
    let found = contents(&*source).unwrap();
    assert_eq!(found, [bytes_of(&small(0)), bytes_of(&small(3))]);
    assert_eq!(source.info().attachments, image.attachments);
    assert!(source.notes().is_empty(), "{:?}", source.notes());
    let input = Input::from_reader(Location::Stdin, Box::new(Cursor::new(bytes))).unwrap();
    assert_eq!(OvaDriver.check(input, &options()).unwrap().corruptions, 0);
    let Access::Stream(stream) = source.access() else { panic!("not in one pass") };
    let again = lock(stream).next_piece(&BufferPool::new()).map(drop).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Usage);
}

#[test]
fn copies_what_one_pass_does_not_read() {
    for (bytes, in_one_pass) in [
        (ordered([0, 1, 2], size()), true),
        (ordered([0, 2, 1], size()), false),
        (ordered([1, 0, 2], size()), false),
        (ordered([0, 1, 2], size() + 512), false),
    ] {
        let source = open(&bytes, &options()).unwrap();
        assert_eq!(source.access().is_stream(), in_one_pass);
        let mut content = vec![0; usize::try_from(size()).unwrap()];
        match source.access() {
            Access::Random(random) => random.read_at(imgtool_core::DeviceId(0), &mut content, 0).unwrap(),
            Access::Stream(_) => content = contents(&*source).unwrap().remove(0),
        }
        assert!(content == bytes_of(&small(1)));
        source.verify().unwrap();
    }
    let salvage = OpenOptions { salvage: true, ..options() };
    assert!(!open(&ordered([0, 1, 2], size()), &salvage).unwrap().access().is_stream());
}

#[test]
fn errors_at_the_end_of_a_pipe_are_errors() {
    let (sound, _) = package();
    let fault = |bytes: &[u8]| {
        let source = open(bytes, &options()).unwrap();
        contents(&*source).unwrap_err()
    };
    let second = sound.windows(4).rposition(|part| part == b"KDMV").unwrap();
    // The header of the second disk, which its driver reads; a comment in the descriptor, which none does.
    let first = sound.windows(4).position(|part| part == b"KDMV").unwrap();
    let mut changed = sound.clone();
    let comment = changed[first..].windows(4).position(|part| part == b"# Ex").unwrap();
    changed[first + comment + 2] ^= 1;
    let error = fault(&changed);
    assert!(error.to_string().contains("'vm-disk1.vmdk' does not have the SHA256 digest"), "{error}");
    assert_eq!(error.device_name(), Some("vm-disk1"));

    let header = sound[..second].windows(14).rposition(|part| part == b"vm-disk2.vmdk\0").unwrap();
    let error = fault(&[&sound[..header], &[0; 1024][..]].concat());
    assert!(error.to_string().contains("'vm-disk2.vmdk' is missing"), "{error}");
    for cut in [sound.len() - 3000, header, second + 100] {
        assert_eq!(fault(&sound[..cut]).kind(), ErrorKind::Corrupt);
    }
    let twice = [&sound[..sound.len() - 1024], &sound[header..]].concat();
    assert!(fault(&twice).to_string().contains("two members are called"));
}

#[test]
fn notes_what_a_package_in_a_pipe_lacks() {
    let file = vmdk(&small(1));
    let text = descriptor("vm", &[("d.vmdk", size())])
        .replace("</References>", r#"<File ovf:href="v.nvram" ovf:id="v"/></References>"#);
    let sums = manifest(&[("vm.ovf", text.as_bytes())]);
    let archive = Tar::new()
        .file("vm.ovf", text.as_bytes())
        .file("vm.mf", sums.as_bytes())
        .file("d.vmdk", &file)
        .build();
    let source = open(&archive, &options()).unwrap();
    contents(&*source).unwrap();
    let notes = [source.info().notes.clone(), source.notes()].concat().join("\n");
    assert!(notes.contains("the manifest has no digest of 'd.vmdk'"), "{notes}");
    assert!(notes.contains("needed by no disk: 'v.nvram'"), "{notes}");
}

/// Counts the bytes that were read of it.
struct Counted(Cursor<Vec<u8>>, Arc<AtomicUsize>);

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buf)?;
        self.1.fetch_add(count, Ordering::Relaxed);
        Ok(count)
    }
}

#[test]
fn a_wrong_digest_in_front_ends_the_reading() {
    let text = descriptor("vm", &[("d.vmdk", 512)]);
    let sums = manifest(&[("vm.ovf", b"other")]);
    let archive = Tar::new()
        .file("vm.ovf", text.as_bytes())
        .file("vm.mf", sums.as_bytes())
        .file("d.vmdk", &vec![1; 40 << 20])
        .build();
    let count = Arc::new(AtomicUsize::new(0));
    let reader = Box::new(Counted(Cursor::new(archive), Arc::clone(&count)));
    let input = Input::from_reader(Location::Stdin, reader).unwrap();
    let error = OvaDriver.open(input, &options()).map(drop).unwrap_err();
    assert!(error.to_string().contains("'vm.ovf' does not have the SHA256 digest"), "{error}");
    assert!(count.load(Ordering::Relaxed) < 20 << 20, "not the whole pipe is stored");
}
