//! Independent readers take what the dialects print, and we read what other programs print.

use std::path::{Path, PathBuf};

use imgtool_core::machine::{
    Chipset, ControllerModel, Cpu, Drive, DriveKind, Firmware, Machine, Nic, NicModel, Os, Tpm,
};
use imgtool_machine::libvirt::{self, DiskSource};
use imgtool_machine::ovf::{self, PackagedDisk};
use imgtool_testing::oracles::{cot_reads, cot_samples, run};
use imgtool_testing::{require, text};

/// Machines that use all words of the dialects.
fn machines() -> Vec<Machine> {
    let mut machines = Vec::new();
    for (number, os) in (0..).zip(Os::ALL) {
        let firmware = if number % 2 == 0 { Firmware::Uefi } else { Firmware::Bios };
        let mut machine = Machine {
            name: format!("web {number} <&>"),
            description: "first: 'a'\nsecond \"b\"".to_owned(),
            uuid: uuid::Uuid::parse_str("3e1b0ee5-0000-4000-8000-000000000001").ok(),
            os: Some(*os),
            cpu: Cpu { sockets: 1 + number, cores: 2 },
            memory: Some(u64::from(number + 1) << 29),
            firmware,
            secure_boot: number % 4 == 0,
            tpm: (number % 3 == 0).then_some(Tpm::V2_0),
            chipset: [None, Some(Chipset::Q35), Some(Chipset::I440fx)][number as usize % 3],
            ..Machine::default()
        };
        for (place, model) in (0..).zip(ControllerModel::ALL) {
            let mut drive = Drive::new(DriveKind::Disk, Some(&format!("disk-{model}")));
            machine.attach(
                &mut drive,
                *model,
                if model.bus().name() == "scsi" { place * 3 } else { place % 2 },
            );
            drive.boot = (place < 2).then_some(place);
            machine.drives.push(drive);
        }
        let mut cdrom = Drive::new(DriveKind::Cdrom, None);
        machine.attach(&mut cdrom, ControllerModel::Ide, 3);
        machine.drives.push(cdrom);
        for model in NicModel::ALL {
            let mac = "52:54:00:00:00:01".parse().ok();
            machine.nics.push(Nic { mac, connected: number % 2 == 0, ..Nic::new(*model) });
        }
        machines.push(machine);
    }
    machines
}

/// Writes the description of each machine into a directory.
fn written(directory: &Path, extension: &str, print: impl Fn(&Machine, &[String]) -> String) -> Vec<PathBuf> {
    let describe = |(number, machine): (usize, Machine)| {
        let names: Vec<String> = machine.drives.iter().filter_map(|drive| drive.device.clone()).collect();
        let path = directory.join(format!("{number}.{extension}"));
        std::fs::write(&path, print(&machine, &names)).expect("a file");
        path
    };
    machines().into_iter().enumerate().map(describe).collect()
}

fn domain(machine: &Machine, names: &[String]) -> String {
    let paths: Vec<String> = names.iter().map(|name| format!("/disks/{name}.qcow2")).collect();
    let disks: Vec<DiskSource<'_>> =
        names.iter().zip(&paths).map(|(device, path)| DiskSource { device, path, format: "qcow2" }).collect();
    libvirt::print(machine, &disks).text
}

#[test]
fn libvirt_validates_our_domains() {
    require!("virt-xml-validate", "xmllint");
    let directory = tempfile::tempdir().expect("a directory");
    for path in written(directory.path(), "xml", domain) {
        run("virt-xml-validate", &[text(&path), "domain"]);
    }
}

#[test]
fn libvirt_defines_our_domains() {
    require!("virsh");
    let directory = tempfile::tempdir().expect("a directory");
    // The driver of libvirt's own tests needs no daemon and takes domains of its own type alone.
    let of_test_driver = |machine: &Machine, names: &[String]| {
        domain(machine, names).replacen("<domain type='kvm'>", "<domain type='test'>", 1)
    };
    for path in written(directory.path(), "xml", of_test_driver) {
        let output = run("virsh", &["-c", "test:///default", "define", "--validate", text(&path)]);
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.contains("defined from"), "{output}");
    }
}

#[test]
fn cot_reads_our_descriptors() {
    require!("cot");
    let directory = tempfile::tempdir().expect("a directory");
    let print = |machine: &Machine, names: &[String]| {
        let files: Vec<String> = names.iter().map(|name| format!("{name}.vmdk")).collect();
        let disk = |(device, href)| PackagedDisk {
            device,
            href,
            len: None,
            capacity: 1 << 30,
            format: "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized",
        };
        let disks: Vec<_> = names.iter().map(|n| &**n).zip(files.iter().map(|f| &**f)).map(disk).collect();
        ovf::print(machine, &disks).text
    };
    let paths = written(directory.path(), "ovf", print);
    for (path, machine) in paths.iter().zip(machines()) {
        let seen = cot_reads(path).split_whitespace().collect::<Vec<_>>().join(" ");
        // CPUs, memory, network adapters, serial ports, disks.
        let gibibytes = machine.memory.unwrap_or_default() as f64 / f64::from(1 << 30);
        let memory = if gibibytes < 1.0 { "512 MiB".to_owned() } else { format!("{gibibytes} GiB") };
        let (cpus, nics, disks) = (machine.cpu.count(), machine.nics.len(), machine.drives.len() - 1);
        let profile = format!("None (default) {cpus} {memory} {nics} 0 {disks} / {disks} GiB");
        assert!(seen.contains(&profile), "{profile}: {seen}");
        assert!(seen.contains("System types: vmx-13"), "{seen}");
        for drive in machine.drives.iter().filter_map(|drive| drive.device.as_ref()) {
            assert!(seen.contains(&format!("{drive}.vmdk")), "{drive}: {seen}");
        }
    }
}

#[test]
fn reads_the_descriptors_of_other_programs() {
    require!("cot");
    let samples = cot_samples();
    assert!(samples.len() >= 8, "{samples:?}");
    for path in samples {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let bytes = std::fs::read(&path).expect("a file");
        let parsed = ovf::parse(&bytes, None);
        match name.as_str() {
            // Made to be wrong: unknown controllers and references, an unknown version.
            "invalid.ovf" | "ersatz_ovf_3.0.ovf" => drop(parsed),
            _ => {
                let descriptor = parsed.unwrap_or_else(|e| panic!("{name}: {e:#}"));
                println!("{name}: {:?}", descriptor.machine);
            }
        }
    }
}
