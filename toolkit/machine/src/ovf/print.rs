//! Prints a descriptor: OVF 1.1 with the elements and units that VMware, VirtualBox, Proxmox VE and virt-v2v
//! all import.
//!
//! The importers insist on more than the specification: memory in units of `byte * 2^20`, the children of an
//! item in alphabetical order, hardware version 13, which ESXi 6.5 and newer know, and no `StorageItem`.
//! Proxmox VE reads the descriptor line by line, so no line feed is inside of an element without text.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use imgtool_core::machine::{
    Arch, BootEntry, Bus, ControllerModel, Drive, DriveKind, Firmware, Machine, NicModel, Os,
};

use super::{CONTROLLERS, SYSTEMS, WHAT};
use crate::Printed;
use crate::xml::{escaped, shortened};

/// Disk of a package that is written.
#[derive(Debug, Clone, Copy)]
pub struct PackagedDisk<'a> {
    /// Name of the device, as in [`Drive::device`].
    pub device: &'a str,
    /// Name of the file in the package.
    pub href: &'a str,
    /// Length in bytes of the file, if known. A wrong one is fatal in VMware's programs.
    pub len: Option<u64>,
    /// Virtual size in bytes: that of the image, or imports fail.
    pub capacity: u64,
    /// URI of the format.
    pub format: &'a str,
}

/// Name of the network of an adapter that has none: VMware's default.
const NETWORK: &str = "VM Network";

const HEAD: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
"#;
const END: &str = "</Envelope>\n";

/// Prints the descriptor of a machine. `disks` are those of the package, in its order; a disk that no drive
/// of the machine has gets a free place.
pub fn print(machine: &Machine, disks: &[PackagedDisk<'_>]) -> Printed {
    let mut printer = Printer { text: HEAD.to_owned(), lost: Vec::new(), instance: 0 };
    let boot = boot_disk(machine, disks);
    printer.references(disks, boot);
    printer.networks(machine);
    printer.system(machine, disks);
    printer.text.push_str(END);
    printer.lost(machine, disks);
    let lost = printer.lost.into_iter().map(|line| format!("{WHAT} lacks {line}")).collect();
    Printed { text: printer.text, lost }
}

/// Returns the index in `disks` of the disk that boots: that of the boot order, or the first one.
fn boot_disk(machine: &Machine, disks: &[PackagedDisk<'_>]) -> Option<usize> {
    let index = |drive: &Drive| disks.iter().position(|disk| Some(disk.device) == drive.device.as_deref());
    let ordered = machine.boot_order().into_iter().filter_map(|entry| match entry {
        BootEntry::Drive(drive) => machine.drives.get(drive),
        BootEntry::Nic(_) => None,
    });
    let is_disk = |drive: &&Drive| drive.kind == DriveKind::Disk;
    ordered.chain(&machine.drives).filter(is_disk).find_map(index)
}

/// Fills a descriptor with blanks to `len` bytes, for a writer that reserved room for it. Returns `None` if
/// it is longer.
pub fn padded(descriptor: &str, len: usize) -> Option<String> {
    let blanks = len.checked_sub(descriptor.len())?;
    let body = descriptor.strip_suffix(END)?;
    Some(format!("{body}{}{END}", " ".repeat(blanks)))
}

/// Maximum number of controllers of a bus in a machine. Source: VMware's configuration maximums.
const MAX_CONTROLLERS: usize = 4;

struct Printer {
    text: String,
    lost: Vec<String>,
    /// The last `InstanceID`.
    instance: u32,
}

/// Controller that is written.
struct Placed<'a> {
    model: ControllerModel,
    /// Number among the controllers of the bus.
    number: u32,
    /// Drives with their addresses.
    drives: Vec<(u32, Place<'a>)>,
}

/// Drive that is written.
enum Place<'a> {
    Cdrom,
    Disk(usize, &'a str),
}

impl Printer {
    /// Prints the files and the disks. The boot disk comes first: OVF has no other boot order.
    fn references(&mut self, disks: &[PackagedDisk<'_>], boot: Option<usize>) {
        let mut files = String::new();
        let mut images = vec![String::new()];
        for (number, disk) in (1..).zip(disks) {
            let size = disk.len.map(|len| format!(" ovf:size=\"{len}\"")).unwrap_or_default();
            let href = escaped(disk.href);
            let _ = writeln!(files, " <File ovf:href=\"{href}\" ovf:id=\"file{number}\"{size}/>");
            let image = format!(
                "  <Disk ovf:capacity=\"{}\" ovf:diskId=\"vmdisk{number}\" ovf:fileRef=\"file{number}\" \
                 ovf:format=\"{}\"/>\n",
                disk.capacity,
                escaped(disk.format)
            );
            match boot {
                Some(boot) if boot + 1 == number => images[0] = image,
                _ => images.push(image),
            }
        }
        let images = images.concat();
        let _ = write!(self.text, " <References>\n{files} </References>\n");
        let _ = write!(self.text, " <DiskSection>\n  <Info>Virtual disks</Info>\n{images} </DiskSection>\n");
    }

    fn networks(&mut self, machine: &Machine) {
        let networks = machine.nics.iter().map(|nic| nic.network.as_deref().unwrap_or(NETWORK));
        let networks: BTreeSet<&str> = networks.collect();
        if networks.is_empty() {
            return;
        }
        self.text.push_str(" <NetworkSection>\n  <Info>Networks</Info>\n");
        for network in networks {
            let _ = writeln!(self.text, "  <Network ovf:name=\"{}\"/>", escaped(network));
        }
        self.text.push_str(" </NetworkSection>\n");
    }

    fn system(&mut self, machine: &Machine, disks: &[PackagedDisk<'_>]) {
        let name = if machine.name.is_empty() { "vm".to_owned() } else { escaped(&machine.name) };
        let os = machine.os.unwrap_or(Os::Other);
        let system = SYSTEMS.iter().find(|(_, _, known)| *known == os).unwrap_or(&SYSTEMS[0]);
        let (number, vmware, _) = system;
        let _ = write!(
            self.text,
            " <VirtualSystem ovf:id=\"{name}\">\n  <Info>A virtual machine</Info>\n  <Name>{name}</Name>\n  \
             <OperatingSystemSection ovf:id=\"{number}\" vmw:osType=\"{vmware}\">\n   <Info>Guest operating \
             system</Info>\n   <Description>{os}</Description>\n  </OperatingSystemSection>\n"
        );
        if !machine.description.is_empty() {
            let _ = write!(
                self.text,
                "  <AnnotationSection>\n   <Info>Description</Info>\n   <Annotation>{}</Annotation>\n  \
                 </AnnotationSection>\n",
                escaped(&machine.description)
            );
        }
        let _ = write!(
            self.text,
            "  <VirtualHardwareSection>\n   <Info>Virtual hardware</Info>\n   <System>\n    \
             <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>\n    <vssd:InstanceID>0</vssd:InstanceID>\n    \
             <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>\n    \
             <vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType>\n   </System>\n"
        );
        self.hardware(machine, disks);
        self.text.push_str("  </VirtualHardwareSection>\n </VirtualSystem>\n");
    }

    fn hardware(&mut self, machine: &Machine, disks: &[PackagedDisk<'_>]) {
        let cpus = machine.cpu.count();
        let instance = self.next();
        self.item(&[
            ("AllocationUnits", "hertz * 10^6"),
            ("ElementName", &format!("{cpus} virtual CPU(s)")),
            ("InstanceID", &instance),
            ("ResourceType", "3"),
            ("VirtualQuantity", &cpus.to_string()),
            ("CoresPerSocket", &machine.cpu.cores.to_string()),
        ]);
        let mebibytes = machine.memory.unwrap_or(crate::DEFAULT_MEMORY).div_ceil(1 << 20);
        let instance = self.next();
        self.item(&[
            ("AllocationUnits", "byte * 2^20"),
            ("ElementName", &format!("{mebibytes} MB of memory")),
            ("InstanceID", &instance),
            ("ResourceType", "4"),
            ("VirtualQuantity", &mebibytes.to_string()),
        ]);
        self.drives(machine, disks);
        self.nics(machine);
        let config = |key: &str, value: &str| {
            format!("   <vmw:Config ovf:required=\"false\" vmw:key=\"{key}\" vmw:value=\"{value}\"/>\n")
        };
        if machine.firmware == Firmware::Uefi {
            self.text.push_str(&config("firmware", "efi"));
        }
        if machine.secure_boot {
            self.text.push_str(&config("bootOptions.efiSecureBootEnabled", "true"));
        }
    }

    fn next(&mut self) -> String {
        self.instance += 1;
        self.instance.to_string()
    }

    /// Prints an item. Its settings are in alphabetical order, as the schema's sequence has them, with
    /// VMware's behind.
    fn item(&mut self, settings: &[(&str, &str)]) {
        self.text.push_str("   <Item>\n");
        for (name, value) in settings {
            let value = escaped(value);
            let _ = match *name {
                "CoresPerSocket" => {
                    writeln!(self.text, "    <vmw:{name} ovf:required=\"false\">{value}</vmw:{name}>")
                }
                name => writeln!(self.text, "    <rasd:{name}>{value}</rasd:{name}>"),
            };
        }
        self.text.push_str("   </Item>\n");
    }

    fn drives(&mut self, machine: &Machine, disks: &[PackagedDisk<'_>]) {
        let placed = placed(machine, disks);
        for bus in [Bus::Scsi, Bus::Sata, Bus::Nvme] {
            let count = placed.iter().filter(|one| one.model.bus() == bus).count();
            if count > MAX_CONTROLLERS {
                self.lost.push(format!(
                    "{count} {bus} controllers: VMware's programs take {MAX_CONTROLLERS}, and refuse the package"
                ));
            }
        }
        for placed in placed {
            self.controller(&placed);
        }
    }

    fn controller(&mut self, placed: &Placed<'_>) {
        let (kind, subtype) = subtype(placed.model);
        let (controller, kind, number) = (self.next(), kind.to_string(), placed.number.to_string());
        let name = format!("{} controller {number}", placed.model.bus().name().to_uppercase());
        let mut settings = vec![("Address", &*number), ("ElementName", &*name), ("InstanceID", &*controller)];
        if !subtype.is_empty() {
            settings.push(("ResourceSubType", subtype));
        }
        settings.push(("ResourceType", &kind));
        self.item(&settings);
        for (address, place) in &placed.drives {
            let (address, instance) = (address.to_string(), self.next());
            let name = match place {
                Place::Cdrom => format!("CD drive {instance}"),
                Place::Disk(_, device) => format!("Hard disk {device}"),
            };
            let resource = match place {
                Place::Cdrom => String::new(),
                Place::Disk(index, _) => format!("ovf:/disk/vmdisk{}", index + 1),
            };
            let mut settings = vec![("AddressOnParent", &*address)];
            if matches!(place, Place::Cdrom) {
                settings.push(("AutomaticAllocation", "false"));
            }
            settings.push(("ElementName", &name));
            if !resource.is_empty() {
                settings.push(("HostResource", &resource));
            }
            settings.push(("InstanceID", &instance));
            settings.push(("Parent", &controller));
            settings.push(("ResourceType", if resource.is_empty() { "15" } else { "17" }));
            self.item(&settings);
        }
    }

    fn nics(&mut self, machine: &Machine) {
        for (number, nic) in (0..).zip(&machine.nics) {
            let subtype = match nic.model {
                NicModel::E1000e => "E1000e",
                NicModel::Pcnet => "PCNet32",
                NicModel::Virtio | NicModel::Vmxnet3 => "VmxNet3",
                _ => "E1000",
            };
            if matches!(nic.model, NicModel::Virtio | NicModel::Rtl8139) {
                self.lost.push(format!("model {} of network adapter {number}: becomes {subtype}", nic.model));
            }
            let (mac, instance) = (nic.mac.map(|mac| mac.to_string()), self.next());
            let name = format!("Network adapter {number}");
            let mut settings: Vec<(&str, &str)> = mac.iter().map(|mac| ("Address", &**mac)).collect();
            settings.push(("AutomaticAllocation", if nic.connected { "true" } else { "false" }));
            settings.push(("Connection", nic.network.as_deref().unwrap_or(NETWORK)));
            settings.push(("ElementName", &name));
            settings.push(("InstanceID", &instance));
            settings.push(("ResourceSubType", subtype));
            settings.push(("ResourceType", "10"));
            self.item(&settings);
        }
    }

    /// Lists what the descriptor does not hold.
    fn lost(&mut self, machine: &Machine, disks: &[PackagedDisk<'_>]) {
        let lost = &mut self.lost;
        if machine.arch != Arch::X86_64 {
            lost.push(format!("processor architecture {}: OVF states none", machine.arch));
        }
        if let Some(chipset) = machine.chipset {
            lost.push(format!("chipset {chipset}: the platform chooses it"));
        }
        if let Some(tpm) = machine.tpm {
            lost.push(format!("TPM {tpm}: OVF has no place for it"));
        }
        if let Some(uuid) = machine.uuid {
            lost.push(format!("identifier {uuid}: the platform makes a new one"));
        }
        for drive in &machine.drives {
            let device = drive.device.as_deref().unwrap_or("empty drive");
            let is_packaged = disks.iter().any(|disk| Some(disk.device) == drive.device.as_deref());
            let why = match (drive.kind, machine.controller_of(drive)) {
                (DriveKind::EfiVars, _) => "firmware variables: the platform makes new ones".to_owned(),
                (DriveKind::TpmState, _) => "TPM state: OVF has no place for it".to_owned(),
                (DriveKind::Disk, _) if !is_packaged => "no disk for it in the package".to_owned(),
                (_, Some(model)) if written_model(model) != model => {
                    format!("{model}: becomes {}", subtype(written_model(model)).1)
                }
                (DriveKind::Disk, _) if drive.read_only => "read-only: OVF disks are writable".to_owned(),
                _ => continue,
            };
            lost.push(format!("{device}: {why}"));
        }
        lost.extend(lost_boot_order(machine, disks));
        lost.extend(machine.extra.iter().cloned());
    }
}

/// Returns a line on the boot order, unless the first disk of the package alone boots or is the only one.
fn lost_boot_order(machine: &Machine, disks: &[PackagedDisk<'_>]) -> Option<String> {
    let order = machine.boot_order();
    let is_boot_disk = |entry: &BootEntry| match entry {
        BootEntry::Drive(drive) => {
            let device = machine.drives[*drive].device.as_deref();
            boot_disk(machine, disks).is_some_and(|index| Some(disks[index].device) == device)
        }
        BootEntry::Nic(_) => false,
    };
    let count = machine.drives.iter().filter(|drive| drive.kind == DriveKind::Disk).count();
    if order.len() > 1 || order.first().map_or(count > 1, |first| !is_boot_disk(first)) {
        let first = boot_disk(machine, disks).map(|index| shortened(disks[index].device));
        let first = first.map(|device| format!(", {device} is its first disk")).unwrap_or_default();
        return Some(format!("boot order: the firmware of the platform chooses{first}"));
    }
    None
}

/// Returns the model that is written for another one: the nearest that VMware has.
fn written_model(model: ControllerModel) -> ControllerModel {
    match model {
        ControllerModel::VirtioScsi | ControllerModel::VirtioScsiSingle | ControllerModel::VirtioBlk => {
            ControllerModel::Pvscsi
        }
        ControllerModel::Lsi53c810 => ControllerModel::LsiLogic,
        ControllerModel::MegaSas => ControllerModel::LsiSas1068,
        known => known,
    }
}

/// Returns the resource type and subtype of a model that VMware has.
fn subtype(model: ControllerModel) -> (u32, &'static str) {
    let known = CONTROLLERS.iter().find(|(_, _, known)| *known == model);
    known.map_or((6, "lsilogic"), |(kind, subtype, _)| (*kind, subtype))
}

/// Converts a place of the model into an address, which leaves out the controller's own SCSI number 7.
fn address(bus: Bus, unit: u32) -> u32 {
    if bus == Bus::Scsi && unit >= 7 { unit + 1 } else { unit }
}

/// Returns the controllers with their drives, those of the boot disk first. virtio-blk drives get SCSI
/// controllers of their own, after the others unless the machine boots from one.
fn placed<'a>(machine: &Machine, disks: &[PackagedDisk<'a>]) -> Vec<Placed<'a>> {
    let mut all: Vec<(ControllerModel, Bus, u32, Place<'a>)> = Vec::new();
    let mut is_placed = vec![false; disks.len()];
    for drive in &machine.drives {
        let (Some(model), Some((bus, position))) = (machine.controller_of(drive), machine.position(drive))
        else {
            continue;
        };
        let index = disks.iter().position(|disk| Some(disk.device) == drive.device.as_deref());
        let place = match (drive.kind, index) {
            (DriveKind::Cdrom, _) => Place::Cdrom,
            (DriveKind::Disk, Some(index)) => {
                is_placed[index] = true;
                Place::Disk(index, disks[index].device)
            }
            _ => continue,
        };
        all.push((written_model(model), bus, position, place));
    }
    let is_free = |index: &usize| !is_placed[*index] && !is_state(machine, disks[*index].device);
    let free: Vec<usize> = (0..disks.len()).filter(is_free).collect();
    let usual = all.iter().map(|(model, ..)| *model).find(|model| model.bus() == Bus::Scsi);
    let end =
        all.iter().filter(|(_, bus, ..)| *bus == Bus::Scsi).map(|(_, _, position, _)| position + 1).max();
    for (position, index) in (end.unwrap_or(0)..).zip(free) {
        let model = usual.unwrap_or(ControllerModel::LsiLogic);
        all.push((model, Bus::Scsi, position, Place::Disk(index, disks[index].device)));
    }
    numbered(all, boot_disk(machine, disks))
}

/// Numbers the controllers of drives at their places.
fn numbered<'a>(
    mut all: Vec<(ControllerModel, Bus, u32, Place<'a>)>,
    boot: Option<usize>,
) -> Vec<Placed<'a>> {
    all.sort_by_key(|(_, bus, position, _)| (bus_order(*bus), *position));
    let is_boot = |place: &Place<'_>| matches!(place, Place::Disk(index, _) if Some(*index) == boot);
    // The BIOS boots from the first controller.
    let is_virtio_first = all.iter().any(|(_, bus, _, place)| *bus == Bus::Virtio && is_boot(place));
    let count_of = |wanted: Bus| {
        let of_bus = all.iter().filter(|(_, bus, ..)| *bus == wanted);
        of_bus.map(|(model, _, position, _)| position / model.units() + 1).max().unwrap_or(0)
    };
    let before =
        if is_virtio_first { (Bus::Scsi, count_of(Bus::Virtio)) } else { (Bus::Virtio, count_of(Bus::Scsi)) };
    let mut controllers: Vec<(Bus, Placed<'a>)> = Vec::new();
    for (model, bus, position, place) in all {
        let first = if bus == before.0 { before.1 } else { 0 };
        let (number, unit) = (first + position / model.units(), position % model.units());
        let address = address(model.bus(), unit);
        match controllers.last_mut() {
            Some((known, placed)) if *known == bus && placed.number == number => {
                placed.drives.push((address, place));
            }
            _ => controllers.push((bus, Placed { model, number, drives: vec![(address, place)] })),
        }
    }
    let mut controllers: Vec<Placed<'a>> = controllers.into_iter().map(|(_, placed)| placed).collect();
    // Importers that know no addresses take the first disk among the items.
    controllers.sort_by_key(|placed| !placed.drives.iter().any(|(_, place)| is_boot(place)));
    for placed in &mut controllers {
        placed.drives.sort_by_key(|(_, place)| !is_boot(place));
    }
    controllers
}

/// True for the state of the firmware or the TPM, which is no disk of the guest.
fn is_state(machine: &Machine, device: &str) -> bool {
    machine
        .drive(device)
        .is_some_and(|drive: &Drive| matches!(drive.kind, DriveKind::EfiVars | DriveKind::TpmState))
}

/// Order of the buses: virtio-blk drives become SCSI drives after the real ones.
fn bus_order(bus: Bus) -> usize {
    Bus::ALL.iter().position(|known| *known == bus).unwrap_or(Bus::ALL.len())
}
