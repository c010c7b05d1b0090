//! Domains as libvirt prints them, hostile ones, and our own.

use imgtool_core::ErrorKind;
use imgtool_core::machine::{
    Arch, Bus, Chipset, ControllerModel, Cpu, Drive, DriveKind, Firmware, Machine, Nic, NicModel, Os, Tpm,
};

use super::print::letter;
use super::{DiskSource, parse, print};

const DOMAIN: &str = "<domain type='kvm' id='1' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>3e1b0ee5-0000-4000-8000-000000000001</uuid>
  <metadata><libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>
    <libosinfo:os id='http://debian.org/debian/12'/></libosinfo:libosinfo></metadata>
  <memory unit='GiB'>2</memory><currentMemory unit='KiB'>1048576</currentMemory><vcpu placement='static'>8</vcpu>
  <os><type arch='x86_64' machine='pc-q35-8.2'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <kernel>/boot/vmlinuz</kernel><boot dev='hd'/></os>
  <cpu mode='host-model'><topology sockets='2' dies='1' cores='2' threads='2'/></cpu>
  <devices>
    <emulator>/bin/sh</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/a.qcow2'/>
      <target dev='sdb' bus='scsi'/><boot order='2'/>
      <address type='drive' controller='1' bus='0' target='0' unit='3'/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='vdaa' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sdc' bus='sata'/><readonly/></disk>
    <disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>
    <controller type='scsi' index='0' model='lsilogic'/><controller type='scsi' index='1' model='virtio-scsi'/>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/>
      <boot order='1'/></interface>
    <interface type='ethernet'><script path='/tmp/evil'/><model type='e1000'/></interface>
    <hostdev mode='subsystem' type='pci'/><tpm model='tpm-tis'><backend type='emulator' version='1.2'/></tpm>
    <sound model='ich9'/><video><model type='qxl'/></video>
  </devices>
  <qemu:commandline><qemu:arg value='-device'/></qemu:commandline>
</domain>";

#[test]
fn reads_a_domain() {
    let machine = parse(DOMAIN.as_bytes()).expect("a domain");
    assert_eq!((&*machine.name, machine.os), ("web", Some(Os::Linux)));
    assert_eq!((machine.cpu, machine.memory), (Cpu { sockets: 2, cores: 4 }, Some(2 << 30)));
    assert_eq!((machine.firmware, machine.secure_boot), (Firmware::Uefi, true));
    assert_eq!((machine.chipset, machine.tpm), (Some(Chipset::Q35), Some(Tpm::V1_2)));
    let drives: Vec<_> = machine
        .drives
        .iter()
        .map(|drive| {
            (drive.kind, drive.device.as_deref(), machine.position(drive), machine.controller_of(drive))
        })
        .collect();
    assert_eq!(
        drives,
        [
            (DriveKind::Disk, Some("a"), Some((Bus::Scsi, 18)), Some(ControllerModel::VirtioScsi)),
            (DriveKind::Disk, Some("b"), Some((Bus::Virtio, 26)), Some(ControllerModel::VirtioBlk)),
            (DriveKind::Cdrom, None, Some((Bus::Sata, 2)), Some(ControllerModel::Ahci)),
        ]
    );
    assert_eq!(machine.nics[0].network.as_deref(), Some("br0"));
    assert_eq!((machine.nics[0].boot, machine.drives[0].boot), (Some(0), Some(1)));
    for part in [
        "kernel: a file of the host",
        "content of the CD drive sdc",
        "floppy fda",
        "interface 1: its device of the host",
        "hostdev: concerns the host",
        "sound ich9",
        "options for QEMU",
    ] {
        assert!(machine.extra.iter().any(|line| line.contains(part)), "{part}: {:?}", machine.extra);
    }
    let text = print(&machine, &[]).text;
    for word in ["evil", "/bin/sh", "vmlinuz", "-device", "hostdev", "commandline"] {
        assert!(!text.contains(word), "{text}");
    }
}

#[test]
fn refuses_what_is_no_domain() {
    for (old, new, kind) in [
        ("<domain ", "<network ", ErrorKind::Malformed),
        (">8</vcpu>", ">0</vcpu>", ErrorKind::Malformed),
        (">8</vcpu>", ">5000</vcpu>", ErrorKind::Malformed),
        ("'GiB'>2<", "'GiB'>99999999999999<", ErrorKind::Malformed),
        ("'GiB'>2<", "'acres'>2<", ErrorKind::Malformed),
        ("dev='vdaa'", "dev='vdzzzz'", ErrorKind::Malformed),
        ("unit='3'", "unit='4294967295'", ErrorKind::Malformed),
        ("<domain ", "<!DOCTYPE x><domain ", ErrorKind::Unsupported),
    ] {
        assert!(DOMAIN.contains(old), "{old}");
        let error = parse(DOMAIN.replacen(old, new, 1).as_bytes()).expect_err(new);
        assert_eq!(error.kind(), kind, "{new}: {error}");
    }
    assert_eq!(parse(b"<network/>").map_err(|e| e.kind()).err(), Some(ErrorKind::WrongFormat));
}

/// A machine that libvirt expresses as it is, with drives of every bus.
fn machine() -> Machine {
    let mut machine = Machine {
        name: "web & more".to_owned(),
        description: "first\nsecond".to_owned(),
        uuid: uuid::Uuid::parse_str("3e1b0ee5-0000-4000-8000-000000000001").ok(),
        os: Some(Os::Windows10),
        chipset: Some(Chipset::I440fx),
        cpu: Cpu { sockets: 2, cores: 3 },
        memory: Some(3 << 30),
        firmware: Firmware::Uefi,
        tpm: Some(Tpm::V2_0),
        ..Machine::default()
    };
    for (model, position) in [
        (ControllerModel::VirtioScsi, 0),
        (ControllerModel::VirtioScsi, 17),
        (ControllerModel::VirtioBlk, 1),
        (ControllerModel::Ahci, 7),
        (ControllerModel::Ide, 3),
    ] {
        let mut drive = Drive::new(DriveKind::Disk, Some(&format!("{}{position}", model.bus())));
        assert!(machine.attach(&mut drive, model, position));
        machine.drives.push(drive);
    }
    let mut cdrom = Drive::new(DriveKind::Cdrom, None);
    assert!(machine.attach(&mut cdrom, ControllerModel::Ide, 2));
    machine.drives.push(cdrom);
    machine.drives[2].boot = Some(0);
    machine.drives[1].read_only = true;
    machine.nics.push(Nic {
        mac: "52:54:00:00:00:01".parse().ok(),
        boot: Some(1),
        ..Nic::new(NicModel::Virtio)
    });
    machine.nics.push(Nic { connected: false, ..Nic::new(NicModel::Rtl8139) });
    machine
}

fn printed(machine: &Machine) -> crate::Printed {
    let names: Vec<String> = machine.drives.iter().filter_map(|drive| drive.device.clone()).collect();
    let paths: Vec<String> = names.iter().map(|name| format!("/disks/{name}.qcow2")).collect();
    let disks: Vec<DiskSource<'_>> =
        names.iter().zip(&paths).map(|(device, path)| DiskSource { device, path, format: "qcow2" }).collect();
    print(machine, &disks)
}

#[test]
fn our_domain_reads_as_the_machine() {
    let machine = machine();
    let printed = printed(&machine);
    assert!(printed.lost.is_empty(), "{:?}", printed.lost);
    let again = parse(printed.text.as_bytes()).expect("a domain");
    let places = |machine: &Machine| -> Vec<_> {
        let place = |d: &Drive| (d.device.clone(), machine.position(d), d.boot, d.read_only);
        machine.drives.iter().map(place).collect()
    };
    assert_eq!(places(&again), places(&machine), "{}", printed.text);
    let others =
        |machine: &Machine| Machine { drives: Vec::new(), controllers: Vec::new(), ..machine.clone() };
    assert_eq!(others(&again), others(&machine));
    assert!(printed.text.contains("<source file='/disks/scsi0.qcow2'/>"), "{}", printed.text);
}

#[test]
fn q35_has_no_ide_and_secure_boot_needs_q35() {
    let mut machine = machine();
    machine.secure_boot = true;
    let printed = printed(&machine);
    let again = parse(printed.text.as_bytes()).expect("a domain");
    assert_eq!((again.chipset, again.secure_boot), (Some(Chipset::Q35), true));
    assert!(again.controllers.iter().all(|one| one.model != ControllerModel::Ide));
    let lost = printed.lost.join("\n");
    assert!(lost.contains("chipset i440fx") && lost.contains("ide3: controller ide becomes ahci"), "{lost}");
}

/// A machine with these drives: the controller's number, its model and the place on it.
fn of_scsi(drives: &[(u32, ControllerModel, u32)]) -> Machine {
    let mut machine = Machine::default();
    for (number, model, unit) in drives {
        let mut drive = Drive::new(DriveKind::Disk, Some(&format!("d{number}-{unit}")));
        assert!(machine.attach(&mut drive, *model, number * model.units() + unit));
        machine.drives.push(drive);
    }
    machine.drives[0].boot = Some(0);
    machine
}

/// Returns the start tags of the elements of this name with these attributes.
fn tags<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    text.split(start).skip(1).filter_map(|rest| rest.split("/>").next()).map(str::trim).collect()
}

#[test]
fn scsi_controllers_keep_their_numbers_and_models() {
    use ControllerModel::{LsiLogic, LsiSas1068, MegaSas, Pvscsi, VirtioScsi};
    let machine = of_scsi(&[
        (0, LsiSas1068, 0),
        (0, LsiSas1068, 3),
        (1, Pvscsi, 0),
        (1, Pvscsi, 14),
        (2, MegaSas, 2),
        (3, VirtioScsi, 5),
        (4, LsiLogic, 6),
    ]);
    let printed = printed(&machine);
    assert!(printed.lost.is_empty(), "{:?}", printed.lost);
    assert_eq!(
        tags(&printed.text, "<address type='drive'"),
        [
            "controller='0' bus='0' target='0' unit='0'",
            "controller='0' bus='0' target='3' unit='0'",
            "controller='1' bus='0' target='0' unit='0'",
            "controller='1' bus='0' target='14' unit='0'",
            "controller='2' bus='0' target='2' unit='0'",
            "controller='3' bus='0' target='0' unit='5'",
            "controller='4' bus='0' target='0' unit='6'",
        ]
    );
    assert_eq!(
        tags(&printed.text, "<controller type='scsi'"),
        [
            "index='0' model='lsisas1068'",
            "index='1' model='vmpvscsi'",
            "index='2' model='lsisas1078'",
            "index='3' model='virtio-scsi'",
            "index='4' model='lsilogic'",
        ]
    );
    let again = parse(printed.text.as_bytes()).expect("a domain");
    let places = |machine: &Machine| -> Vec<_> {
        machine.drives.iter().map(|drive| (machine.position(drive), machine.controller_of(drive))).collect()
    };
    assert_eq!(places(&again), places(&machine));
}

#[test]
fn drives_beyond_the_width_of_a_controller_get_another_one() {
    use ControllerModel::{LsiLogic, LsiSas1068};
    let text = printed(&of_scsi(&[(0, LsiLogic, 14), (0, LsiLogic, 0), (1, LsiSas1068, 8)])).text;
    assert_eq!(
        tags(&text, "<address type='drive'"),
        [
            "controller='1' bus='0' target='0' unit='0'",
            "controller='0' bus='0' target='0' unit='0'",
            "controller='2' bus='0' target='0' unit='0'",
        ]
    );
    let models = ["lsilogic", "lsilogic", "lsisas1068"];
    for (index, model) in models.iter().enumerate() {
        assert!(text.contains(&format!("index='{index}' model='{model}'")), "{text}");
    }
}

/// OVMF has no driver for most SCSI controllers. A drive that was on SATA keeps its place.
#[test]
fn uefi_guests_boot_from_sata_instead_of_controllers_without_a_driver() {
    use ControllerModel::{LsiLogic, LsiSas1068, MegaSas, Pvscsi, VirtioScsi};
    for model in [LsiLogic, LsiSas1068, MegaSas, Pvscsi] {
        let mut machine = of_scsi(&[(0, model, 0), (0, model, 3)]);
        let mut drive = Drive::new(DriveKind::Disk, Some("d0-1"));
        assert!(machine.attach(&mut drive, ControllerModel::Ahci, 0));
        machine.drives.push(drive);
        machine.firmware = Firmware::Uefi;
        let printed = printed(&machine);
        assert!(!printed.text.contains("type='scsi'"), "{}", printed.text);
        let units: Vec<_> = tags(&printed.text, "<address type='drive'");
        let place = |unit| format!("controller='0' bus='0' target='0' unit='{unit}'");
        assert_eq!(units, [place(0), place(1), place(2)], "{}", printed.text);
        let line = format!("controller {model} becomes {}, since the UEFI firmware", ControllerModel::Ahci);
        assert!(printed.lost.iter().any(|lost| lost.contains(&line)), "{:?}", printed.lost);
    }
    let mut machine = of_scsi(&[(0, VirtioScsi, 0)]);
    machine.firmware = Firmware::Uefi;
    assert!(printed(&machine).text.contains("model='virtio-scsi'"));
}

#[test]
fn buslogic_becomes_lsilogic() {
    let printed = printed(&of_scsi(&[(0, ControllerModel::BusLogic, 1)]));
    assert!(printed.text.contains("model='lsilogic'") && !printed.text.contains("buslogic"));
    assert_eq!(printed.lost, ["d0-1: controller buslogic becomes lsilogic"]);
}

#[test]
fn unreadable_addresses_of_adapters_get_a_line() {
    let machine = of_devices("<interface type='network'><mac address='52:54'/></interface>");
    assert_eq!(machine.extra, ["address '52:54' of network adapter 0: no MAC address"]);
}

/// A domain with these devices.
fn of_devices(devices: &str) -> Machine {
    let text = format!("<domain><vcpu>1</vcpu><devices>{devices}</devices></domain>");
    parse(text.as_bytes()).expect("a domain")
}

fn disk(name: &str, bus: &str, address: &str) -> String {
    format!(
        "<disk device='disk'><source file='/{name}.raw'/><target dev='{name}' bus='{bus}'/><address \
         type='drive' {address}/></disk>"
    )
}

#[test]
fn targets_of_scsi_drives_are_places() {
    let controller = |index, model| format!("<controller type='scsi' index='{index}' model='{model}'/>");
    let machine = of_devices(
        &[
            controller(0, "vmpvscsi"),
            controller(1, "lsilogic"),
            disk("sda", "scsi", "controller='0' target='0' unit='0'"),
            disk("sdb", "scsi", "controller='0' target='1' unit='0'"),
            disk("sdc", "scsi", "controller='1' target='0' unit='3'"),
            // The place of sdb, and one beyond the controller's places.
            disk("sdd", "scsi", "controller='0' target='0' unit='1'"),
            disk("sde", "scsi", "controller='0' target='40' unit='0'"),
        ]
        .concat(),
    );
    let places: Vec<_> = machine
        .drives
        .iter()
        .map(|drive| (machine.position(drive).map(|(_, place)| place), machine.controller_of(drive)))
        .collect();
    let (pvscsi, lsi) = (Some(ControllerModel::Pvscsi), Some(ControllerModel::LsiLogic));
    assert_eq!(
        places,
        [(Some(0), pvscsi), (Some(1), pvscsi), (Some(18), lsi), (Some(2), pvscsi), (Some(3), pvscsi)]
    );
}

#[test]
fn all_names_of_virtio_are_known_and_others_get_a_line() {
    for name in ["virtio-scsi", "virtio-transitional", "virtio-non-transitional"] {
        let controller = format!("<controller type='scsi' index='0' model='{name}'/>");
        let machine = of_devices(&(controller + &disk("sda", "scsi", "controller='0' unit='0'")));
        assert_eq!(machine.controller_of(&machine.drives[0]), Some(ControllerModel::VirtioScsi), "{name}");
        assert!(machine.extra.is_empty(), "{:?}", machine.extra);
    }
    for name in ["virtio", "virtio-transitional", "virtio-non-transitional"] {
        let machine = of_devices(&format!("<interface type='network'><model type='{name}'/></interface>"));
        assert_eq!((machine.nics[0].model, machine.extra.len()), (NicModel::Virtio, 0), "{name}");
    }
    let machine = of_devices(
        &("<controller type='scsi' index='0' model='am53c974'/>".to_owned()
            + &disk("sda", "scsi", "controller='0' unit='0'")
            + &disk("sdb", "usb", "controller='0' unit='1'")),
    );
    assert_eq!(
        machine.extra,
        [
            "SCSI controller of the model 'am53c974' (becomes lsilogic)",
            "bus usb of the drive sdb (becomes sata)"
        ]
    );
}

#[test]
fn targets_and_places_are_unique() {
    let mut machine = Machine { chipset: Some(Chipset::Q35), arch: Arch::Aarch64, ..Machine::default() };
    for model in ControllerModel::ALL {
        for position in [0, 1, 14, 40] {
            let mut drive = Drive::new(DriveKind::Disk, Some(&format!("{model}-{position}")));
            assert!(machine.attach(&mut drive, *model, position));
            machine.drives.push(drive);
        }
    }
    let text = printed(&machine).text;
    let parts = |start: &str| -> Vec<String> {
        let all = text.split(start).skip(1).filter_map(|rest| rest.split("/>").next());
        all.map(str::to_owned).collect()
    };
    let targets = parts("<target dev=");
    let unique: std::collections::BTreeSet<&String> = targets.iter().collect();
    assert_eq!((targets.len(), unique.len()), (machine.drives.len(), machine.drives.len()), "{text}");
    let again = parse(text.as_bytes()).expect("a domain");
    let places: std::collections::BTreeSet<_> =
        again.drives.iter().map(|drive| again.position(drive)).collect();
    assert_eq!(places.len(), machine.drives.len(), "{text}");
}

#[test]
fn names_of_domains_are_names_of_files() {
    let name = |name: &str| {
        let machine = Machine { name: name.to_owned(), ..Machine::default() };
        parse(print(&machine, &[]).text.as_bytes()).expect("a domain").name
    };
    assert_eq!(name("a/b\nc"), "a-b-c");
    assert_eq!(name(""), "vm");
    assert_eq!(name(".."), "vm");
    assert_eq!(name(&"ä".repeat(100)).len(), 64);
}

#[test]
fn letters_count_on_after_z() {
    for (number, letters) in [(0, "a"), (25, "z"), (26, "aa"), (51, "az"), (52, "ba"), (702, "aaa")] {
        assert_eq!(letter(number), letters);
    }
}
