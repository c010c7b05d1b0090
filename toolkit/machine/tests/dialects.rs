//! Properties of all dialects together: what each of them can express survives the way through all of them,
//! and no text breaks out of its place.

use imgtool_core::Device;
use imgtool_core::machine::{
    Bus, ControllerModel, Cpu, Drive, DriveKind, Firmware, MacAddress, Machine, Nic, NicModel, Os,
};
use imgtool_machine::{Printed, libvirt, ovf, proxmox};
use proptest::prelude::*;

/// Names of the disks of a machine.
fn devices(machine: &Machine) -> Vec<String> {
    machine.drives.iter().filter_map(|drive| drive.device.clone()).collect()
}

fn through_ovf(machine: &Machine) -> Machine {
    let names = devices(machine);
    let files: Vec<String> = names.iter().map(|name| format!("{name}.vmdk")).collect();
    let disk =
        |(device, href)| ovf::PackagedDisk { device, href, len: Some(1), capacity: 512, format: "urn:x" };
    let disks: Vec<_> =
        names.iter().map(|name| &**name).zip(files.iter().map(|file| &**file)).map(disk).collect();
    read("OVF", &ovf::print(machine, &disks), |bytes| Ok(ovf::parse(bytes, None)?.machine))
}

fn through_libvirt(machine: &Machine) -> Machine {
    let names = devices(machine);
    let paths: Vec<String> = names.iter().map(|name| format!("/d/{name}.qcow2")).collect();
    let disk = |(device, path)| libvirt::DiskSource { device, path, format: "qcow2" };
    let disks: Vec<_> =
        names.iter().map(|name| &**name).zip(paths.iter().map(|path| &**path)).map(disk).collect();
    read("libvirt", &libvirt::print(machine, &disks), libvirt::parse)
}

fn through_proxmox(machine: &Machine) -> Machine {
    let disks: Vec<Device> = devices(machine).iter().map(|name| Device::disk(0, name, 4096)).collect();
    read("Proxmox VE", &proxmox::for_archive(machine, &disks), proxmox::parse)
}

fn read(dialect: &str, printed: &Printed, parse: fn(&[u8]) -> imgtool_core::Result<Machine>) -> Machine {
    parse(printed.text.as_bytes()).unwrap_or_else(|e| panic!("{dialect}: {e:#}\n{}", printed.text))
}

/// What every dialect expresses.
fn common(machine: &Machine) -> impl PartialEq + std::fmt::Debug {
    let mut drives: Vec<_> = machine
        .drives
        .iter()
        .map(|drive| (machine.position(drive), drive.kind, drive.device.clone()))
        .collect();
    drives.sort_by_key(|(position, _, _)| *position);
    let nics: Vec<_> = machine.nics.iter().map(|nic| (nic.model, nic.mac, nic.connected)).collect();
    let system = (machine.cpu, machine.memory, machine.firmware, machine.os);
    (machine.name.clone(), machine.description.clone(), system, drives, nics)
}

/// Controllers and adapters that all dialects know.
const MODELS: [NicModel; 3] = [NicModel::E1000, NicModel::E1000e, NicModel::Vmxnet3];
const SYSTEMS: [Os; 3] = [Os::Linux, Os::Windows10, Os::Windows8];

prop_compose! {
    fn machines()(
        name in "[a-z][a-z0-9-]{0,20}[a-z0-9]",
        lines in prop::collection::vec("[ -~äß]{1,20}", 0..3),
        (sockets, cores, mebibytes) in (1..9u32, 1..9u32, 16..100_000u64),
        (is_uefi, os) in (any::<bool>(), 0..3usize),
        scsi in prop::collection::btree_set(0..30u32, 0..6),
        sata in prop::collection::btree_set(0..6u32, 0..3),
        has_cdrom in any::<bool>(),
        nics in prop::collection::vec((0..3usize, any::<[u8; 5]>(), any::<bool>()), 0..4),
    ) -> Machine {
        // The UEFI firmware has no driver for the controller, so its drives would change the bus.
        let is_uefi = is_uefi && scsi.is_empty();
        let mut machine = Machine {
            name,
            description: lines.join("\n").trim().to_owned(),
            os: Some(SYSTEMS[os]),
            cpu: Cpu { sockets, cores },
            memory: Some(mebibytes << 20),
            firmware: if is_uefi { Firmware::Uefi } else { Firmware::Bios },
            ..Machine::default()
        };
        let scsi = scsi.into_iter().map(|place| (ControllerModel::Pvscsi, place));
        for (model, place) in scsi.chain(sata.into_iter().map(|place| (ControllerModel::Ahci, place))) {
            let mut drive = Drive::new(DriveKind::Disk, Some(&format!("disk-{}{place}", model.bus())));
            machine.attach(&mut drive, model, place);
            machine.drives.push(drive);
        }
        if has_cdrom && !is_uefi {
            let mut drive = Drive::new(DriveKind::Cdrom, None);
            machine.attach(&mut drive, ControllerModel::Ide, 2);
            machine.drives.push(drive);
        }
        for (model, [a, b, c, d, e], connected) in nics {
            let mac = Some(MacAddress([0x52, a, b, c, d, e]));
            machine.nics.push(Nic { mac, connected, ..Nic::new(MODELS[model]) });
        }
        machine
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_every_dialect_expresses_survives(machine in machines()) {
        let first = through_ovf(&machine);
        prop_assert_eq!(format!("{:?}", common(&first)), format!("{:?}", common(&machine)));
        let second = through_libvirt(&machine);
        prop_assert_eq!(format!("{:?}", common(&second)), format!("{:?}", common(&machine)));
        let third = through_proxmox(&machine);
        prop_assert_eq!(format!("{:?}", common(&third)), format!("{:?}", common(&machine)));
        let all = through_proxmox(&through_libvirt(&through_ovf(&through_proxmox(&machine))));
        prop_assert_eq!(format!("{:?}", common(&all)), format!("{:?}", common(&machine)));
    }

    #[test]
    fn no_text_breaks_out_of_its_place(text in "\\PC{0,40}|[\\x00-\\x7f]{0,40}", lines in any::<String>()) {
        let mut machine = Machine::of_disks(&text, ControllerModel::VirtioScsi, ["a"]);
        machine.description.clone_from(&lines);
        machine.nics.push(Nic { network: Some(text.clone()), ..Nic::new(NicModel::Virtio) });
        for again in [through_ovf(&machine), through_libvirt(&machine), through_proxmox(&machine)] {
            prop_assert_eq!(again.drives.len(), 1);
            prop_assert_eq!(again.drives[0].device.as_deref(), Some("a"));
            prop_assert_eq!(again.position(&again.drives[0]), Some((Bus::Scsi, 0)));
            prop_assert_eq!(again.nics.len(), 1);
            // Of the configuration, only comments and settings that the printer knows.
            prop_assert!(again.extra.is_empty(), "{:?}", again.extra);
        }
    }

    #[test]
    fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = (ovf::parse(&bytes, None), libvirt::parse(&bytes), proxmox::parse(&bytes));
    }
}
