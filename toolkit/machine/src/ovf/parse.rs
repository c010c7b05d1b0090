//! Parses a descriptor: its files, its disks and the system.

use std::collections::{HashMap, HashSet};

use imgtool_core::error::escape_control;
use imgtool_core::machine::{Drive, Firmware, MAX_DRIVES, Machine, Os, Tpm};
use imgtool_core::{Error, Result};

use super::{Descriptor, DiskRef, FileRef, SYSTEMS, WHAT, hardware, units};
use crate::xml::{self, Element, Space, shortened};

/// Maximum length in bytes of the name of a file, and of the identifier of a disk, which becomes one: that of
/// Linux file systems.
const MAX_NAME: usize = 255;

/// Parses a descriptor. `system` names one of several systems in it.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Malformed`] for a descriptor that contradicts itself or the specification,
/// `Unsupported` for several systems without a choice and for what is not implemented, `Refused` for the name
/// of a file that leaves the package, `LimitExceeded` beyond the limits.
pub fn parse(bytes: &[u8], system: Option<&str>) -> Result<Descriptor> {
    let envelope = xml::parse(bytes, WHAT)?;
    if envelope.name != "Envelope" || envelope.space != Space::Ovf {
        return Err(Error::wrong_format(format!(
            "not an OVF descriptor: the outermost element is '{}', not the Envelope of OVF",
            shown(&envelope.name)
        )));
    }
    let system = choose(&envelope, system)?;
    let mut descriptor = Descriptor { files: files(&envelope)?, ..Descriptor::default() };
    descriptor.disks = disks(&envelope, &descriptor.files)?;
    descriptor.machine = machine(system, &envelope, &descriptor)?;
    descriptor.system_type = hardware_section(system).and_then(system_type).unwrap_or_default().to_owned();
    unused_disks(&mut descriptor);
    Ok(descriptor)
}

/// Returns a text from the descriptor for a message.
fn shown(text: &str) -> String {
    escape_control(shortened(text)).to_string()
}

/// Returns the system of the descriptor, or the one of this name.
fn choose<'a>(envelope: &'a Element, wanted: Option<&str>) -> Result<&'a Element> {
    let mut systems = Vec::new();
    collect(envelope, &mut systems);
    // The element is VirtualSystem in 1.x and 2.0, Content in 0.9.
    let name = |system: &&'a Element| {
        let id = system.attribute_in(Space::Ovf, "id");
        system.child_text("Name").or(id).unwrap_or_default()
    };
    let names = || {
        let all: Vec<String> = systems.iter().take(20).map(|system| shown(name(system))).collect();
        all.join(", ")
    };
    match (wanted, systems.as_slice()) {
        (_, []) => Err(Error::malformed("the OVF descriptor describes no virtual system")),
        (None, [only]) => Ok(only),
        (None, several) => Err(Error::unsupported(format!(
            "the OVF descriptor describes {} virtual systems: {}",
            several.len(),
            names()
        ))
        .hint("export one virtual machine alone")),
        (Some(wanted), all) => {
            let found = all.iter().copied().find(|system| name(system) == wanted);
            found.ok_or_else(|| {
                Error::usage(format!("no virtual system '{wanted}' in the OVF descriptor"))
                    .hint(format!("it describes {}", names()))
            })
        }
    }
}

/// Collects the systems in an element and in its collections.
fn collect<'a>(element: &'a Element, systems: &mut Vec<&'a Element>) {
    for child in &element.children {
        match child.name.as_str() {
            "VirtualSystem" | "Content" => systems.push(child),
            "VirtualSystemCollection" => collect(child, systems),
            _ => {}
        }
    }
}

fn files(envelope: &Element) -> Result<Vec<FileRef>> {
    let mut files: Vec<FileRef> = Vec::new();
    let (mut ids, mut names) = (HashSet::new(), HashSet::new());
    for file in envelope.all("References").flat_map(|references| references.all("File")) {
        let get = |name: &str| file.attribute_in(Space::Ovf, name);
        let href = get("href").ok_or_else(|| Error::malformed("a file of the OVF descriptor has no name"))?;
        check_name(href)?;
        let id = get("id").unwrap_or(href);
        if !ids.insert(id) || !names.insert(href) {
            return Err(Error::malformed(format!(
                "the OVF descriptor lists the file '{}' twice",
                shown(href)
            )));
        }
        let gzip = match get("compression").unwrap_or_default() {
            "" | "identity" => false,
            "gzip" => true,
            other => {
                let (href, other) = (shown(href), shown(other));
                return Err(Error::unsupported(format!("file '{href}' has the compression '{other}'")));
            }
        };
        let size = get("size").map(|text| number(text, "size")).transpose()?;
        let chunk_size = get("chunkSize").map(|text| number(text, "chunkSize")).transpose()?;
        if chunk_size == Some(0) {
            return Err(Error::malformed(format!("file '{}' has chunks of 0 bytes", shown(href))));
        }
        files.push(FileRef { id: id.to_owned(), href: href.to_owned(), size, gzip, chunk_size });
    }
    Ok(files)
}

/// Refuses a name that is not one path component.
fn check_name(href: &str) -> Result<()> {
    let is_component = !href.is_empty()
        && href.len() <= MAX_NAME
        && !matches!(href, "." | "..")
        && !href.contains(|c: char| matches!(c, '/' | '\\' | ':') || c.is_control());
    if is_component {
        return Ok(());
    }
    Err(Error::refused(format!("the OVF descriptor names the file '{}' outside of the package", shown(href)))
        .hint("a package holds its files beside the descriptor: each name is one path component"))
}

fn number(text: &str, what: &str) -> Result<u64> {
    // `parse` would accept a sign.
    let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    text.parse().ok().filter(|_| is_number).ok_or_else(|| {
        Error::malformed(format!("{what} is '{}' in the OVF descriptor, not a number of bytes", shown(text)))
    })
}

fn disks(envelope: &Element, files: &[FileRef]) -> Result<Vec<DiskRef>> {
    let by_id: HashMap<&str, usize> = (0..).zip(files).map(|(index, file)| (&*file.id, index)).collect();
    let mut disks: Vec<DiskRef> = Vec::new();
    let (mut ids, mut devices) = (HashSet::new(), HashSet::new());
    // The section is DiskSection in 1.x and 2.0, Section in 0.9.
    let sections = envelope.children.iter().filter(|child| matches!(&*child.name, "DiskSection" | "Section"));
    for disk in sections.flat_map(|section| section.all("Disk")) {
        let get = |name: &str| disk.attribute_in(Space::Ovf, name).filter(|value| !value.is_empty());
        let id =
            get("diskId").ok_or_else(|| Error::malformed("a disk of the OVF descriptor has no diskId"))?;
        if id.len() > MAX_NAME {
            let len = id.len();
            return Err(Error::limit(format!("a diskId has {len} bytes, more than {MAX_NAME}")));
        }
        if !ids.insert(id) {
            return Err(Error::malformed(format!(
                "the OVF descriptor describes the disk '{}' twice",
                shown(id)
            )));
        }
        if disks.len() >= MAX_DRIVES {
            return Err(Error::limit(format!("the OVF descriptor has more than {MAX_DRIVES} disks")));
        }
        if let Some(parent) = get("parentRef") {
            let (id, parent) = (shown(id), shown(parent));
            return Err(Error::unsupported(format!("disk '{id}' is a delta of the disk '{parent}'"))
                .hint("export the machine without snapshots"));
        }
        let file = get("fileRef").map(|wanted| {
            by_id.get(wanted).copied().ok_or_else(|| {
                let (id, wanted) = (shown(id), shown(wanted));
                Error::malformed(format!("disk '{id}' is in the file '{wanted}', which is not listed"))
            })
        });
        let file = file.transpose()?;
        let stem = file.map(|index| stem(&files[index].href)).filter(|stem| !devices.contains(*stem));
        let device = stem.unwrap_or(id);
        if !devices.insert(device) {
            return Err(Error::malformed(format!("two disks are called '{}'", shown(device))));
        }
        let (device, format) = (device.to_owned(), get("format").unwrap_or_default().to_owned());
        disks.push(DiskRef { id: id.to_owned(), device, file, capacity: capacity(disk)?, format });
    }
    Ok(disks)
}

/// Returns the name of a file without its extensions for an image and its compression.
fn stem(href: &str) -> &str {
    let stem = href.strip_suffix(".gz").unwrap_or(href);
    match stem.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem,
        _ => stem,
    }
}

fn capacity(disk: &Element) -> Result<Option<u64>> {
    let Some(text) = disk.attribute_in(Space::Ovf, "capacity") else { return Ok(None) };
    // A reference to a property (`${size}`), which the user who installs the machine sets.
    if text.starts_with("${") {
        return Ok(None);
    }
    let unit = disk.attribute_in(Space::Ovf, "capacityAllocationUnits").unwrap_or("byte");
    let capacity = units::bytes_in(unit).and_then(|unit| number(text, "capacity").ok()?.checked_mul(unit));
    capacity.map(Some).ok_or_else(|| {
        let (text, unit) = (shown(text), shown(unit));
        Error::malformed(format!(
            "a disk of the OVF descriptor has the capacity '{text}' in units of '{unit}'"
        ))
    })
}

fn machine(system: &Element, envelope: &Element, descriptor: &Descriptor) -> Result<Machine> {
    let id = system.attribute_in(Space::Ovf, "id");
    let mut machine = Machine {
        name: xml::bounded(system.child_text("Name").or(id).unwrap_or_default()).to_owned(),
        description: description(system),
        os: operating_system(system),
        ..Machine::default()
    };
    let hardware = hardware_section(system);
    if let Some(section) = hardware {
        firmware(section, &mut machine);
        hardware::add(section, default_option(envelope), descriptor, &mut machine)?;
        // The disks as the package lists them: the first one is the boot disk if nobody says otherwise.
        let places: HashMap<&str, usize> =
            (0..).zip(&descriptor.disks).map(|(place, disk)| (&*disk.device, place)).collect();
        let place = |drive: &Drive| places.get(drive.device.as_deref()?).copied();
        machine.drives.sort_by_key(|drive| place(drive).unwrap_or(usize::MAX));
    }
    if let Some(vbox) = system.all("Machine").find(|child| child.space == Space::Vbox) {
        virtualbox(vbox, &mut machine);
    }
    Ok(machine)
}

/// Returns the section with the hardware: the one for VMware if there are several.
fn hardware_section(system: &Element) -> Option<&Element> {
    let is_hardware = |section: &&Element| {
        matches!(&*section.name, "VirtualHardwareSection" | "Section") && section.all("Item").next().is_some()
            || section.name == "VirtualHardwareSection"
    };
    let is_vmware = |section: &&Element| system_type(section).is_some_and(|kind| kind.contains("vmx-"));
    let mut sections = system.children.iter().filter(is_hardware);
    sections.clone().find(is_vmware).or_else(|| sections.next())
}

/// Returns the types of system in a section with hardware.
fn system_type(section: &Element) -> Option<&str> {
    section.child("System").and_then(|system| system.child_text("VirtualSystemType"))
}

/// Returns the name of the configuration that applies if nobody chooses one.
fn default_option(envelope: &Element) -> Option<&str> {
    let section = envelope.child("DeploymentOptionSection")?;
    let is_default =
        |option: &&Element| matches!(option.attribute_in(Space::Ovf, "default"), Some("true" | "1"));
    let option = section.all("Configuration").find(is_default).or_else(|| section.child("Configuration"))?;
    option.attribute_in(Space::Ovf, "id")
}

fn description(system: &Element) -> String {
    let section = system.child("AnnotationSection").and_then(|section| section.child_text("Annotation"));
    section.unwrap_or_default().to_owned()
}

fn operating_system(system: &Element) -> Option<Os> {
    let section = system.child("OperatingSystemSection")?;
    let number = section.attribute_in(Space::Ovf, "id").and_then(|id| id.parse::<u32>().ok());
    let name = section.attribute_in(Space::Vmw, "osType");
    let by_name = || by_vmware_name(name?);
    let by_number = || SYSTEMS.iter().find(|(known, _, _)| Some(*known) == number).map(|(_, _, os)| *os);
    // Number 1 is "other": VMware's name may tell more.
    by_number().filter(|os| *os != Os::Other).or_else(by_name).or_else(by_number)
}

fn by_vmware_name(name: &str) -> Option<Os> {
    if let Some((_, _, os)) = SYSTEMS.iter().find(|(_, known, _)| *known == name && !name.is_empty()) {
        return Some(*os);
    }
    let words = [
        ("windows2019", Os::Windows10),
        ("windows2022", Os::Windows11),
        ("windows11", Os::Windows11),
        ("windows12", Os::Windows11),
        ("windows9", Os::Windows10),
        ("windows8", Os::Windows8),
        ("windows7", Os::Windows7),
        ("linux", Os::Linux),
        ("debian", Os::Linux),
        ("ubuntu", Os::Linux),
        ("centos", Os::Linux),
        ("rhel", Os::Linux),
        ("sles", Os::Linux),
        ("fedora", Os::Linux),
        ("rockylinux", Os::Linux),
        ("solaris", Os::Solaris),
    ];
    let name = name.to_ascii_lowercase();
    words.iter().find(|(word, _)| name.contains(word)).map(|(_, os)| *os)
}

/// Takes the firmware from VMware's settings.
fn firmware(section: &Element, machine: &mut Machine) {
    let settings = section.children.iter().filter(|child| matches!(&*child.name, "Config" | "ExtraConfig"));
    for setting in settings.filter(|child| child.space == Space::Vmw) {
        let get = |name: &str| setting.attribute_in(Space::Vmw, name).unwrap_or_default();
        match (get("key"), get("value").to_ascii_lowercase().as_str()) {
            ("firmware", "efi") => machine.firmware = Firmware::Uefi,
            ("bootOptions.efiSecureBootEnabled" | "uefi.secureBoot.enabled", "true") => {
                machine.secure_boot = true;
            }
            _ => {}
        }
    }
}

/// Takes the firmware and the TPM from VirtualBox's own description.
fn virtualbox(vbox: &Element, machine: &mut Machine) {
    let Some(hardware) = vbox.child("Hardware") else { return };
    // The platform is an element of its own from VirtualBox 7.1 on.
    let places = [Some(hardware), vbox.child("Platform"), hardware.child("Platform")];
    let kind = |name: &'static str| {
        places
            .into_iter()
            .flatten()
            .find_map(move |place| place.child(name))
            .and_then(|one| one.attribute("type"))
    };
    if kind("Firmware").is_some_and(|kind| kind.starts_with("EFI")) {
        machine.firmware = Firmware::Uefi;
    }
    match kind("TrustedPlatformModule") {
        Some("v1_2") => machine.tpm = Some(Tpm::V1_2),
        Some("v2_0") => machine.tpm = Some(Tpm::V2_0),
        _ => {}
    }
}

/// Notes disks that no drive of the machine has.
fn unused_disks(descriptor: &mut Descriptor) {
    /// Maximum number of names in the note. Our limit: a person reads no more.
    const MOST: usize = 5;
    let is_unused = |disk: &&DiskRef| descriptor.machine.drive(&disk.device).is_none();
    let mut unused = descriptor.disks.iter().filter(is_unused).map(|disk| shown(&disk.device));
    let first: Vec<String> = unused.by_ref().take(MOST).collect();
    let more = if unused.next().is_some() { " and others" } else { "" };
    if !first.is_empty() {
        descriptor.notes.push(format!("no drive of the machine has the disk {}{more}", first.join(", ")));
    }
}
