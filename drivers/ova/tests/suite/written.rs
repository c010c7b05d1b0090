//! Packages that the driver writes: their bytes, what other programs and the driver read from them, and what
//! is refused.

use std::path::{Path, PathBuf};

use imgtool_core::{
    CreateOptions, DeviceKind, Disk, Driver, ErrorKind, ImageSource, ImageWriter, OpenOptions, Result,
};
use imgtool_ova::OvaDriver;
use imgtool_testing::conformance::{self, Image, Order};
use imgtool_testing::oracles::{dissect_ovf_disks, qemu_img, run_in};
use imgtool_testing::{require, sha256_file, tempdir, text};
use imgtool_vmdk::VmdkDriver;

use crate::options;

/// The driver with the writer of its disks, as the engine composes them.
struct Composed;

impl Driver for Composed {
    fn name(&self) -> &'static str {
        OvaDriver.name()
    }

    fn description(&self) -> &'static str {
        OvaDriver.description()
    }

    fn extensions(&self) -> &'static [&'static str] {
        OvaDriver.extensions()
    }

    fn capabilities(&self) -> imgtool_core::Capabilities {
        OvaDriver.capabilities()
    }

    fn options(&self) -> &'static [imgtool_core::OptionSpec] {
        OvaDriver.options()
    }

    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<imgtool_core::Confidence> {
        OvaDriver.probe(head, len)
    }

    fn open(
        &self,
        input: imgtool_core::Input,
        given: &OpenOptions,
    ) -> Result<std::sync::Arc<dyn ImageSource>> {
        let externals = match given.externals.is_empty() {
            true => options().externals,
            false => given.externals.clone(),
        };
        OvaDriver.open(input, &OpenOptions { externals, ..given.clone() })
    }

    fn check(&self, input: imgtool_core::Input, given: &OpenOptions) -> Result<imgtool_core::CheckReport> {
        OvaDriver.check(input, &OpenOptions { externals: options().externals, ..given.clone() })
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        let format = OvaDriver.member_format().unwrap();
        let values =
            CreateOptions::parse(format.name, VmdkDriver.options(), format.options.iter().copied())?.values;
        let member = VmdkDriver.writer(&CreateOptions { values, ..options.clone() })?;
        OvaDriver.container_writer(options, member)
    }
}

fn create(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse("ova", OvaDriver.options(), pairs.iter().copied()).unwrap()
}

fn make(image: &Image, pairs: &[(&str, &str)], threads: usize) -> (tempfile::TempDir, PathBuf) {
    let directory = tempdir();
    let path = conformance::make_with(&Composed, &create(pairs), image, directory.path(), threads);
    let named = directory.path().join("made.ova");
    std::fs::rename(path, &named).unwrap();
    (directory, named)
}

#[test]
fn what_is_written_reads_the_same() {
    for image in conformance::patterns().iter().chain([&conformance::several_devices()]) {
        if image.devices.iter().any(|(device, _)| device.kind == DeviceKind::VmState || device.size > 1 << 30)
        {
            continue;
        }
        let (_directory, path) = make(image, &[], 2);
        let source = conformance::open(&Composed, &path).unwrap();
        assert_eq!(conformance::compare(&source, image, 512), Ok(()), "{image}");
        source.verify().unwrap();
        let report = Composed.check(conformance::input(&path).unwrap(), &options()).unwrap();
        assert_eq!(report.corruptions, 0, "{image}: {:?}", report.findings);
        assert!(source.info().notes.is_empty(), "{image}: {:?}", source.info().notes);
    }
}

#[test]
fn the_bytes_depend_on_neither_threads_nor_order() {
    let image = conformance::mixed_image();
    let (_directory, one) = make(&image, &[], 1);
    let expected = sha256_file(&one);
    for (threads, order) in [(2, Order::Random), (7, Order::Random), (3, Order::Stream)] {
        let (_directory, path) = make(&image.read_as(order), &[], threads);
        assert_eq!(sha256_file(&path), expected, "{threads} threads, {order:?}");
    }
}

/// Extracts a package with GNU tar, and compares the digests of its manifest with those of coreutils.
#[track_caller]
fn extract(path: &Path, sum: Option<&str>) -> PathBuf {
    let directory = path.parent().unwrap().join("extracted");
    std::fs::create_dir_all(&directory).unwrap();
    run_in("tar", &directory, &["-xf", text(path)]);
    let listed = run_in("tar", &directory, &["-tf", text(path)]);
    let names: Vec<&str> = listed.lines().collect();
    assert!(names[0].ends_with(".ovf"), "the descriptor is the first: {names:?}");
    if let Some(sum) = sum {
        assert!(names[1].ends_with(".mf"), "the manifest is the second: {names:?}");
        let manifest = std::fs::read_to_string(directory.join(names[1])).unwrap();
        let disks = names.iter().filter(|name| !name.ends_with(".mf"));
        assert_eq!(manifest.lines().count(), disks.count());
        for line in manifest.lines() {
            let (head, digest) = line.split_once(")= ").unwrap();
            let (_, name) = head.split_once('(').unwrap();
            let found = run_in(sum, &directory, &[name]);
            assert_eq!(found.split_whitespace().next(), Some(digest), "{name}");
        }
    }
    directory
}

#[test]
fn other_programs_read_what_is_written() {
    require!("tar", "sha256sum", "sha1sum", "sha512sum", "qemu-img");
    let image = conformance::several_devices();
    let disks: Vec<_> = image.devices.iter().filter(|(device, _)| device.kind == DeviceKind::Disk).collect();
    let (device, content) = disks[0].clone();
    let mut image = Image::disk(device.name.clone(), device.size, content);
    for (device, content) in &disks[1..] {
        image = image.and_disk(&device.name, device.size, content.clone());
    }
    for (manifest, sum) in [
        ("sha256", Some("sha256sum")),
        ("sha1", Some("sha1sum")),
        ("sha512", Some("sha512sum")),
        ("none", None),
    ] {
        let (_directory, path) = make(&image, &[("manifest", manifest)], 2);
        let extracted = extract(&path, sum);
        let found = std::fs::read_dir(&extracted).unwrap().count();
        assert_eq!(found, disks.len() + 1 + usize::from(sum.is_some()));
        let source = conformance::open(&Composed, &path).unwrap();
        for (number, disk) in (1..).zip(Disk::all(&source).unwrap()) {
            let file = std::fs::read_dir(&extracted).unwrap().map(|entry| entry.unwrap().path());
            let file =
                file.into_iter().find(|path| text(path).ends_with(&format!("-disk{number}.vmdk"))).unwrap();
            let raw = extracted.join("raw");
            qemu_img(&["convert", "-f", "vmdk", "-O", "raw", text(&file), text(&raw)]);
            let mut content = vec![0; usize::try_from(disk.size()).unwrap()];
            disk.read_at(&mut content, 0).unwrap();
            assert!(std::fs::read(&raw).unwrap() == content, "disk {number}");
        }
    }
}

#[test]
fn seven_zip_reads_what_is_written() {
    require!("7zz");
    let (_directory, path) = make(&conformance::mixed_image(), &[], 2);
    let listed = run_in("7zz", path.parent().unwrap(), &["l", "-ba", "-slt", "-ttar", text(&path)]);
    for name in ["disk.ovf", "disk.mf", "disk-disk1.vmdk"] {
        assert!(listed.contains(&format!("Path = {name}\n")), "{listed}");
    }
    run_in("7zz", path.parent().unwrap(), &["t", "-ttar", text(&path)]);
}

#[test]
fn dissect_finds_the_disks_in_the_descriptor() {
    require!("dissect", "tar");
    let image = conformance::mixed_image();
    let (device, content) = image.devices[0].clone();
    let image = image.and_disk("second", device.size, content);
    let (_directory, path) = make(&image, &[], 2);
    let extracted = extract(&path, None);
    let disks = dissect_ovf_disks(&extracted.join("disk.ovf"));
    assert_eq!(disks, ["disk-disk1.vmdk", "disk-disk2.vmdk"]);
}

#[test]
fn the_time_of_the_files_is_the_one_given() {
    let image = conformance::mixed_image();
    let directory = tempdir();
    let options = CreateOptions { source_date_epoch: Some(0o1234567), ..create(&[]) };
    let path = conformance::make(&Composed, &options, &image, directory.path());
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[136..148], b"00001234567\0");
    let (_directory, path) = make(&image, &[], 1);
    assert_eq!(&std::fs::read(path).unwrap()[136..148], b"00000000000\0");
}

#[test]
fn refuses_what_a_package_can_not_hold() {
    let image = conformance::mixed_image();
    let error = |image: &Image, options: &CreateOptions| {
        let directory = tempdir();
        let output = conformance::new_file(&directory.path().join("x.ova"));
        conformance::write(&Composed, options, image, &output, 1).unwrap_err()
    };
    let mut state = image.clone();
    state.devices[0].0.kind = DeviceKind::VmState;
    assert_eq!(error(&state, &create(&[])).kind(), ErrorKind::Unsupported);
    let blank = CreateOptions { blank: true, ..create(&[]) };
    assert_eq!(Composed.writer(&blank).map(drop).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(CreateOptions::parse("ova", OvaDriver.options(), [("manifest", "md5")]).is_err());
    assert!(OvaDriver.writer(&create(&[])).is_err(), "without a writer of the disks");
    assert!(!Composed.writer(&create(&[])).unwrap().writes_stream());
    let shuffled = conformance::several_devices().read_as(Order::Shuffled);
    assert!(matches!(error(&shuffled, &create(&[])).kind(), ErrorKind::OutOfOrder | ErrorKind::Unsupported));
}
