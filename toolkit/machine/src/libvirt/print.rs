//! Prints a machine as the XML of a domain.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use imgtool_core::machine::{
    Arch, BootEntry, Bus, Chipset, ControllerModel, Drive, DriveKind, Firmware, Machine, Nic, Os,
};

use super::{ADAPTERS, CONTROLLERS, NETWORK, SYSTEMS, counts_units, scsi_width};
use crate::xml::{escaped, shortened};
use crate::{DEFAULT_MEMORY, Printed};

/// File with a disk of a domain.
#[derive(Debug, Clone, Copy)]
pub struct DiskSource<'a> {
    /// Name of the device, as in [`Drive::device`].
    pub device: &'a str,
    /// Absolute path.
    pub path: &'a str,
    /// Format, by the name that QEMU has for it.
    pub format: &'a str,
}

/// Name of a domain whose machine has none.
const NAME: &str = "vm";
/// Maximum length in bytes of a domain's name. Our limit: it becomes a file name.
const MAX_NAME: usize = 64;

/// Prints the domain of a machine, whose disks are the files of `disks`.
pub fn print(machine: &Machine, disks: &[DiskSource<'_>]) -> Printed {
    let has_source = |index: usize| {
        let device = machine.drives[index].device.as_deref();
        disks.iter().any(|disk| Some(disk.device) == device)
    };
    let (machine, line) = crate::with_boot_disk(machine, has_source);
    let machine = &machine;
    let mut printer = Printer {
        machine,
        disks,
        text: String::new(),
        lost: line.into_iter().collect(),
        chipset: chipset(machine),
        used: Vec::new(),
    };
    printer.domain();
    printer.state();
    printer.lost.extend(machine.extra.iter().cloned());
    Printed { text: printer.text, lost: printer.lost }
}

/// Returns the chipset: that of the machine, or the one that fits its firmware and its drives. Q35 has no
/// IDE.
fn chipset(machine: &Machine) -> Chipset {
    let has_ide = machine.drives.iter().any(|drive| {
        drive.kind == DriveKind::Disk && machine.controller_of(drive) == Some(ControllerModel::Ide)
    });
    // Secure boot needs the system management mode of Q35.
    match machine.chipset {
        _ if machine.secure_boot => Chipset::Q35,
        Some(chipset) => chipset,
        None if machine.firmware == Firmware::Uefi && !has_ide => Chipset::Q35,
        None => Chipset::I440fx,
    }
}

struct Printer<'a> {
    machine: &'a Machine,
    disks: &'a [DiskSource<'a>],
    text: String,
    lost: Vec<String>,
    chipset: Chipset,
    /// SCSI, SATA, IDE and virtio places that are taken.
    used: Vec<(&'static str, u32)>,
}

/// Drive that is written.
struct Placed<'a> {
    drive: &'a Drive,
    source: Option<DiskSource<'a>>,
    /// Model of its controller in the domain.
    model: ControllerModel,
    /// Place on the bus.
    position: u32,
    /// Number of the controller; of the channel for IDE.
    number: u32,
    unit: u32,
}

impl<'a> Printer<'a> {
    fn line(&mut self, indent: usize, text: &str) {
        let _ = writeln!(self.text, "{:indent$}{text}", "");
    }

    fn domain(&mut self) {
        let machine = self.machine;
        self.line(0, "<domain type='kvm'>");
        let name = self.name();
        self.line(2, &format!("<name>{}</name>", escaped(&name)));
        if let Some(uuid) = machine.uuid {
            self.line(2, &format!("<uuid>{uuid}</uuid>"));
        }
        self.system();
        if !machine.description.is_empty() {
            self.line(2, &format!("<description>{}</description>", escaped(&machine.description)));
        }
        // KiB, as libvirt prints it.
        let memory = machine.memory.unwrap_or(DEFAULT_MEMORY).div_ceil(1024);
        self.line(2, &format!("<memory unit='KiB'>{memory}</memory>"));
        self.line(2, &format!("<vcpu placement='static'>{}</vcpu>", machine.cpu.count()));
        self.firmware();
        let smm = if machine.secure_boot { "<smm state='on'/>" } else { "" };
        match machine.arch {
            Arch::Aarch64 => self.line(2, "<features><acpi/></features>"),
            _ => self.line(2, &format!("<features><acpi/><apic/>{smm}</features>")),
        }
        let (sockets, cores) = (machine.cpu.sockets, machine.cpu.cores);
        let mode = if machine.arch == Arch::Aarch64 { "host-passthrough" } else { "host-model" };
        self.line(2, &format!("<cpu mode='{mode}'>"));
        self.line(4, &format!("<topology sockets='{sockets}' cores='{cores}' threads='1'/>"));
        self.line(2, "</cpu>");
        // Windows keeps the local time in the clock.
        let local = machine.os.is_some_and(|os| os >= Os::Windows2000);
        self.line(2, &format!("<clock offset='{}'/>", if local { "localtime" } else { "utc" }));
        self.line(2, "<devices>");
        self.drives();
        self.nics();
        self.others();
        self.line(2, "</devices>");
        self.line(0, "</domain>");
    }

    /// Returns the name of the domain: libvirt refuses a slash, and a line feed.
    fn name(&mut self) -> String {
        let plain = |c: char| if c == '/' || c.is_control() { '-' } else { c };
        let mut name: String = self.machine.name.chars().map(plain).collect();
        while name.len() > MAX_NAME {
            name.pop();
        }
        if name.trim().is_empty() || matches!(&*name, "." | "..") {
            NAME.clone_into(&mut name);
        }
        if name != self.machine.name && !self.machine.name.is_empty() {
            self.lost.push(format!("name '{}': becomes '{name}'", shortened(&self.machine.name)));
        }
        name
    }

    fn system(&mut self) {
        let Some(os) = self.machine.os.filter(|os| *os != Os::Other) else { return };
        let Some((id, _)) = SYSTEMS.iter().find(|(_, known)| *known == os) else {
            self.lost.push(format!("operating system {os}: libosinfo does not list it"));
            return;
        };
        self.line(2, "<metadata>");
        self.line(4, "<libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>");
        self.line(6, &format!("<libosinfo:os id='{id}'/>"));
        self.line(4, "</libosinfo:libosinfo>");
        self.line(2, "</metadata>");
    }

    fn firmware(&mut self) {
        let machine = self.machine;
        let uefi = if machine.firmware == Firmware::Uefi { " firmware='efi'" } else { "" };
        let kind = match (machine.arch, self.chipset) {
            (Arch::Aarch64, _) => "arch='aarch64' machine='virt'",
            (_, Chipset::Q35) => "arch='x86_64' machine='q35'",
            _ => "arch='x86_64' machine='pc'",
        };
        self.line(2, &format!("<os{uefi}>"));
        self.line(4, &format!("<type {kind}>hvm</type>"));
        if machine.firmware == Firmware::Uefi {
            let (state, loader) = if machine.secure_boot { ("yes", " secure='yes'") } else { ("no", "") };
            self.line(4, "<firmware>");
            self.line(6, &format!("<feature enabled='{state}' name='secure-boot'/>"));
            self.line(4, "</firmware>");
            if !loader.is_empty() {
                self.line(4, &format!("<loader{loader}/>"));
            }
        }
        self.line(2, "</os>");
        match machine.chipset {
            Some(chipset) if chipset != self.chipset => {
                self.lost
                    .push(format!("chipset {chipset}: becomes {}, as secure boot needs it", self.chipset));
            }
            _ => {}
        }
    }

    fn drives(&mut self) {
        let mut placed = self.placed();
        number_scsi(&mut placed);
        let mut letters = 0;
        for one in &placed {
            let target = match one.model.bus() {
                Bus::Virtio => format!("vd{}", letter(one.position)),
                Bus::Ide => format!("hd{}", letter(one.position)),
                _ => {
                    letters += 1;
                    format!("sd{}", letter(letters - 1))
                }
            };
            self.drive(one, &target);
            let model = self.machine.controller_of(one.drive).unwrap_or(one.model);
            // The same model, with one controller for several drives.
            if one.model != model && model != ControllerModel::VirtioScsiSingle {
                let what = shortened(one.drive.device.as_deref().unwrap_or("CD drive"));
                let why = match crate::lacks_firmware_driver(self.machine, model) {
                    true => ", since the UEFI firmware has no driver for it",
                    false => "",
                };
                self.lost.push(format!("{what}: controller {model} becomes {}{why}", one.model));
            }
        }
        let scsi = placed.iter().filter(|one| one.model.bus() == Bus::Scsi);
        self.controllers(scsi.map(|one| (one.model, one.number)).collect());
    }

    /// Returns the drives that are written, at their places. SCSI controllers still have the machine's
    /// numbers.
    fn placed(&mut self) -> Vec<Placed<'a>> {
        let (machine, disks) = (self.machine, self.disks);
        let mut placed = Vec::new();
        let (stay, moved): (Vec<&Drive>, _) = machine.drives.iter().partition(|drive| self.keeps_bus(drive));
        // Those that change the bus take the places that are left.
        for drive in stay.into_iter().chain(moved) {
            let source = disks.iter().find(|disk| Some(disk.device) == drive.device.as_deref()).copied();
            let is_written = match drive.kind {
                DriveKind::Disk => source.is_some(),
                DriveKind::Cdrom => true,
                _ => false,
            };
            let Some(model) = machine.controller_of(drive).filter(|_| is_written) else { continue };
            let (_, position) = machine.position(drive).unwrap_or((Bus::Scsi, 0));
            let mut written = self.written_model(model, drive.kind);
            // A number of 31 SCSI drives means nothing on SATA.
            let is_far = crate::lacks_firmware_driver(machine, model);
            let position = self.place(written, if is_far { 0 } else { position });
            let (number, unit) = number_and_unit(written, position);
            if written.bus() == Bus::Scsi {
                // Another controller has the place if that of the drive was taken.
                let mut scsi = machine.controllers.iter().filter(|one| one.model.bus() == Bus::Scsi);
                let there = scsi.nth(number as usize).map_or(model, |one| one.model);
                written = self.written_model(there, drive.kind);
            }
            placed.push(Placed { drive, source, model: written, position, number, unit });
        }
        placed
    }

    /// Returns the model that is written for another one. libvirt has no NVMe for files, QEMU no BusLogic,
    /// Q35 no IDE, and the UEFI firmware no driver for some.
    fn written_model(&self, model: ControllerModel, kind: DriveKind) -> ControllerModel {
        match model {
            known if crate::lacks_firmware_driver(self.machine, known) => ControllerModel::Ahci,
            ControllerModel::VirtioScsiSingle => ControllerModel::VirtioScsi,
            ControllerModel::Lsi53c810 | ControllerModel::BusLogic => ControllerModel::LsiLogic,
            ControllerModel::Nvme => ControllerModel::Ahci,
            ControllerModel::Ide if self.chipset == Chipset::Q35 => ControllerModel::Ahci,
            ControllerModel::VirtioBlk if kind == DriveKind::Cdrom => ControllerModel::Ahci,
            known => known,
        }
    }

    /// True if a drive stays on its bus.
    fn keeps_bus(&self, drive: &Drive) -> bool {
        let model = self.machine.controller_of(drive);
        model.is_none_or(|model| self.written_model(model, drive.kind).bus() == model.bus())
    }

    /// Takes a place on a bus: the one that is asked for, or the next free one.
    fn place(&mut self, model: ControllerModel, wanted: u32) -> u32 {
        let bus = model.bus().name();
        let free = (wanted..).find(|place| !self.used.contains(&(bus, *place))).unwrap_or(wanted);
        self.used.push((bus, free));
        free
    }

    fn drive(&mut self, placed: &Placed<'_>, target: &str) {
        let Placed { drive, source, model, number, unit, .. } = *placed;
        let device = if drive.kind == DriveKind::Cdrom { "cdrom" } else { "disk" };
        let format = source.map_or("raw", |source| source.format);
        let bus = model.bus().name();
        self.line(4, &format!("<disk type='file' device='{device}'>"));
        self.line(6, &format!("<driver name='qemu' type='{}'/>", escaped(format)));
        if let Some(source) = source {
            self.line(6, &format!("<source file='{}'/>", escaped(source.path)));
        }
        self.line(6, &format!("<target dev='{target}' bus='{bus}'/>"));
        if drive.read_only {
            self.line(6, "<readonly/>");
        }
        self.boot(drive.boot);
        let address = match model.bus() {
            Bus::Ide => Some((0, number, 0, unit)),
            Bus::Virtio => None,
            Bus::Scsi if !counts_units(model) => Some((number, 0, unit, 0)),
            _ => Some((number, 0, 0, unit)),
        };
        if let Some((number, bus, target, unit)) = address {
            let place = format!("controller='{number}' bus='{bus}' target='{target}' unit='{unit}'");
            self.line(6, &format!("<address type='drive' {place}/>"));
        }
        self.line(4, "</disk>");
    }

    /// Prints the place in the boot order, which libvirt counts from 1 without gaps.
    fn boot(&mut self, boot: Option<u32>) {
        let Some(boot) = boot else { return };
        let machine = self.machine;
        let order = machine.boot_order().into_iter().filter(|entry| match entry {
            BootEntry::Drive(index) => machine.drives[*index].boot.is_some_and(|other| other < boot),
            BootEntry::Nic(index) => machine.nics[*index].boot.is_some_and(|other| other < boot),
        });
        let place = order.count() + 1;
        self.line(6, &format!("<boot order='{place}'/>"));
    }

    /// Prints the SCSI controllers up to the highest number.
    fn controllers(&mut self, mut controllers: Vec<(ControllerModel, u32)>) {
        controllers.sort_by_key(|(_, number)| *number);
        let Some((_, last)) = controllers.last().copied() else { return };
        for index in 0..=last {
            // A number without drives gets the model of the next one.
            let Some((model, _)) = controllers.iter().find(|(_, number)| *number >= index) else { continue };
            let name =
                CONTROLLERS.iter().find(|(_, known)| known == model).map_or("virtio-scsi", |(name, _)| name);
            self.line(4, &format!("<controller type='scsi' index='{index}' model='{name}'/>"));
        }
    }

    fn nics(&mut self) {
        let machine = self.machine;
        for (number, nic) in machine.nics.iter().enumerate() {
            self.nic(number, nic);
        }
    }

    fn nic(&mut self, number: usize, nic: &Nic) {
        let network = nic.network.as_deref().unwrap_or(NETWORK);
        if network != NETWORK {
            self.lost.push(format!(
                "network '{}' of adapter {number}: becomes the network '{NETWORK}'",
                shortened(network)
            ));
        }
        self.line(4, "<interface type='network'>");
        match nic.mac {
            // libvirt refuses the address of a group.
            Some(mac) if mac.0[0] & 1 == 0 => self.line(6, &format!("<mac address='{mac}'/>")),
            Some(mac) => self.lost.push(format!("address {mac} of adapter {number}: not one of an adapter")),
            None => {}
        }
        self.line(6, &format!("<source network='{NETWORK}'/>"));
        let model = ADAPTERS.iter().find(|(_, known)| *known == nic.model).map_or("virtio", |(name, _)| name);
        self.line(6, &format!("<model type='{model}'/>"));
        if !nic.connected {
            self.line(6, "<link state='down'/>");
        }
        self.boot(nic.boot);
        self.line(4, "</interface>");
    }

    /// Prints what every domain needs: a TPM if the machine has one, a screen, a serial console.
    fn others(&mut self) {
        if let Some(tpm) = self.machine.tpm {
            let model = if self.machine.arch == Arch::Aarch64 { "tpm-tis" } else { "tpm-crb" };
            let model = if tpm.name() == "1.2" { "tpm-tis" } else { model };
            self.line(4, &format!("<tpm model='{model}'><backend type='emulator' version='{tpm}'/></tpm>"));
        }
        self.line(4, "<serial type='pty'/>");
        self.line(4, "<console type='pty'/>");
        let video = if self.machine.arch == Arch::Aarch64 { "virtio" } else { "vga" };
        self.line(4, "<graphics type='vnc' autoport='yes' listen='127.0.0.1'/>");
        self.line(4, &format!("<video><model type='{video}'/></video>"));
    }

    /// Lists the drives and disks that are not written.
    fn state(&mut self) {
        for disk in self.disks.iter().filter(|disk| self.machine.drive(disk.device).is_none()) {
            self.lost.push(format!("{}: no drive of the machine has this disk", shortened(disk.device)));
        }
        for drive in &self.machine.drives {
            let device = shortened(drive.device.as_deref().unwrap_or("drive"));
            let is_source = |disk: &DiskSource<'_>| Some(disk.device) == drive.device.as_deref();
            let line = match drive.kind {
                DriveKind::EfiVars => format!("{device}: libvirt makes new firmware variables"),
                DriveKind::TpmState => format!("{device}: libvirt makes a new TPM state"),
                DriveKind::Disk if !self.disks.iter().any(is_source) => format!("{device}: no disk for it"),
                _ => continue,
            };
            self.lost.push(line);
        }
    }
}

/// Returns the number of the controller (of the IDE channel) for a place, and the unit there. SCSI
/// controllers are those of the machine.
fn number_and_unit(model: ControllerModel, position: u32) -> (u32, u32) {
    let units = match model {
        ControllerModel::Ahci => 6,
        other => other.units(),
    };
    (position / units, position % units)
}

/// Numbers the SCSI controllers of the domain: as the machine does, with further ones where a model has fewer
/// drives in QEMU.
fn number_scsi(placed: &mut [Placed<'_>]) {
    let part = |one: &Placed<'_>| (one.number, one.unit / scsi_width(one.model));
    let is_scsi = |one: &&mut Placed<'_>| one.model.bus() == Bus::Scsi;
    let mut numbers: BTreeMap<(u32, u32), u32> =
        placed.iter_mut().filter(is_scsi).map(|one| (part(one), 0)).collect();
    let mut next = 0;
    for ((of_machine, _), number) in &mut numbers {
        *number = next.max(*of_machine);
        next = *number + 1;
    }
    for one in placed.iter_mut().filter(is_scsi) {
        one.number = numbers.get(&part(one)).copied().unwrap_or(one.number);
        one.unit %= scsi_width(one.model);
    }
}

/// Returns the letters of a drive: `a` to `z`, `aa` and so on.
pub(super) fn letter(number: u32) -> String {
    let (mut number, mut letters) = (number, Vec::new());
    loop {
        // A remainder of 26 fits into a byte.
        letters.push(char::from(b'a' + (number % 26) as u8));
        number /= 26;
        if number == 0 {
            break;
        }
        number -= 1;
    }
    letters.iter().rev().collect()
}
