//! A small Linux that boots from what the program writes, in an emulated machine.
//!
//! The guest prints a line that is stored in a partition of its disk, so the line proves that the firmware
//! found the disk, the loader its files, and the kernel the content.

use std::path::{Path, PathBuf};

use imgtool_testing::{names, require, tempdir, text};

use crate::support::imgtool;
use disk::MARKER;
use emulator::{Emulated, Firmware};

mod disk;
mod emulator;

/// Converts a disk into an archive of Proxmox VE, that into a package, and that into a directory of qcow2
/// disks with the XML for libvirt. Returns the path of the XML.
fn through_archive_and_package(directory: &Path, raw: &Path, configuration: &str) -> PathBuf {
    let convert = |line: &[&str]| imgtool(["convert", "-q"].iter().chain(line)).within(directory).ok();
    std::fs::write(directory.join("100.conf"), configuration).unwrap();
    let device = format!("drive-{}={}", boot_drive(configuration), text(raw));
    convert(&[&device, "--config", "100.conf", "vm.vma.zst"]);
    convert(&["vm.vma.zst", "vm.ova"]);
    convert(&["vm.ova", "--to", "qcow2", "vm/"]);
    the_domain(&directory.join("vm"))
}

/// Returns the drive of a configuration: `scsi0`.
fn boot_drive(configuration: &str) -> &str {
    let line = configuration.lines().find_map(|line| line.strip_prefix("boot: order="));
    line.expect("a boot order")
}

fn the_domain(directory: &Path) -> PathBuf {
    let name = names(directory).into_iter().find(|name| name.ends_with(".xml"));
    directory.join(name.expect("the XML of a domain"))
}

/// Returns the configuration of a guest with one disk on this drive.
fn configuration(drive: &str, more: &str) -> String {
    format!(
        "boot: order={drive}\ncores: 1\nmemory: 256\nname: boots\nostype: l26\n\
         {drive}: local:100/vm-100-disk-0.raw,size=40M\n{more}"
    )
}

#[test]
fn archive_becomes_a_domain_that_boots_by_bios() {
    require!("qemu-system-x86_64", "kernel", "sfdisk", "mformat", "grub-mkimage", "cpio", "gzip");
    let dir = tempdir();
    let raw = disk::bootable(dir.path());
    for (drive, more) in [("scsi0", "scsihw: virtio-scsi-pci\n"), ("sata0", "machine: q35\n")] {
        let domain = through_archive_and_package(dir.path(), &raw, &configuration(drive, more));
        let seen = Emulated::domain(&domain).boot(dir.path());
        assert_eq!(seen, format!("{MARKER} bios"), "{drive}");
        remove(dir.path());
    }
}

#[test]
fn archive_becomes_a_domain_that_boots_by_uefi() {
    require!("qemu-system-x86_64", "kernel", "ovmf", "sfdisk", "mformat", "grub-mkimage", "cpio", "gzip");
    let dir = tempdir();
    let raw = disk::bootable(dir.path());
    for (drive, more) in [("scsi0", "bios: ovmf\nscsihw: lsi\n"), ("sata1", "bios: ovmf\nmachine: q35\n")] {
        let domain = through_archive_and_package(dir.path(), &raw, &configuration(drive, more));
        let seen = Emulated::domain(&domain).boot(dir.path());
        assert_eq!(seen, format!("{MARKER} uefi"), "{drive}");
        remove(dir.path());
    }
}

/// QEMU reads the formats itself, except where the program converts a disk back.
#[test]
fn disk_boots_from_every_format() {
    require!("qemu-system-x86_64", "kernel", "ovmf", "sfdisk", "mformat", "grub-mkimage", "cpio", "gzip");
    let dir = tempdir();
    let raw = disk::bootable(dir.path());
    for (name, options, format, bus, firmware) in [
        ("sparse.vmdk", "subformat=monolithicSparse", "vmdk", "ide", Firmware::Bios),
        ("stream.vmdk", "subformat=streamOptimized", "vmdk", "sata", Firmware::Bios),
        ("disk.vhd", "subformat=dynamic", "vpc", "ide", Firmware::Bios),
        ("disk.vhdx", "subformat=dynamic", "vhdx", "sata", Firmware::Uefi),
        ("disk.vdi", "", "vdi", "virtio", Firmware::Bios),
    ] {
        let path = dir.path().join(name);
        let mut line = vec!["convert", "-q", text(&raw), text(&path)];
        if !options.is_empty() {
            line.extend(["-o", options]);
        }
        imgtool(line).ok();
        let seen = Emulated::image(&path, format, bus, firmware).boot(dir.path());
        assert_eq!(seen, format!("{MARKER} {}", firmware.name()), "{name}");
        std::fs::remove_file(&path).unwrap();
    }
}

fn remove(directory: &Path) {
    std::fs::remove_dir_all(directory.join("vm")).unwrap();
    for name in ["100.conf", "vm.vma.zst", "vm.ova"] {
        std::fs::remove_file(directory.join(name)).unwrap();
    }
}
