//! Parses the XML of a domain.

use std::collections::{BTreeMap, BTreeSet};

use imgtool_core::error::escape_control;
use imgtool_core::machine::{
    Arch, Bus, Chipset, Controller, ControllerModel, Cpu, Drive, DriveKind, Firmware, MAX_DRIVES,
    MAX_POSITION, Machine, Nic, NicModel, Os, Tpm,
};
use imgtool_core::{Error, Result};
use uuid::Uuid;

use super::{ADAPTERS, CONTROLLERS, NETWORK, SYSTEMS, WHAT};
use crate::xml::{self, Element, shortened};

/// Maximum number of network adapters. Our limit: PCI has 32 devices on a bus.
const MAX_NICS: usize = 64;
/// Maximum number of processors. Our limit: that of OVF descriptors.
const MAX_CPUS: u32 = 4096;

/// Parses a domain. Devices and programs of the host, and what is passed to QEMU unseen, become lines of
/// [`Machine::extra`].
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] for another document, `Malformed` for processors or memory that
/// are none, `LimitExceeded` beyond the limits.
pub fn parse(bytes: &[u8]) -> Result<Machine> {
    let domain = xml::parse(bytes, WHAT)?;
    if domain.name != "domain" {
        return Err(Error::wrong_format(format!(
            "not a domain of libvirt: the outermost element is '{}'",
            escape_control(shortened(&domain.name))
        )));
    }
    let mut machine = Machine {
        name: xml::bounded(domain.child_text("name").unwrap_or_default()).to_owned(),
        description: domain.child_text("description").unwrap_or_default().to_owned(),
        uuid: domain.child_text("uuid").and_then(|uuid| Uuid::parse_str(uuid).ok()),
        os: operating_system(&domain),
        cpu: cpu(&domain)?,
        memory: memory(&domain)?,
        ..Machine::default()
    };
    firmware(&domain, &mut machine);
    if let Some(devices) = domain.child("devices") {
        add_devices(devices, &mut machine)?;
    }
    // Elements of this kind pass options and environment to QEMU.
    if domain.children.iter().any(|child| matches!(&*child.name, "commandline" | "override" | "capabilities"))
    {
        machine.extra.push("options for QEMU: concern the host, never carried over".to_owned());
    }
    Ok(machine)
}

fn operating_system(domain: &Element) -> Option<Os> {
    let info = domain.child("metadata")?.child("libosinfo")?;
    let id = info.child("os")?.attribute("id")?;
    let known = SYSTEMS.iter().find(|(known, _)| *known == id).map(|(_, os)| *os);
    known.or_else(|| (!id.contains("microsoft.com") && !id.contains("bsd")).then_some(Os::Linux))
}

fn malformed(what: &str, text: &str) -> Error {
    Error::malformed(format!("{WHAT} has {what} of '{}'", escape_control(shortened(text))))
}

fn cpu(domain: &Element) -> Result<Cpu> {
    let text = domain.child_text("vcpu").unwrap_or("1");
    let count: u32 = text
        .parse()
        .ok()
        .filter(|count| (1..=MAX_CPUS).contains(count))
        .ok_or_else(|| malformed("a number of processors", text))?;
    let topology = domain.child("cpu").and_then(|cpu| cpu.child("topology"));
    let part = |name: &str| -> Option<u32> { topology?.attribute(name).map_or(Some(1), |n| n.parse().ok()) };
    let cores =
        part("cores").and_then(|cores| cores.checked_mul(part("threads")?)?.checked_mul(part("dies")?));
    let cores = cores.filter(|cores| *cores > 0 && count.is_multiple_of(*cores)).unwrap_or(1);
    // Without a topology, each processor is a socket.
    Ok(Cpu { sockets: count / cores, cores })
}

fn memory(domain: &Element) -> Result<Option<u64>> {
    let Some(element) = domain.child("memory") else { return Ok(None) };
    let unit = match element.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => Some(1),
        "KB" => Some(1000),
        "k" | "KiB" => Some(1 << 10),
        "MB" => Some(1_000_000),
        "M" | "MiB" => Some(1 << 20),
        "GB" => Some(1_000_000_000),
        "G" | "GiB" => Some(1 << 30),
        "TB" => Some(1_000_000_000_000),
        "T" | "TiB" => Some(1u64 << 40),
        _ => None,
    };
    let bytes =
        element.text().parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    bytes.filter(|bytes| *bytes > 0).map(Some).ok_or_else(|| malformed("memory", element.text()))
}

fn firmware(domain: &Element, machine: &mut Machine) {
    let Some(os) = domain.child("os") else { return };
    if let Some(kind) = os.child("type") {
        if kind.attribute("arch") == Some("aarch64") {
            machine.arch = Arch::Aarch64;
        }
        machine.chipset = match kind.attribute("machine").unwrap_or_default() {
            name if name.contains("q35") => Some(Chipset::Q35),
            name if name == "pc" || name.contains("i440fx") => Some(Chipset::I440fx),
            _ => None,
        };
    }
    let loader = os.child("loader");
    let is_flash = loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"));
    if os.attribute("firmware") == Some("efi") || is_flash {
        machine.firmware = Firmware::Uefi;
    }
    let feature = os.child("firmware").and_then(|firmware| {
        firmware.all("feature").find(|feature| feature.attribute("name") == Some("secure-boot"))
    });
    let is_enabled = feature.is_some_and(|feature| feature.attribute("enabled") == Some("yes"));
    machine.secure_boot =
        is_enabled || loader.is_some_and(|loader| loader.attribute("secure") == Some("yes"));
    for name in ["kernel", "initrd", "cmdline"] {
        if os.child(name).is_some() {
            machine.extra.push(format!("{name}: a file of the host, never carried over"));
        }
    }
    // An order of classes of devices: only the class of the first disk is known.
    if os.child("boot").is_some_and(|boot| boot.attribute("dev") != Some("hd")) {
        machine.extra.push("boot order by class".to_owned());
    }
}

fn add_devices(devices: &Element, machine: &mut Machine) -> Result<()> {
    let mut places = Places::new(devices, machine);
    for device in &devices.children {
        match device.name.as_str() {
            "disk" => add_drive(device, &mut places, machine)?,
            "interface" => add_nic(device, machine)?,
            "tpm" => {
                let version = device.child("backend").and_then(|backend| backend.attribute("version"));
                machine.tpm = Some(if version == Some("1.2") { Tpm::V1_2 } else { Tpm::V2_0 });
            }
            "hostdev" | "filesystem" | "redirdev" | "smartcard" | "shmem" | "lease" => {
                machine.extra.push(format!("{}: concerns the host, never carried over", device.name));
            }
            "sound" | "watchdog" | "rng" | "panic" | "vsock" | "crypto" | "iommu" => {
                let model = device.attribute("model").unwrap_or_default();
                let text = format!("{} {}", device.name, shortened(model));
                machine.extra.push(text.trim().to_owned());
            }
            // Every machine has a screen, a keyboard and consoles.
            _ => {}
        }
    }
    Ok(())
}

/// Places of drives: the models of the SCSI controllers by number, and what is taken.
struct Places {
    scsi: BTreeMap<u32, ControllerModel>,
    taken: BTreeSet<(Bus, u32)>,
}

impl Places {
    fn new(devices: &Element, machine: &mut Machine) -> Self {
        let mut scsi = BTreeMap::new();
        for one in devices.all("controller").filter(|one| one.attribute("type") == Some("scsi")) {
            let name = one.attribute("model").unwrap_or("auto");
            let model = CONTROLLERS.iter().find(|(known, _)| *known == name).map(|(_, model)| *model);
            if model.is_none() && name != "auto" {
                let name = escape_control(shortened(name));
                machine.extra.push(format!("SCSI controller of the model '{name}' (becomes lsilogic)"));
            }
            let index = one.attribute("index").map_or(Some(0), |index| index.parse::<u32>().ok());
            if let Some(index) = index.filter(|index| *index <= MAX_POSITION) {
                scsi.entry(index).or_insert(model.unwrap_or(ControllerModel::LsiLogic));
            }
        }
        Self { scsi, taken: BTreeSet::new() }
    }

    fn model(&self, controller: u32) -> ControllerModel {
        self.scsi.get(&controller).copied().unwrap_or(ControllerModel::LsiLogic)
    }

    /// Takes a place on the bus of a model, counted across its controllers: the one that is asked for, or a
    /// free one. On SCSI, that is one of the same controller, or one behind all controllers.
    fn take(&mut self, model: ControllerModel, wanted: u32, controller: u32) -> Option<u32> {
        let (bus, units) = (model.bus(), model.units());
        let (mut own, mut further) = (wanted..=MAX_POSITION, MAX_POSITION + 1);
        if bus == Bus::Scsi {
            let last = self.scsi.keys().next_back().copied().unwrap_or(0).max(controller);
            let first = controller.saturating_mul(units);
            further = last.saturating_add(1).saturating_mul(units);
            own = first..=if controller == last { MAX_POSITION } else { first.saturating_add(units - 1) };
        }
        let is_free = |place: &u32| !self.taken.contains(&(bus, *place));
        let asked = Some(wanted).filter(|place| own.contains(place)).filter(is_free);
        let place = asked.or_else(|| own.chain(further..=MAX_POSITION).find(is_free))?;
        self.taken.insert((bus, place));
        Some(place)
    }

    /// Attaches a drive, with the controllers that the domain has up to its own.
    fn attach(&self, drive: &mut Drive, model: ControllerModel, place: u32, machine: &mut Machine) -> bool {
        if model.bus() == Bus::Scsi && place <= MAX_POSITION {
            let known = machine.controllers.iter().filter(|one| one.model.bus() == Bus::Scsi).count();
            for number in (0..=place / model.units()).skip(known) {
                let model = self.scsi.get(&number).copied().unwrap_or(model);
                machine.controllers.push(Controller { model });
            }
        }
        machine.attach(drive, model, place)
    }
}

fn add_drive(device: &Element, places: &mut Places, machine: &mut Machine) -> Result<()> {
    if machine.drives.len() >= MAX_DRIVES {
        return Err(Error::limit(format!("{WHAT} has more than {MAX_DRIVES} drives")));
    }
    let target = device.child("target");
    let name = target.and_then(|target| target.attribute("dev")).unwrap_or_default();
    let kind = match device.attribute("device").unwrap_or("disk") {
        "cdrom" => DriveKind::Cdrom,
        "disk" => DriveKind::Disk,
        other => {
            let (other, name) = (escape_control(shortened(other)), escape_control(shortened(name)));
            machine.extra.push(format!("{other} {name}"));
            return Ok(());
        }
    };
    let source = device.child("source");
    let file = source.and_then(|source| source.attribute("file").or(source.attribute("dev")));
    if kind == DriveKind::Cdrom && file.is_some() {
        machine.extra.push(format!("content of the CD drive {}", escape_control(shortened(name))));
    }
    let stem = file.and_then(|file| std::path::Path::new(file).file_stem()).and_then(|stem| stem.to_str());
    let mut drive = Drive::new(kind, stem.map(xml::bounded).filter(|_| kind == DriveKind::Disk));
    drive.read_only |= device.child("readonly").is_some();
    let boot = device.child("boot").and_then(|boot| boot.attribute("order")?.parse::<u32>().ok());
    drive.boot = boot.and_then(|boot| boot.checked_sub(1));
    let (model, wanted, controller) = place(device, target, name, places);
    if target.and_then(|target| target.attribute("bus")) == Some("usb") {
        machine
            .extra
            .push(format!("bus usb of the drive {} (becomes sata)", escape_control(shortened(name))));
    }
    let position = places.take(model, wanted, controller).filter(|_| wanted <= MAX_POSITION);
    if !position.is_some_and(|position| places.attach(&mut drive, model, position, machine)) {
        return Err(malformed("a drive with an address", name));
    }
    machine.drives.push(drive);
    Ok(())
}

/// Returns the controller of a drive, its place on the bus and the number of the controller: that of its
/// address, or of the letters of its name.
fn place(
    device: &Element,
    target: Option<&Element>,
    name: &str,
    places: &Places,
) -> (ControllerModel, u32, u32) {
    let address = device.child("address").filter(|address| address.attribute("type") == Some("drive"));
    let part = |part: &str| address.and_then(|address| address.attribute(part)?.parse::<u32>().ok());
    let (controller, channel, unit) =
        (part("controller").unwrap_or(0), part("bus").unwrap_or(0), part("unit"));
    let by_name = letters(name).unwrap_or(0);
    let bus = target.and_then(|target| target.attribute("bus"));
    let bus = bus.unwrap_or(match name.get(..2) {
        Some("hd") => "ide",
        Some("vd") => "virtio",
        _ => "scsi",
    });
    let flat = |units: u32, number: u32| {
        unit.map_or(by_name, |unit| number.saturating_mul(units).saturating_add(unit))
    };
    let (model, wanted) = match bus {
        "ide" => (ControllerModel::Ide, flat(2, channel.saturating_add(controller.saturating_mul(2)))),
        "sata" | "usb" => (ControllerModel::Ahci, flat(6, controller)),
        "virtio" => (ControllerModel::VirtioBlk, by_name),
        "nvme" => (ControllerModel::Nvme, by_name),
        _ => {
            let model = places.model(controller);
            // The number of the drive is the target, or on a target with several LUNs the unit.
            let target = part("target").filter(|target| *target > 0 && model != ControllerModel::LsiLogic);
            let first = controller.saturating_mul(model.units());
            (model, target.map_or(flat(model.units(), controller), |target| first.saturating_add(target)))
        }
    };
    (model, wanted, controller)
}

/// Returns the number of a drive from its letters: `sda` is 0, `sdaa` is 26.
fn letters(name: &str) -> Option<u32> {
    let letters = name.get(2..).filter(|letters| !letters.is_empty())?;
    letters
        .bytes()
        .try_fold(0u32, |number, letter| {
            let digit = letter.checked_sub(b'a').filter(|digit| *digit < 26)?;
            number.checked_mul(26)?.checked_add(u32::from(digit) + 1)
        })?
        .checked_sub(1)
}

fn add_nic(device: &Element, machine: &mut Machine) -> Result<()> {
    if machine.nics.len() >= MAX_NICS {
        return Err(Error::limit(format!("{WHAT} has more than {MAX_NICS} network adapters")));
    }
    let kind = device.attribute("type").unwrap_or_default();
    let number = machine.nics.len();
    if device.child("script").is_some() || matches!(kind, "hostdev" | "direct" | "vhostuser" | "vdpa") {
        machine.extra.push(format!("interface {number}: its device of the host is never carried over"));
    }
    let name = device.child("model").and_then(|model| model.attribute("type")).unwrap_or("virtio");
    let model = ADAPTERS.iter().find(|(known, _)| *known == name).map(|(_, model)| *model);
    if model.is_none() {
        let name = escape_control(shortened(name));
        machine.extra.push(format!("network adapter of the model '{name}' (becomes e1000)"));
    }
    let source = device.child("source").filter(|_| matches!(kind, "network" | "bridge"));
    let network = source.and_then(|source| source.attribute("network").or(source.attribute("bridge")));
    let link = device.child("link").and_then(|link| link.attribute("state"));
    let boot = device.child("boot").and_then(|boot| boot.attribute("order")?.parse::<u32>().ok());
    let mac = device.child("mac").and_then(|mac| mac.attribute("address"));
    let mac = mac.and_then(|mac| crate::mac_address(mac, number, &mut machine.extra));
    machine.nics.push(Nic {
        model: model.unwrap_or(NicModel::E1000),
        mac,
        network: network.filter(|network| *network != NETWORK).map(|name| xml::bounded(name).to_owned()),
        connected: link != Some("down"),
        boot: boot.and_then(|boot| boot.checked_sub(1)),
    });
    Ok(())
}
