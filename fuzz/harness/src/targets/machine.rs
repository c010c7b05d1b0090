//! Descriptions of machines: each that can be parsed is printed in all dialects, and what is printed can be parsed.

use imgtool_core::{Device, Machine};
use imgtool_machine::{libvirt, ovf, proxmox};

use crate::exercise;

pub(super) fn run_ovf(input: &[u8]) {
    let Some(descriptor) = exercise::opened(ovf::parse(input, None)) else { return };
    for file in &descriptor.files {
        assert!(!file.href.contains('/') && !matches!(&*file.href, "" | "." | ".."), "{file:?}");
    }
    for disk in &descriptor.disks {
        assert!(disk.file.is_none_or(|index| index < descriptor.files.len()), "{disk:?}");
    }
    print_all(&descriptor.machine);
}

pub(super) fn run_domain(input: &[u8]) {
    if let Some(machine) = exercise::opened(libvirt::parse(input)) {
        print_all(&machine);
    }
}

pub(super) fn run_guest_config(input: &[u8]) {
    if let Some(machine) = exercise::opened(proxmox::parse(input)) {
        print_all(&machine);
    }
}

/// Prints a machine in each dialect, and parses that again.
fn print_all(machine: &Machine) {
    for drive in &machine.drives {
        assert_eq!(drive.controller.is_some(), machine.position(drive).is_some(), "{drive:?}");
    }
    let names: Vec<&str> = machine.drives.iter().filter_map(|drive| drive.device.as_deref()).collect();
    let files: Vec<String> = (0..names.len()).map(|number| format!("{number}.vmdk")).collect();
    let pairs = || names.iter().copied().zip(files.iter().map(|file| &**file));
    let packaged = |(device, href)| ovf::PackagedDisk { device, href, len: Some(1), capacity: 1, format: "" };
    let packaged: Vec<_> = pairs().map(packaged).collect();
    let printed = ovf::print(machine, &packaged);
    let again = ovf::parse(printed.text.as_bytes(), None);
    assert!(again.is_ok(), "{again:?}\n{}", printed.text);
    let sources: Vec<_> =
        pairs().map(|(device, path)| libvirt::DiskSource { device, path, format: "raw" }).collect();
    let printed = libvirt::print(machine, &sources);
    let again = libvirt::parse(printed.text.as_bytes());
    assert!(again.is_ok(), "{again:?}\n{}", printed.text);
    let devices: Vec<Device> = names.iter().map(|name| Device::disk(0, *name, 512)).collect();
    let printed = proxmox::for_archive(machine, &devices);
    let config = proxmox::GuestConfig::parse(&printed.text).expect("a configuration");
    for (key, value) in config.settings() {
        let is_drive = value.contains(":100/vm-100-disk-");
        assert!(is_drive || proxmox::keys::check(key, value).is_ok(), "{key}: {value}");
        assert!(!["args", "hookscript", "hostpci0", "serial0"].contains(&key), "{key}: {value}");
    }
}
