//! Descriptors as VMware and VirtualBox write them, hostile ones, and our own.

use imgtool_core::ErrorKind;
use imgtool_core::machine::{
    Bus, Chipset, ControllerModel, Cpu, Drive, DriveKind, Firmware, Machine, Nic, NicModel, Os, Tpm,
};

use super::{Descriptor, PackagedDisk, padded, parse, print};

const VMWARE: &str = include_str!("samples/vmware.ovf");
const VIRTUALBOX: &str = include_str!("samples/virtualbox.ovf");

fn parsed(text: &str) -> Descriptor {
    parse(text.as_bytes(), None).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Changes VMware's descriptor, and returns the kind and the text of the error.
fn refused(old: &str, new: &str) -> (ErrorKind, String) {
    assert!(VMWARE.contains(old), "{old}");
    let error = parse(VMWARE.replacen(old, new, 1).as_bytes(), None).expect_err(new);
    (error.kind(), error.to_string())
}

#[test]
fn reads_a_machine_of_vmware() {
    let descriptor = parsed(VMWARE);
    let machine = &descriptor.machine;
    assert_eq!((&*machine.name, &*machine.description), ("web & more", "two\nlines"));
    assert_eq!(machine.os, Some(Os::Windows10));
    assert_eq!((machine.cpu, machine.memory), (Cpu { sockets: 2, cores: 2 }, Some(4 << 30)));
    assert_eq!((machine.firmware, machine.secure_boot), (Firmware::Uefi, true));
    let places: Vec<_> = machine.drives.iter().map(|d| (d.device.as_deref(), machine.position(d))).collect();
    assert_eq!(
        places,
        [
            (Some("web-1"), Some((Bus::Scsi, 0))),
            (Some("web-2"), Some((Bus::Scsi, 7))),
            (Some("empty"), Some((Bus::Scsi, 15))),
            (None, Some((Bus::Ide, 2))),
        ]
    );
    assert_eq!(machine.controller_of(&machine.drives[2]), Some(ControllerModel::Pvscsi));
    let [nic] = machine.nics.as_slice() else { panic!("{:?}", machine.nics) };
    assert_eq!((nic.model, nic.network.as_deref()), (NicModel::Vmxnet3, Some("VM Network")));
    assert_eq!(nic.mac.map(|mac| mac.to_string()).as_deref(), Some("00:50:56:00:00:01"));
    assert_eq!(machine.extra, ["floppy drive (Floppy)"]);
    let [_, second] = descriptor.files.as_slice() else { panic!("{:?}", descriptor.files) };
    assert_eq!((second.gzip, second.chunk_size, second.size), (true, Some(512), Some(900)));
    let disks: Vec<_> = descriptor.disks.iter().map(|d| (&*d.device, d.file, d.capacity)).collect();
    assert_eq!(
        disks,
        [
            ("web-1", Some(0), Some(16 << 30)),
            ("web-2", Some(1), Some(1 << 30)),
            ("empty", None, Some(2 << 30))
        ]
    );
    assert!(descriptor.notes.is_empty());
}

#[test]
fn reads_a_machine_of_virtualbox_in_ovf_2() {
    let machine = parsed(VIRTUALBOX).machine;
    assert_eq!((&*machine.name, machine.os), ("debian", Some(Os::Linux)));
    assert_eq!((machine.cpu.count(), machine.memory), (2, Some(1 << 30)));
    assert_eq!((machine.firmware, machine.tpm), (Firmware::Uefi, Some(Tpm::V2_0)));
    let [drive] = machine.drives.as_slice() else { panic!("{:?}", machine.drives) };
    assert_eq!(
        (drive.device.as_deref(), machine.position(drive)),
        (Some("debian-disk001"), Some((Bus::Sata, 0)))
    );
    assert_eq!(machine.nics[0].model, NicModel::E1000);
    assert_eq!(machine.extra, ["sound card (sound)"]);
}

#[test]
fn names_of_files_stay_in_the_package() {
    for name in ["../x.vmdk", "/etc/passwd", "a/b.vmdk", "..", ".", "", "http://x", "a\\b", "a&#10;b"] {
        let (kind, text) = refused("web-1.vmdk", name);
        assert_eq!(kind, ErrorKind::Refused, "{name}: {text}");
        assert!(text.contains("outside of the package"), "{text}");
    }
}

#[test]
fn refuses_descriptors_that_contradict_themselves() {
    use ErrorKind::{LimitExceeded, Malformed, Refused, Unsupported, WrongFormat};
    for (old, new, kind, part) in [
        ("envelope/1\" xmlns:cim", "envelope/9\" xmlns:cim", WrongFormat, "Envelope"),
        ("web-2.vmdk.gz", "web-1.vmdk", Malformed, "twice"),
        ("ovf:id=\"file2\"", "ovf:id=\"file1\"", Malformed, "twice"),
        ("ovf:fileRef=\"file1\"", "ovf:fileRef=\"other\"", Malformed, "not listed"),
        ("ovf:diskId=\"vmdisk2\"", "ovf:diskId=\"vmdisk1\"", Malformed, "twice"),
        ("ovf:diskId=\"vmdisk2\"", "ovf:diskId=\"vmdisk2\" ovf:parentRef=\"vmdisk1\"", Unsupported, "delta"),
        ("ovf:size=\"68096\"", "ovf:size=\"+1\"", Malformed, "size"),
        ("ovf:size=\"68096\"", "ovf:size=\"99999999999999999999\"", Malformed, "size"),
        ("ovf:capacity=\"16\"", "ovf:capacity=\"99999999999\"", Malformed, "capacity"),
        ("byte * 2^30", "byte * 2^99", Malformed, "capacity"),
        ("ovf:chunkSize=\"512\"", "ovf:chunkSize=\"0\"", Malformed, "0 bytes"),
        ("\"gzip\"", "\"lzma\"", Unsupported, "lzma"),
        ("Quantity>4<", "Quantity>0<", Malformed, "'0' processors"),
        ("Quantity>4096<", "Quantity>many<", Malformed, "memory of 'many'"),
        ("ovf:/disk/vmdisk1", "ovf:/disk/vmdisk9", Malformed, "not described"),
        ("ovf:/disk/vmdisk1", "ovf:/disk/vmdisk2", Unsupported, "shares"),
        ("</VirtualSystem>", "</VirtualSystem><VirtualSystem ovf:id=\"b\"/>", Unsupported, "web & more, b"),
        ("<?xml version=\"1.0\" encoding=\"UTF-8\"?>", "<!DOCTYPE a>", Unsupported, "document type"),
        ("web-1.vmdk", "x/web-1.vmdk", Refused, "outside"),
        ("</References>", &format!("</References>{}", "<a>".repeat(64)), LimitExceeded, "levels"),
    ] {
        let (found, text) = refused(old, new);
        assert_eq!(found, kind, "{new}: {text}");
        assert!(text.contains(part), "{new}: {text}");
    }
}

#[test]
fn one_of_several_systems_can_be_chosen() {
    let two = VMWARE.replacen("</VirtualSystem>", "</VirtualSystem><VirtualSystem ovf:id=\"b\"/>", 1);
    let chosen = |name| parse(two.as_bytes(), Some(name));
    assert_eq!(chosen("web & more").expect("a machine").machine.drives.len(), 4);
    let other = chosen("b").expect("a machine");
    assert!(other.machine.drives.is_empty());
    assert!(other.notes[0].contains("web-1, web-2, empty"), "{:?}", other.notes);
    assert_eq!(chosen("c").map_err(|e| e.kind()).err(), Some(ErrorKind::Usage));
}

#[test]
fn drives_without_a_valid_place_get_a_free_one() {
    // The second disk wants the place of the first one, the third the number of the controller.
    let text = VMWARE.replacen("OnParent>8<", "OnParent>0<", 1).replacen(
        "<rasd:AddressOnParent>0</rasd:AddressOnParent>\n        <rasd:ElementName>Hard disk 3",
        "<rasd:AddressOnParent>7</rasd:AddressOnParent>\n        <rasd:ElementName>Hard disk 3",
        1,
    );
    let machine = parsed(&text).machine;
    let units: Vec<u32> = machine.drives.iter().map(|drive| drive.unit).collect();
    assert_eq!(units, [0, 1, 0, 0]);
    // A parent that is no controller.
    let machine = parsed(&VMWARE.replacen("Parent>4<", "Parent>99<", 1)).machine;
    assert_eq!(machine.position(&machine.drives[2]), Some((Bus::Ide, 0)));
}

/// A machine that OVF expresses as it is.
fn machine() -> Machine {
    let mut machine = Machine {
        name: "web <1>".to_owned(),
        description: "first\nsecond".to_owned(),
        os: Some(Os::Linux),
        cpu: Cpu { sockets: 2, cores: 4 },
        memory: Some(3 << 30),
        firmware: Firmware::Uefi,
        secure_boot: true,
        ..Machine::of_disks("", ControllerModel::Pvscsi, ["drive-scsi0", "drive-scsi1"])
    };
    for (model, position) in
        [(ControllerModel::Pvscsi, 9), (ControllerModel::Ahci, 0), (ControllerModel::Pvscsi, 17)]
    {
        let mut drive = Drive::new(DriveKind::Disk, Some(&format!("{model}-{position}")));
        assert!(machine.attach(&mut drive, model, position));
        machine.drives.push(drive);
    }
    let mut cdrom = Drive::new(DriveKind::Cdrom, None);
    assert!(machine.attach(&mut cdrom, ControllerModel::Ide, 2));
    machine.drives.push(cdrom);
    let mac = "BC:24:11:00:00:01".parse().ok();
    machine.nics.push(Nic { mac, network: Some("vmbr0".to_owned()), ..Nic::new(NicModel::Vmxnet3) });
    machine.nics.push(Nic {
        network: Some("b & c".to_owned()),
        connected: false,
        ..Nic::new(NicModel::E1000e)
    });
    machine
}

fn packaged(names: &[String]) -> Vec<(String, String)> {
    names.iter().map(|name| (name.clone(), format!("{name}.vmdk"))).collect()
}

fn printed(machine: &Machine) -> (crate::Printed, Vec<String>) {
    let names: Vec<String> = machine.drives.iter().filter_map(|drive| drive.device.clone()).collect();
    let names_and_files = packaged(&names);
    let disks: Vec<PackagedDisk<'_>> = names_and_files
        .iter()
        .map(|(device, href)| PackagedDisk {
            device,
            href,
            len: Some(68_096),
            capacity: 1 << 30,
            format: "urn:x",
        })
        .collect();
    (print(machine, &disks), names)
}

/// The device of a drive, its place and its controller.
type Place = (Option<String>, Option<(Bus, u32)>, Option<ControllerModel>);

/// The places of the drives, whatever the controllers without drives.
fn places(machine: &Machine) -> Vec<Place> {
    let mut places: Vec<_> = machine
        .drives
        .iter()
        .map(|drive| (drive.device.clone(), machine.position(drive), machine.controller_of(drive)))
        .collect();
    places.sort_by_key(|(_, position, _)| *position);
    places
}

#[test]
fn our_descriptor_reads_as_the_machine() {
    let machine = machine();
    let (printed, names) = printed(&machine);
    assert!(printed.lost.is_empty(), "{:?}", printed.lost);
    let descriptor = parsed(&printed.text);
    let again = &descriptor.machine;
    assert_eq!(places(again), places(&machine), "{}", printed.text);
    assert_eq!(again.nics, machine.nics);
    let same = |machine: &Machine| Machine { controllers: Vec::new(), drives: Vec::new(), ..machine.clone() };
    assert_eq!(same(again), same(&machine));
    assert_eq!(descriptor.disks.iter().map(|disk| disk.device.clone()).collect::<Vec<_>>(), names);
    assert_eq!(descriptor.files[1].href, "drive-scsi1.vmdk");
    assert_eq!((descriptor.files[0].size, descriptor.disks[0].capacity), (Some(68_096), Some(1 << 30)));
}

#[test]
fn lists_what_ovf_has_no_place_for() {
    let mut machine = Machine::of_disks("a", ControllerModel::VirtioScsiSingle, ["drive-scsi0"]);
    machine.chipset = Some(Chipset::Q35);
    machine.tpm = Some(Tpm::V2_0);
    machine.drives.push(Drive::new(DriveKind::EfiVars, Some("drive-efidisk0")));
    let mut virtio = Drive::new(DriveKind::Disk, Some("drive-virtio0"));
    machine.attach(&mut virtio, ControllerModel::VirtioBlk, 0);
    machine.drives.push(virtio);
    machine.nics.push(Nic { boot: Some(1), ..Nic::new(NicModel::Virtio) });
    machine.extra.push("agent 1".to_owned());
    let (printed, _) = printed(&machine);
    for part in [
        "chipset q35",
        "TPM 2.0",
        "drive-scsi0: virtio-scsi-single: becomes VirtualSCSI",
        "drive-virtio0: virtio-blk: becomes VirtualSCSI",
        "drive-efidisk0: firmware variables",
        "model virtio of network adapter 0: becomes VmxNet3",
        "boot order",
        "the OVF descriptor lacks agent 1",
    ] {
        assert!(printed.lost.iter().any(|line| line.contains(part)), "{part}: {:?}", printed.lost);
    }
    let again = parsed(&printed.text).machine;
    // The firmware's variables are in the package, but no disk of the machine.
    let names: Vec<_> = again.drives.iter().map(|drive| drive.device.as_deref()).collect();
    assert_eq!(names, [Some("drive-scsi0"), Some("drive-virtio0")]);
    assert_eq!(again.position(&again.drives[1]), Some((Bus::Scsi, 15)));
}

/// A machine with a drive of each of these models, each at the first place, and its descriptor.
fn of_models(models: &[ControllerModel], boot: Option<usize>) -> crate::Printed {
    let mut machine = Machine::default();
    for model in models {
        let mut drive = Drive::new(DriveKind::Disk, Some(model.name()));
        assert!(machine.attach(&mut drive, *model, 0));
        machine.drives.push(drive);
    }
    if let Some(boot) = boot {
        machine.drives[boot].boot = Some(0);
    }
    printed(&machine).0
}

#[test]
fn boot_disk_comes_first() {
    use ControllerModel::{Ahci, Pvscsi, VirtioBlk};
    let printed = of_models(&[Pvscsi, Ahci, VirtioBlk], Some(2));
    assert!(!printed.lost.iter().any(|line| line.contains("boot order")), "{:?}", printed.lost);
    let descriptor = parsed(&printed.text);
    let devices: Vec<_> = descriptor.disks.iter().map(|disk| &*disk.device).collect();
    assert_eq!(devices, ["virtio-blk", "pvscsi", "ahci"]);
    let machine = &descriptor.machine;
    let drives: Vec<_> = machine.drives.iter().map(|d| (d.device.as_deref(), machine.position(d))).collect();
    // The BIOS boots from the first SCSI controller.
    assert_eq!(
        drives,
        [
            (Some("virtio-blk"), Some((Bus::Scsi, 0))),
            (Some("pvscsi"), Some((Bus::Scsi, 15))),
            (Some("ahci"), Some((Bus::Sata, 0))),
        ]
    );
    let first = printed.text.split("ovf:/disk/").nth(1).expect("a drive");
    assert!(first.starts_with("vmdisk3<"), "{}", printed.text);
    // On the way back, the same disk boots, and a line says so.
    let settings = crate::proxmox::settings(machine);
    assert_eq!(settings.config.get("boot"), Some("order=scsi0"));
    let line = "boot order: the source states none; boots from virtio-blk";
    assert!(settings.lost.iter().any(|known| known == line), "{:?}", settings.lost);
    let disk = |device| crate::libvirt::DiskSource { device, path: "/x", format: "raw" };
    let domain = crate::libvirt::print(machine, &["ahci", "virtio-blk", "pvscsi"].map(disk));
    assert!(domain.lost.iter().any(|known| known == line), "{:?}", domain.lost);
    let domain = crate::libvirt::parse(domain.text.as_bytes()).expect("a domain");
    assert_eq!(domain.drive("x").and_then(|drive| drive.boot), Some(0));
}

#[test]
fn unknown_boot_order_of_several_disks_gets_a_line() {
    use ControllerModel::{Ahci, Pvscsi};
    let printed = of_models(&[Pvscsi, Ahci], None);
    let line = "the OVF descriptor lacks boot order: the firmware of the platform chooses, pvscsi is its \
                first disk";
    assert_eq!(printed.lost, [line]);
    assert!(of_models(&[Pvscsi], None).lost.is_empty());
}

/// A descriptor with a disk `d` in a file `f`, and with these items.
fn of_items(items: &[&[(&str, &str)]]) -> Descriptor {
    let item = |settings: &&[(&str, &str)]| {
        let settings: String =
            settings.iter().map(|(key, value)| format!("<{key}>{value}</{key}>")).collect();
        format!("<Item>{settings}</Item>")
    };
    let items: String = items.iter().map(item).collect();
    parsed(&format!(
        "<Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References><File ovf:href=\"a.vmdk\" \
         ovf:id=\"f\"/></References><DiskSection><Disk ovf:diskId=\"d\" ovf:fileRef=\"f\" \
         ovf:capacity=\"1\"/></DiskSection><VirtualSystem ovf:id=\"web\"><VirtualHardwareSection>{items}\
         </VirtualHardwareSection></VirtualSystem></Envelope>"
    ))
}

#[test]
fn a_disk_can_be_named_by_its_file() {
    for resource in ["ovf:/file/f", "ovf:/disk/d", "disk/d"] {
        let machine = of_items(&[&[("ResourceType", "17"), ("HostResource", resource)]]).machine;
        assert_eq!(machine.drives[0].device.as_deref(), Some("a"), "{resource}");
    }
}

#[test]
fn drives_beside_the_disks_never_refuse_a_package() {
    let cdrom: &[(&str, &str)] = &[("ResourceType", "15"), ("ElementName", "cd")];
    let ide: &[(&str, &str)] = &[("ResourceType", "5"), ("InstanceID", "3"), ("Address", "0")];
    let scsi: &[(&str, &str)] = &[("ResourceType", "6"), ("InstanceID", "4"), ("Address", "0")];
    let disk: &[(&str, &str)] = &[("ResourceType", "17"), ("Parent", "4"), ("HostResource", "ovf:/disk/d")];
    let empty: &[(&str, &str)] = &[("ResourceType", "17"), ("Parent", "4"), ("ElementName", "none")];
    let machine = of_items(&[ide, scsi, cdrom, cdrom, cdrom, disk, empty]).machine;
    let places: Vec<_> = machine.drives.iter().map(|drive| machine.position(drive)).collect();
    // The third CD drive finds the IDE channel full, and the disk finds its own controller.
    let scsi = |place| Some((Bus::Scsi, place));
    assert_eq!(places, [scsi(1), Some((Bus::Ide, 0)), Some((Bus::Ide, 1)), scsi(0)]);
    assert_eq!(machine.extra, ["drive 'none': the descriptor names no disk for it"]);
    let machine = of_items(&[ide, cdrom, cdrom, cdrom]).machine;
    assert_eq!((machine.drives.len(), &*machine.extra[0]), (2, "CD drive (cd): its controller is full"));
}

#[test]
fn addresses_of_adapters_are_read_in_all_forms_or_named() {
    let nic: &[(&str, &str)] = &[("ResourceType", "10"), ("Address", "080027AABBCC")];
    let other: &[(&str, &str)] = &[("ResourceType", "10"), ("Address", "8:0:27")];
    let machine = of_items(&[nic, other]).machine;
    assert_eq!(machine.nics[0].mac.map(|mac| mac.to_string()).as_deref(), Some("08:00:27:AA:BB:CC"));
    assert_eq!(machine.nics[1].mac, None);
    assert_eq!(machine.extra, ["address '8:0:27' of network adapter 1: no MAC address"]);
}

#[test]
fn disks_without_a_drive_get_free_places() {
    let machine = Machine::of_disks("a", ControllerModel::LsiLogic, ["x"]);
    let disk = |device, href| PackagedDisk { device, href, len: None, capacity: 512, format: "" };
    let text = print(&machine, &[disk("x", "x.vmdk"), disk("y", "y.vmdk")]).text;
    assert!(!text.contains("ovf:size"), "{text}");
    let again = parsed(&text).machine;
    assert_eq!(again.position(again.drive("y").expect("a drive")), Some((Bus::Scsi, 1)));
}

#[test]
fn more_controllers_than_importers_take_get_a_line() {
    let names: Vec<String> = (0..61).map(|number| format!("d{number}")).collect();
    let lost = |count: usize| {
        let names = names[..count].iter().map(String::as_str);
        let machine = Machine::of_disks("a", ControllerModel::LsiLogic, names.clone());
        let disk = |device| PackagedDisk { device, href: device, len: None, capacity: 512, format: "" };
        print(&machine, &names.map(disk).collect::<Vec<_>>()).lost.join("\n")
    };
    assert!(!lost(60).contains("controllers"), "{}", lost(60));
    assert!(lost(61).contains("5 scsi controllers: VMware's programs take 4"), "{}", lost(61));
}

#[test]
fn the_note_on_disks_without_a_drive_is_short() {
    let names: Vec<String> = (0..100).map(|number| format!("d{number}.vmdk")).collect();
    let disk = |href| PackagedDisk { device: href, href, len: None, capacity: 512, format: "" };
    let disks: Vec<_> = names.iter().map(|name| disk(name.as_str())).collect();
    let text = print(&Machine::default(), &disks).text;
    let text =
        text.replace("<rasd:HostResource>", "<rasd:Other>").replace("</rasd:HostResource>", "</rasd:Other>");
    let notes = parsed(&text).notes.join("\n");
    assert!(notes.contains("d0, d1, d2, d3, d4 and others") && !notes.contains("d5"), "{notes}");
}

#[test]
fn padding_keeps_the_descriptor() {
    let (printed, _) = printed(&machine());
    let len = printed.text.len();
    let padded_text = padded(&printed.text, len + 100).expect("room");
    assert_eq!(padded_text.len(), len + 100);
    assert_eq!(parsed(&padded_text).machine, parsed(&printed.text).machine);
    assert_eq!(padded(&printed.text, len).as_deref(), Some(&*printed.text));
    assert_eq!(padded(&printed.text, len - 1), None);
}

#[test]
fn items_have_the_order_of_the_schema() {
    let (printed, _) = printed(&machine());
    for item in printed.text.split("<Item>").skip(1) {
        let names = item.split("<rasd:").skip(1).filter_map(|rest| rest.split('>').next());
        let names: Vec<&str> = names.collect();
        assert!(names.is_sorted() && names.contains(&"ElementName"), "{names:?}");
    }
    // Proxmox VE joins lines without their line feeds: none may begin inside of a tag.
    assert!(printed.text.lines().skip(1).all(|line| line.trim_start().starts_with('<')), "{}", printed.text);
}
