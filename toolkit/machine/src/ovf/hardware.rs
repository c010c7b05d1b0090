//! The items of a hardware section: processors, memory, controllers with drives, network adapters.

use std::collections::{BTreeSet, HashMap};

use imgtool_core::error::escape_control;
use imgtool_core::machine::{
    Bus, Controller, ControllerModel, Cpu, Drive, DriveKind, MAX_DRIVES, Machine, Nic, NicModel,
};
use imgtool_core::{Error, Result};

use super::{CONTROLLERS, Descriptor, DiskRef, units};
use crate::xml::{Element, Space, bounded, shortened};

/// Maximum number of processors. Our limit: four times VMware's.
const MAX_CPUS: u32 = 4096;
/// Highest number of a controller on its bus. VMware's limit.
const LAST_ADDRESS: u32 = 3;
/// Maximum number of network adapters. Our limit: VMware has 10, Proxmox VE 32.
const MAX_NICS: usize = 64;

/// An item: a resource with its settings.
struct Item<'a> {
    element: &'a Element,
    kind: u32,
}

impl<'a> Item<'a> {
    fn get(&self, name: &'a str) -> Option<&'a str> {
        self.element.child_text(name)
    }

    /// Returns a setting that is a whole number; `None` if it is missing or something else.
    fn number(&self, name: &'a str) -> Option<u32> {
        self.get(name)?.parse().ok()
    }

    fn subtype(&self) -> &'a str {
        self.get("ResourceSubType").unwrap_or_default()
    }

    /// Returns the name for people.
    fn name(&self) -> String {
        let name = self.get("ElementName").or(self.get("Caption")).unwrap_or("without a name");
        escape_control(shortened(name)).to_string()
    }
}

/// Adds the resources of a section to the machine. Of the items for several configurations, those for
/// `option` count.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Malformed`] for a number of processors or a memory that is none;
/// `LimitExceeded` beyond the limits.
pub(super) fn add(
    section: &Element,
    option: Option<&str>,
    package: &Descriptor,
    machine: &mut Machine,
) -> Result<()> {
    let items: Vec<Item<'_>> = section.children.iter().filter_map(|child| item(child, option)).collect();
    let mut places = controllers(&items, machine);
    for item in &items {
        match item.kind {
            3 => machine.cpu = cpu(item)?,
            4 => machine.memory = Some(memory(item)?),
            5 | 6 | 20 => {}
            10 => add_nic(item, machine)?,
            15..=17 => add_drive(item, package, &mut places, machine)?,
            kind => {
                if let Some(what) = other_resource(kind) {
                    machine.extra.push(format!("{what} ({})", item.name()));
                }
            }
        }
    }
    Ok(())
}

/// Returns the item of an element, unless it is for another configuration or a bound of one.
fn item<'a>(element: &'a Element, option: Option<&str>) -> Option<Item<'a>> {
    if !matches!(&*element.name, "Item" | "StorageItem" | "EthernetPortItem") {
        return None;
    }
    let options = element.attribute_in(Space::Ovf, "configuration");
    let applies = options.is_none_or(|all| all.split_whitespace().any(|one| Some(one) == option));
    if !applies || element.attribute_in(Space::Ovf, "bound").is_some() {
        return None;
    }
    let kind = element.child_text("ResourceType")?.parse().ok()?;
    Some(Item { element, kind })
}

/// Names the resources that the model has no place for. A graphics adapter and USB controllers are part of
/// every machine.
fn other_resource(kind: u32) -> Option<&'static str> {
    match kind {
        14 => Some("floppy drive"),
        18 => Some("tape drive"),
        21 => Some("serial port"),
        22 => Some("parallel port"),
        35 => Some("sound card"),
        _ => None,
    }
}

fn cpu(item: &Item<'_>) -> Result<Cpu> {
    let text = item.get("VirtualQuantity").unwrap_or_default();
    let count = text.parse().ok().filter(|count| (1..=MAX_CPUS).contains(count)).ok_or_else(|| {
        let text = escape_control(shortened(text)).to_string();
        Error::malformed(format!("the OVF descriptor has '{text}' processors, not 1 to {MAX_CPUS}"))
    })?;
    let cores =
        item.number("CoresPerSocket").filter(|cores| *cores > 0 && u32::is_multiple_of(count, *cores));
    let cores: u32 = cores.unwrap_or(1);
    Ok(Cpu { sockets: count / cores, cores })
}

fn memory(item: &Item<'_>) -> Result<u64> {
    let quantity = item.get("VirtualQuantity").unwrap_or_default();
    let unit = item.get("AllocationUnits").or(item.get("VirtualQuantityUnits")).unwrap_or("byte * 2^20");
    let bytes = quantity.parse::<u64>().ok().zip(units::bytes_in(unit));
    let bytes = bytes.and_then(|(quantity, unit)| quantity.checked_mul(unit)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| {
        let [quantity, unit] = [quantity, unit].map(|text| escape_control(shortened(text)).to_string());
        Error::malformed(format!("the OVF descriptor has memory of '{quantity}' in units of '{unit}'"))
    })
}

/// Places of drives: where the machine's controllers are, and what is taken.
#[derive(Default)]
struct Places<'a> {
    /// Index of the controller with an `InstanceID`.
    by_id: HashMap<&'a str, usize>,
    taken: BTreeSet<(usize, u32)>,
}

impl Places<'_> {
    /// Takes a place for a drive: on its controller, or for one that names no controller on the next one with
    /// a free place. Returns the controller and the place.
    fn find(
        &mut self,
        controller: usize,
        wanted: Option<u32>,
        is_fixed: bool,
        machine: &Machine,
    ) -> Option<(usize, u32)> {
        let last = if is_fixed { controller.saturating_add(1) } else { machine.controllers.len() };
        (controller..last).find_map(|index| {
            let model = machine.controllers.get(index)?.model;
            let wanted = wanted.and_then(|unit| unit_of(model, unit));
            Some((index, self.take(index, model, wanted)?))
        })
    }

    /// Takes a place on a controller: the one that is asked for, or the next free one. Returns `None` if the
    /// controller is full.
    fn take(&mut self, controller: usize, model: ControllerModel, wanted: Option<u32>) -> Option<u32> {
        let is_free = |unit: &u32| !self.taken.contains(&(controller, *unit));
        let wanted = wanted.filter(|unit| *unit < model.units() && is_free(unit));
        let unit = wanted.or_else(|| (0..model.units()).find(is_free))?;
        self.taken.insert((controller, unit));
        Some(unit)
    }
}

/// Adds the controllers, in the order of their addresses on each bus.
fn controllers<'a>(items: &[Item<'a>], machine: &mut Machine) -> Places<'a> {
    let mut found: Vec<(Bus, u32, ControllerModel, &str)> = Vec::new();
    for item in items.iter().filter(|item| matches!(item.kind, 5 | 6 | 20)) {
        let model = model(item, machine);
        let address = item.number("Address").unwrap_or(u32::MAX);
        found.push((model.bus(), address, model, item.get("InstanceID").unwrap_or_default()));
    }
    // Stable: controllers without an address keep their order.
    found.sort_by_key(|(bus, address, ..)| (*bus, *address));
    let mut places = Places::default();
    for (bus, address, model, id) in found.into_iter().take(MAX_DRIVES) {
        // Numbers without a controller stay free: the second IDE channel may be the only one.
        let of_bus = machine.controllers.iter().filter(|known| known.model.bus() == bus).count();
        let gap = (address as usize).saturating_sub(of_bus);
        let gap = if address <= LAST_ADDRESS { gap } else { 0 };
        machine.controllers.extend(std::iter::repeat_n(Controller { model }, gap));
        places.by_id.insert(id, machine.controllers.len());
        machine.controllers.push(Controller { model });
    }
    places
}

/// Returns the model of a controller. An unknown one becomes the usual one of its bus.
fn model(item: &Item<'_>, machine: &mut Machine) -> ControllerModel {
    let subtype = item.subtype();
    // VMware accepts a list of words.
    let words = || subtype.split([' ', ',']).filter(|word| !word.is_empty());
    let is_known = |known: &&(u32, &str, ControllerModel)| {
        known.0 == item.kind && words().any(|word| word.eq_ignore_ascii_case(known.1))
    };
    if let Some((_, _, model)) = CONTROLLERS.iter().find(is_known) {
        return *model;
    }
    let (model, is_usual) = match item.kind {
        5 => (ControllerModel::Ide, true),
        6 => (ControllerModel::LsiLogic, subtype.is_empty()),
        _ => (ControllerModel::Ahci, subtype.is_empty()),
    };
    if !is_usual {
        let subtype = escape_control(shortened(subtype)).to_string();
        machine.extra.push(format!("controller of the model '{subtype}' (becomes {model})"));
    }
    model
}

fn add_drive<'a>(
    item: &Item<'a>,
    package: &Descriptor,
    places: &mut Places<'a>,
    machine: &mut Machine,
) -> Result<()> {
    if machine.drives.len() >= MAX_DRIVES {
        return Err(Error::limit(format!("the OVF descriptor has more than {MAX_DRIVES} drives")));
    }
    let resource = item.get("HostResource").unwrap_or_default();
    let kind = if item.kind == 17 { DriveKind::Disk } else { DriveKind::Cdrom };
    if kind == DriveKind::Disk && resource.is_empty() {
        machine.extra.push(format!("drive '{}': the descriptor names no disk for it", item.name()));
        return Ok(());
    }
    let device = match kind {
        DriveKind::Disk => Some(&*disk_of(resource, package, item)?.device),
        _ => None,
    };
    if kind == DriveKind::Cdrom && resource.starts_with("ovf:") {
        machine.extra.push(format!("content of the CD drive ({})", item.name()));
    }
    if device.is_some_and(|device| machine.drive(device).is_some()) {
        let name = item.name();
        return Err(Error::unsupported(format!("the drive '{name}' shares its disk with another drive")));
    }
    let mut drive = Drive::new(kind, device);
    let parent = item.get("Parent").and_then(|parent| places.by_id.get(parent).copied());
    let controller = match parent {
        Some(parent) => parent,
        None => first_controller(machine),
    };
    let wanted = item.number("AddressOnParent").or(item.number("Address").filter(|_| parent.is_none()));
    let Some((controller, unit)) = places.find(controller, wanted, parent.is_some(), machine) else {
        let name = item.name();
        if kind == DriveKind::Cdrom {
            machine.extra.push(format!("CD drive ({name}): its controller is full"));
            return Ok(());
        }
        return Err(Error::malformed(format!("the drive '{name}' is one too many on its controller")));
    };
    (drive.controller, drive.unit) = (Some(controller), unit);
    machine.drives.push(drive);
    Ok(())
}

/// Returns the controller for a drive that names none.
fn first_controller(machine: &mut Machine) -> usize {
    if machine.controllers.is_empty() {
        machine.controllers.push(Controller { model: ControllerModel::LsiLogic });
    }
    0
}

/// Converts an address on a controller into a place of the model, which leaves out the controller's own
/// number.
fn unit_of(model: ControllerModel, address: u32) -> Option<u32> {
    match (model.bus(), address) {
        (Bus::Scsi, 7) => None,
        (Bus::Scsi, 8..) => Some(address - 1),
        _ => Some(address),
    }
}

/// Returns the disk that a drive names: `ovf:/disk/ID`, in OVF 0.9 `disk/ID`, or by its file `ovf:/file/ID`.
fn disk_of<'a>(resource: &str, package: &'a Descriptor, item: &Item<'_>) -> Result<&'a DiskRef> {
    let path = resource.strip_prefix("ovf:").unwrap_or(resource).trim_start_matches('/');
    let is_in = |disk: &&DiskRef, id: &str| {
        disk.file.and_then(|file| package.files.get(file)).is_some_and(|file| file.id == id)
    };
    let wanted = path.strip_prefix("disk/").unwrap_or(path);
    let found = match path.strip_prefix("file/") {
        Some(id) => package.disks.iter().find(|disk| is_in(disk, id)),
        None => package.disks.iter().find(|disk| disk.id == wanted),
    };
    found.ok_or_else(|| {
        let (name, resource) = (item.name(), escape_control(shortened(resource)).to_string());
        Error::malformed(format!("the drive '{name}' has the disk '{resource}', which is not described"))
    })
}

fn add_nic(item: &Item<'_>, machine: &mut Machine) -> Result<()> {
    if machine.nics.len() >= MAX_NICS {
        return Err(Error::limit(format!("the OVF descriptor has more than {MAX_NICS} network adapters")));
    }
    let subtype = item.subtype();
    let model = match subtype.to_ascii_lowercase().as_str() {
        "" | "e1000" => NicModel::E1000,
        "e1000e" => NicModel::E1000e,
        "virtio" | "virtio-net" | "virtionet" => NicModel::Virtio,
        "pcnet32" | "pcnet" | "vlance" => NicModel::Pcnet,
        "vmxnet" | "vmxnet2" | "vmxnet3" => NicModel::Vmxnet3,
        _ => {
            let subtype = escape_control(shortened(subtype)).to_string();
            machine.extra.push(format!("network adapter of the model '{subtype}' (becomes e1000)"));
            NicModel::E1000
        }
    };
    let mac = item.get("Address");
    let mac = mac.and_then(|mac| crate::mac_address(mac, machine.nics.len(), &mut machine.extra));
    machine.nics.push(Nic {
        mac,
        network: item.get("Connection").map(|network| bounded(network).to_owned()),
        connected: !item.get("AutomaticAllocation").is_some_and(|value| value.eq_ignore_ascii_case("false")),
        ..Nic::new(model)
    });
    Ok(())
}
