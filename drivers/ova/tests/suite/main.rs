//! Tests of the drivers for packages and archives: conformance laws, archives built byte by byte, and those
//! of GNU tar.
#![allow(clippy::unwrap_used)]

mod archives;
mod disk_archives;
mod packages;
mod pipes;
mod written;
mod zips;

use std::sync::Arc;

use imgtool_core::{Disk, Driver, Error, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_ova::{OvaDriver, TarDriver};
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_testing::tar::{Tar, descriptor, manifest};
use imgtool_testing::{memory, tempdir};
use imgtool_vmdk::VmdkDriver;

/// Returns options with an opener that knows the formats of the disks, and allows everything that users can
/// allow.
fn options() -> OpenOptions {
    let mut registry = Registry::new();
    imgtool_vmdk::register(&mut registry);
    imgtool_qcow2::register(&mut registry);
    imgtool_vhd::register(&mut registry);
    imgtool_raw::register(&mut registry);
    imgtool_ova::register(&mut registry);
    let policy = ExternalPolicy { chain: true, ..ExternalPolicy::default() };
    OpenOptions { externals: PolicyOpener::new(registry, policy).externals(), ..OpenOptions::default() }
}

fn open(driver: &dyn Driver, bytes: &[u8]) -> Result<Arc<dyn ImageSource>> {
    driver.open(memory::as_file("image", bytes), &options())
}

#[track_caller]
fn refusal(driver: &dyn Driver, bytes: &[u8]) -> Error {
    open(driver, bytes).map(drop).expect_err("refused")
}

/// Returns the names and contents of all disks.
#[track_caller]
fn contents(driver: &dyn Driver, bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let source = open(driver, bytes).unwrap();
    let disks = Disk::all(&source).unwrap();
    let content = |disk: &Disk| {
        let mut content = vec![7; usize::try_from(disk.size()).unwrap()];
        disk.read_at(&mut content, 0).unwrap();
        (disk.name().to_owned(), content)
    };
    let found = disks.iter().map(content).collect();
    source.verify().unwrap();
    found
}

/// A disk with text, a hole and noise, as the laws and the archives need it.
fn small(seed: u64) -> Image {
    let content =
        Content::zero().with(0..70_000 + 512 * seed, Fill::Text).with(400_000..401_000, Fill::Byte(7));
    Image::disk("small", 512 * (1000 + seed), content)
}

/// Returns the disk as a streamOptimized VMDK, which is what packages contain.
fn vmdk(image: &Image) -> Vec<u8> {
    conformance::make_bytes(&VmdkDriver, &imgtool_core::CreateOptions::default(), image)
}

fn bytes_of(image: &Image) -> Vec<u8> {
    let (device, content) = &image.devices[0];
    let mut bytes = vec![0; usize::try_from(device.size).unwrap()];
    content.read(&mut bytes, 0);
    bytes
}

/// Returns a package of two disks in the order of VMware, and what it contains.
fn package() -> (Vec<u8>, Image) {
    let (first, second) = (small(0), small(3));
    let (one, two) = (vmdk(&first), vmdk(&second));
    let sizes = [&first, &second].map(|image| image.devices[0].0.size);
    let text = descriptor("vm", &[("vm-disk1.vmdk", sizes[0]), ("vm-disk2.vmdk", sizes[1])]);
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("vm-disk1.vmdk", &one), ("vm-disk2.vmdk", &two)]);
    let archive = Tar::new()
        .file("vm.ovf", text.as_bytes())
        .file("vm.mf", sums.as_bytes())
        .file("vm-disk1.vmdk", &one)
        .file("vm-disk2.vmdk", &two);
    let (device, content) = second.devices[0].clone();
    let (_, content_of_first) = first.devices[0].clone();
    let image =
        Image::disk("vm-disk1", sizes[0], content_of_first).and_disk("vm-disk2", device.size, content);
    (archive.build(), image.and_attachment("vm.ovf", text.as_bytes()))
}

#[test]
fn packages_obey_the_laws() {
    let (bytes, image) = package();
    conformance::reads(&OvaDriver, &[(&bytes, image)], &options());
}

#[test]
fn archives_obey_the_laws() {
    let disk = small(1);
    let content = bytes_of(&disk);
    let (device, content_of_disk) = disk.devices[0].clone();
    let image = Image::disk("disk", device.size, content_of_disk);
    let whole = Tar::new().file("disk.raw", &content).build();
    let sparse = Tar::new().sparse("disk.raw", &content, &[(0, 98_304), (397_312, 8192)]).build();
    conformance::reads(&TarDriver, &[(&whole, image.clone()), (&sparse, image)], &options());
}

#[test]
fn disks_are_read_in_place() {
    let dir = tempdir();
    let (bytes, _) = package();
    let path = dir.path().join("vm.ova");
    std::fs::write(&path, &bytes).unwrap();
    let source = OvaDriver.open(conformance::input(&path).unwrap(), &options()).unwrap();
    assert_eq!(source.info().devices.len(), 2);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is unpacked");
}
