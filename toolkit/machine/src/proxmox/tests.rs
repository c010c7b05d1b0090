//! Configurations as Proxmox VE writes them, into the machine and back.

use imgtool_core::machine::{
    Bus, Chipset, ControllerModel, Drive, DriveKind, Firmware, Machine, Nic, NicModel, Os, Tpm,
};
use imgtool_core::{Device, ErrorKind};

use super::{GuestConfig, for_archive, keys, parse, settings};

const GUEST: &str = "#web server%3A first line\n#100%25\nagent: 1\nargs: -device evil\nbios: ovmf\n\
    boot: order=scsi0;ide2;net0\ncores: 4\ncpu: host\n\
    efidisk0: local-lvm:vm-100-disk-0,efitype=4m,pre-enrolled-keys=1,size=4M\nhookscript: local:snippets/x.pl\n\
    hostpci0: 0000:01:00.0\nide2: local:iso/debian.iso,media=cdrom\nmachine: pc-q35-9.0\nmemory: 8192\nname: web\n\
    net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1\nnet10: e1000,bridge=vmbr1,link_down=1\n\
    net2: vmxnet3=BC:24:11:00:00:02,bridge=vmbr0\nostype: l26\n\
    sata1: local-lvm:vm-100-disk-4,backup=0,size=1G\n\
    scsi0: local-lvm:vm-100-disk-1,discard=on,size=32G\nscsi8: local-lvm:vm-100-disk-2,ro=1,size=1G\n\
    scsihw: virtio-scsi-pci\nsmbios1: uuid=3e1b0ee5-0000-4000-8000-000000000001\nsockets: 2\n\
    tpmstate0: local-lvm:vm-100-disk-5,size=4M,version=v2.0\nunused0: local-lvm:vm-100-disk-9\n\
    #qmdump#map:efidisk0:drive-efidisk0:local-lvm:raw:\n#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n\
    #qmdump#map:scsi8:other:local-lvm:raw:\n#qmdump#map:tpmstate0:drive-tpmstate0-backup:local-lvm:raw:\n\
    [before]\nmemory: 1\n";

fn guest() -> Machine {
    parse(GUEST.as_bytes()).expect("a configuration")
}

#[test]
fn reads_the_machine_of_a_guest() {
    let machine = guest();
    assert_eq!((&*machine.name, &*machine.description), ("web", "web server: first line\n100%"));
    assert_eq!((machine.cpu.sockets, machine.cpu.cores, machine.memory), (2, 4, Some(8 << 30)));
    assert_eq!((machine.firmware, machine.secure_boot), (Firmware::Uefi, true));
    assert_eq!(
        (machine.os, machine.tpm, machine.chipset),
        (Some(Os::Linux), Some(Tpm::V2_0), Some(Chipset::Q35))
    );
    assert_eq!(
        machine.uuid.map(|uuid| uuid.to_string()).as_deref(),
        Some("3e1b0ee5-0000-4000-8000-000000000001")
    );
    let drives: Vec<_> = machine
        .drives
        .iter()
        .map(|drive| (drive.kind, drive.device.as_deref(), machine.position(drive), drive.boot))
        .collect();
    assert_eq!(
        drives,
        [
            (DriveKind::EfiVars, Some("drive-efidisk0"), None, None),
            (DriveKind::Cdrom, None, Some((Bus::Ide, 2)), Some(1)),
            (DriveKind::Disk, None, Some((Bus::Sata, 1)), None),
            (DriveKind::Disk, Some("drive-scsi0"), Some((Bus::Scsi, 0)), Some(0)),
            (DriveKind::Disk, Some("other"), Some((Bus::Scsi, 8)), None),
            (DriveKind::TpmState, Some("drive-tpmstate0-backup"), None, None),
        ]
    );
    assert!(machine.drives[4].read_only);
    let nics: Vec<_> =
        machine.nics.iter().map(|nic| (nic.model, nic.network.as_deref(), nic.connected)).collect();
    assert_eq!(
        nics,
        [
            (NicModel::Virtio, Some("vmbr0"), true),
            (NicModel::Vmxnet3, Some("vmbr0"), true),
            (NicModel::E1000, Some("vmbr1"), false)
        ]
    );
    assert_eq!(machine.nics[0].boot, Some(2));
}

#[test]
fn names_what_is_left_and_never_carries_over_the_host() {
    let extra = guest().extra;
    for line in [
        "agent: 1",
        "cpu: host",
        "args: concerns the host, never carried over",
        "hookscript: concerns the host, never carried over",
        "hostpci0: concerns the host, never carried over",
        "ide2: content of the CD drive (local:iso/debian.iso)",
        "net0: firewall=1",
        "sata1: the disk is not part of backups",
        "scsi0: discard=on",
        "left out: unused0 (local-lvm:vm-100-disk-9)",
        "left out: snapshot before",
    ] {
        assert!(extra.iter().any(|known| known == line), "{line}: {extra:?}");
    }
    let text = for_archive(&guest(), &[]).text;
    for word in ["args", "hookscript", "hostpci", "evil"] {
        assert!(!text.contains(word), "{text}");
    }
}

/// A machine as a guest of Proxmox VE expresses it.
fn machine() -> Machine {
    let mut machine = guest();
    machine.drives.retain(|drive| drive.kind != DriveKind::Disk || drive.device.is_some());
    machine.drives.iter_mut().filter(|drive| drive.kind == DriveKind::Disk).for_each(|d| d.read_only = false);
    machine.controllers.retain(|one| one.model != ControllerModel::Ahci);
    for drive in &mut machine.drives {
        drive.controller = drive.controller.map(|index| if index > 1 { index - 1 } else { index });
    }
    machine.extra.clear();
    machine
}

#[test]
fn configuration_for_an_archive_reads_as_the_machine() {
    let machine = guest();
    let devices = [
        Device::disk(1, "drive-efidisk0", 540_672),
        Device::disk(2, "drive-scsi0", 32 << 30),
        Device::disk(3, "other", 1 << 30),
        Device::disk(4, "drive-tpmstate0-backup", 4 << 20),
    ];
    let printed = for_archive(&machine, &devices);
    for line in [
        "#web server%3A first line\n#100%25\n",
        "\nefidisk0: local:100/vm-100-disk-0.raw,efitype=4m,size=528K\n",
        "\nide2: none,media=cdrom\n",
        "\nnet0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n",
        "\nboot: order=scsi0;ide2;net0\n",
        "\n#qmdump#map:scsi8:other:local:raw:\n",
    ] {
        assert!(printed.text.contains(line), "{line}: {}", printed.text);
    }
    let mut again = parse(printed.text.as_bytes()).expect("a configuration");
    // Proxmox VE keeps the enrolled keys in the disk; a new line does not claim any.
    again.secure_boot = true;
    again.extra.clear();
    // The numbers of the adapters have no gaps.
    assert_eq!(again.nics, machine.nics);
    let without = |machine: &Machine| {
        let places: Vec<_> =
            machine.drives.iter().map(|d| (d.kind, d.device.clone(), machine.position(d), d.boot)).collect();
        (
            places,
            Machine { drives: Vec::new(), controllers: Vec::new(), extra: Vec::new(), ..machine.clone() },
        )
    };
    let expected = self::machine();
    assert_eq!(without(&again), without(&expected));
}

#[test]
fn every_setting_is_one_that_qm_takes() {
    let mut machine = guest();
    machine.name = "Web server (ä) of_team.x-".to_owned();
    machine.description = "[snapshot]\nargs: -x\n#qmdump#map:scsi0:a:b:c:\n\\nhookscript: x".to_owned();
    machine
        .nics
        .push(Nic { network: Some("VM Network,x=1\nargs: 1".to_owned()), ..Nic::new(NicModel::E1000e) });
    machine.nics.push(Nic { mac: "01:00:00:00:00:00".parse().ok(), ..Nic::new(NicModel::Pcnet) });
    for position in [0, 1, 2, 30, 31, 200] {
        for model in ControllerModel::ALL {
            let mut drive = Drive::new(DriveKind::Disk, Some(&format!("{model}-{position}")));
            assert!(machine.attach(&mut drive, *model, position));
            machine.drives.push(drive);
        }
    }
    let devices: Vec<Device> = machine
        .drives
        .iter()
        .filter_map(|drive| Some(Device::disk(0, drive.device.clone()?, 4096)))
        .collect();
    let printed = for_archive(&machine, &devices);
    let config = GuestConfig::parse(&printed.text).expect("a configuration");
    assert!(
        config.bad_line.is_none() && config.unknown.is_empty() && config.left_out.is_empty(),
        "{config:?}"
    );
    for (key, value) in config.settings() {
        assert_eq!(keys::check(key, value), Ok(()), "{key}: {value}");
        assert!(!["args", "hookscript"].contains(&key), "{key}");
    }
    assert_eq!(config.get("name"), Some("Web-server-----of-team.x"));
    for part in
        ["name 'Web server", "network 'VM Network", "address 01:00", "controller nvme", "becomes sata"]
    {
        assert!(printed.lost.iter().any(|line| line.contains(part)), "{part}: {:?}", printed.lost);
    }
}

#[test]
fn every_line_of_a_description_survives() {
    let description = "qmdump#map:scsi0:a:b:c:\nvzdump#x\n  blanks around  \n\n[before]\n%41 ä \\n: #\nend";
    let machine = Machine { description: description.to_owned(), ..Machine::default() };
    let text = for_archive(&machine, &[]).text;
    assert_eq!(parse(text.as_bytes()).expect("a configuration").description, description, "{text}");
    let machine = Machine { description: "ä".repeat(9000), ..Machine::default() };
    let printed = for_archive(&machine, &[]);
    assert!(printed.lost.iter().any(|line| line.contains("8192 characters")), "{:?}", printed.lost);
    assert_eq!(parse(printed.text.as_bytes()).expect("a configuration").description, "ä".repeat(8192));
}

#[test]
fn uefi_gets_controllers_that_its_firmware_knows() {
    let mut machine = Machine::of_disks("a", ControllerModel::LsiLogic, ["disk1"]);
    assert_eq!(settings(&machine).config.get("scsihw"), Some("lsi"));
    machine.firmware = Firmware::Uefi;
    let settings = settings(&machine);
    assert_eq!(settings.config.get("boot"), Some("order=sata0"));
    let lost = settings.lost.join("\n");
    assert!(lost.contains("controller lsilogic: becomes SATA, since") && lost.contains("efidisk0"), "{lost}");
}

#[test]
fn uefi_drives_without_a_place_on_sata_get_virtio() {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut machine = Machine::of_disks("a", ControllerModel::Pvscsi, names);
    machine.firmware = Firmware::Uefi;
    let settings = settings(&machine);
    let drives: Vec<&str> = settings.map.iter().map(|entry| entry.drive.as_str()).collect();
    assert_eq!(drives, ["sata0", "sata1", "sata2", "sata3", "sata4", "sata5", "scsi0", "scsi1"]);
    assert_eq!(settings.config.get("scsihw"), Some("virtio-scsi-pci"));
}

#[test]
fn refuses_other_texts() {
    assert_eq!(parse(b"hello\n").map_err(|e| e.kind()).err(), Some(ErrorKind::WrongFormat));
    let long = format!("name: a\n{}", "#".repeat(1 << 16));
    assert_eq!(parse(long.as_bytes()).map_err(|e| e.kind()).err(), Some(ErrorKind::LimitExceeded));
    assert!(parse(b"\xff\xfe\nname: \xff\ncores: 99999999999\nboot: order=net0\n").is_ok());
}

#[test]
fn unreadable_addresses_of_adapters_get_a_line() {
    for net in ["virtio=52:54,bridge=vmbr0", "model=virtio,macaddr=52:54,bridge=vmbr0"] {
        let machine = parse(format!("cores: 1\nmemory: 512\nnet0: {net}\n").as_bytes()).expect("a machine");
        assert_eq!(machine.extra, ["address '52:54' of network adapter 0: no MAC address"], "{net}");
    }
}
