//! [`Machine`], the description of the virtual machine whose disks an image holds.
//!
//! A VMA archive, an OVA and a libvirt domain describe the same things in different words: processors,
//! memory, firmware, controllers with drives, network adapters. This model holds what two of these dialects
//! have in common. Settings of one dialect alone are lines of [`Machine::extra`], so that a program can list
//! what a conversion leaves out. The crate `imgtool-machine` reads and writes the dialects.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use uuid::Uuid;

/// Maximum flat number of a drive on its bus. Our limit: VMware and libvirt have fewer, and a larger number
/// would only make controllers without drives.
pub const MAX_POSITION: u32 = 255;

/// Maximum number of drives. VMA's limit of devices, with as many CD drives.
pub const MAX_DRIVES: usize = 508;

/// A virtual machine. All texts are untrusted: they come from an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// Name; empty if unknown.
    pub name: String,
    /// Description for people, possibly of several lines; empty if there is none.
    pub description: String,
    /// Identifier that the guest sees (SMBIOS).
    #[serde(serialize_with = "as_text")]
    pub uuid: Option<Uuid>,
    /// Operating system of the guest, if known.
    pub os: Option<Os>,
    /// Processor architecture.
    pub arch: Arch,
    /// Chipset of the emulated board; `None` if the dialect does not choose one.
    pub chipset: Option<Chipset>,
    /// Processors.
    pub cpu: Cpu,
    /// Memory in bytes; `None` if unknown.
    pub memory: Option<u64>,
    /// Firmware.
    pub firmware: Firmware,
    /// True if the firmware starts only signed boot loaders.
    pub secure_boot: bool,
    /// Version of the TPM, if there is one.
    pub tpm: Option<Tpm>,
    /// Controllers, in the order of their numbers on each bus.
    pub controllers: Vec<Controller>,
    /// Disks and other drives, in order.
    pub drives: Vec<Drive>,
    /// Network adapters, in order.
    pub nics: Vec<Nic>,
    /// Settings of the source that this model has no place for, one line each.
    pub extra: Vec<String>,
}

/// Processors of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Number of sockets, at least 1.
    pub sockets: u32,
    /// Number of cores of each socket, at least 1.
    pub cores: u32,
}

impl Cpu {
    /// Returns the number of cores of all sockets.
    pub fn count(self) -> u32 {
        self.sockets.saturating_mul(self.cores)
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self { sockets: 1, cores: 1 }
    }
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($(#[$attribute:meta])* $variant:ident = $word:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
            #[non_exhaustive]
            pub enum $name {
                $($(#[$attribute])* $variant,)*
            }

            impl $name {
                /// All values.
                pub const ALL: &[Self] = &[$(Self::$variant),*];

                /// Returns the name in JSON and in messages.
                pub fn name(self) -> &'static str {
                    match self { $(Self::$variant => $word,)* }
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(self.name())
                }
            }

            impl Serialize for $name {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    serializer.serialize_str(self.name())
                }
            }
        )*
    };
}

words! {
    /// Operating system of a guest, as exactly as Proxmox VE tells them apart.
    Os {
        /// Another one than those below.
        Other = "other",
        /// Linux 2.6 or newer.
        Linux = "linux",
        /// Linux 2.4.
        Linux24 = "linux-2.4",
        /// Solaris and its relatives.
        Solaris = "solaris",
        /// Windows 2000.
        Windows2000 = "windows-2000",
        /// Windows XP.
        WindowsXp = "windows-xp",
        /// Windows Server 2003.
        Windows2003 = "windows-2003",
        /// Windows Vista.
        WindowsVista = "windows-vista",
        /// Windows Server 2008.
        Windows2008 = "windows-2008",
        /// Windows 7 and Windows Server 2008 R2.
        Windows7 = "windows-7",
        /// Windows 8 and Windows Server 2012.
        Windows8 = "windows-8",
        /// Windows 10, Windows Server 2016 and 2019.
        Windows10 = "windows-10",
        /// Windows 11, Windows Server 2022 and 2025.
        Windows11 = "windows-11",
    }
    /// Processor architecture.
    #[derive(Default)]
    Arch {
        /// 64-bit x86.
        #[default]
        X86_64 = "x86_64",
        /// 64-bit ARM.
        Aarch64 = "aarch64",
    }
    /// Chipset of the emulated board.
    Chipset {
        /// Intel 440FX with PIIX, without PCI Express.
        I440fx = "i440fx",
        /// Intel Q35 with ICH9.
        Q35 = "q35",
    }
    /// Firmware.
    #[derive(Default)]
    Firmware {
        /// BIOS.
        #[default]
        Bios = "bios",
        /// UEFI.
        Uefi = "uefi",
    }
    /// Version of a TPM.
    Tpm {
        /// TPM 1.2.
        V1_2 = "1.2",
        /// TPM 2.0.
        V2_0 = "2.0",
    }
    /// Bus of drives.
    Bus {
        /// IDE.
        Ide = "ide",
        /// SATA.
        Sata = "sata",
        /// SCSI.
        Scsi = "scsi",
        /// virtio-blk: each drive is its own PCI device.
        Virtio = "virtio",
        /// NVMe.
        Nvme = "nvme",
    }
    /// Model of a controller.
    ControllerModel {
        /// IDE, one channel of two drives.
        Ide = "ide",
        /// SATA: AHCI.
        Ahci = "ahci",
        /// SCSI: LSI Logic 53C895A, VMware's LSI Logic parallel.
        LsiLogic = "lsilogic",
        /// SCSI: LSI 53C810.
        Lsi53c810 = "lsi53c810",
        /// SCSI: LSI SAS 1068, VMware's LSI Logic SAS.
        LsiSas1068 = "lsisas1068",
        /// SCSI: LSI MegaRAID SAS.
        MegaSas = "megasas",
        /// SCSI: BusLogic.
        BusLogic = "buslogic",
        /// SCSI: VMware's paravirtual controller.
        Pvscsi = "pvscsi",
        /// SCSI: virtio-scsi.
        VirtioScsi = "virtio-scsi",
        /// SCSI: virtio-scsi, with a controller of its own for each drive.
        VirtioScsiSingle = "virtio-scsi-single",
        /// virtio-blk. All drives of the machine share one entry.
        VirtioBlk = "virtio-blk",
        /// NVMe.
        Nvme = "nvme",
    }
    /// Kind of a drive.
    DriveKind {
        /// A disk.
        Disk = "disk",
        /// A CD or DVD drive.
        Cdrom = "cdrom",
        /// Variables of the UEFI firmware.
        EfiVars = "efi-vars",
        /// State of the TPM.
        TpmState = "tpm-state",
    }
    /// Model of a network adapter.
    NicModel {
        /// Intel 82540EM.
        E1000 = "e1000",
        /// Intel 82574L.
        E1000e = "e1000e",
        /// AMD PCnet.
        Pcnet = "pcnet",
        /// Realtek 8139.
        Rtl8139 = "rtl8139",
        /// virtio-net.
        Virtio = "virtio",
        /// VMware's paravirtual adapter.
        Vmxnet3 = "vmxnet3",
    }
}

impl ControllerModel {
    /// Returns the bus.
    pub fn bus(self) -> Bus {
        match self {
            Self::Ide => Bus::Ide,
            Self::Ahci => Bus::Sata,
            Self::VirtioBlk => Bus::Virtio,
            Self::Nvme => Bus::Nvme,
            _ => Bus::Scsi,
        }
    }

    /// Returns the number of drives on a controller in this model: VMware's, without the controller's own
    /// SCSI number 7.
    pub fn units(self) -> u32 {
        match self.bus() {
            Bus::Ide => 2,
            Bus::Sata => 30,
            Bus::Scsi | Bus::Nvme => 15,
            Bus::Virtio => MAX_POSITION + 1,
        }
    }
}

/// A controller of drives. Its number on its bus is its place among the controllers of that bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Controller {
    /// Model.
    pub model: ControllerModel,
}

/// A disk or another drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Drive {
    /// Kind.
    pub kind: DriveKind,
    /// Name of the image's device ([`crate::Device::name`]) with the content; `None` for a drive that is
    /// empty or whose content the image does not hold.
    pub device: Option<String>,
    /// Index in [`Machine::controllers`]; `None` for firmware variables and TPM state.
    pub controller: Option<usize>,
    /// Place on the controller, counted from 0. SCSI places leave out the number of the controller itself.
    pub unit: u32,
    /// True if the guest can't write.
    pub read_only: bool,
    /// Place in the boot order, counted from 0.
    pub boot: Option<u32>,
}

/// A network adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Nic {
    /// Model.
    pub model: NicModel,
    /// MAC address; `None` if the platform is to choose one.
    pub mac: Option<MacAddress>,
    /// Name of the network or bridge.
    pub network: Option<String>,
    /// True if the cable is plugged in.
    pub connected: bool,
    /// Place in the boot order, counted from 0.
    pub boot: Option<u32>,
}

/// A MAC address, printed as `BC:24:11:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{g:02X}")
    }
}

/// A text that is no MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoMacAddress;

impl fmt::Display for NoMacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected six bytes such as BC:24:11:00:00:01")
    }
}

impl std::error::Error for NoMacAddress {}

impl FromStr for MacAddress {
    type Err = NoMacAddress;

    /// Parses `BC:24:11:00:00:01`, also with `-`, and CIM's form of 12 digits alone.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        if text.len() == 12 && text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            let number = u64::from_str_radix(text, 16).map_err(|_| NoMacAddress)?;
            bytes.copy_from_slice(&number.to_be_bytes()[2..]);
            return Ok(Self(bytes));
        }
        let mut octets = text.split([':', '-']);
        for byte in &mut bytes {
            let octet = octets.next().filter(|octet| octet.len() == 2).ok_or(NoMacAddress)?;
            if !octet.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(NoMacAddress);
            }
            *byte = u8::from_str_radix(octet, 16).map_err(|_| NoMacAddress)?;
        }
        if octets.next().is_some() { Err(NoMacAddress) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn as_text<S: Serializer>(uuid: &Option<Uuid>, serializer: S) -> Result<S::Ok, S::Error> {
    match uuid {
        Some(uuid) => serializer.collect_str(uuid),
        None => serializer.serialize_none(),
    }
}

impl Machine {
    /// Creates a machine with a disk on `model` for each of the devices.
    pub fn of_disks<'a>(
        name: &str,
        model: ControllerModel,
        devices: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let mut machine = Self { name: name.to_owned(), ..Self::default() };
        for (position, device) in (0..=MAX_POSITION).zip(devices) {
            let mut drive = Drive::new(DriveKind::Disk, Some(device));
            machine.attach(&mut drive, model, position);
            drive.boot = (position == 0).then_some(0);
            machine.drives.push(drive);
        }
        machine
    }

    /// Puts a drive at a place of its bus, counted across the controllers of the bus. Adds controllers of
    /// `model` where the machine has too few. Returns false, and leaves the drive without a controller, if
    /// the place exceeds [`MAX_POSITION`].
    pub fn attach(&mut self, drive: &mut Drive, model: ControllerModel, position: u32) -> bool {
        if position > MAX_POSITION {
            return false;
        }
        let number = position / model.units();
        let controller = loop {
            let mut of_bus = (0..).zip(&self.controllers).filter(|(_, one)| one.model.bus() == model.bus());
            match of_bus.nth(number as usize) {
                Some((index, _)) => break index,
                None => self.controllers.push(Controller { model }),
            }
        };
        drive.controller = Some(controller);
        drive.unit = position % model.units();
        true
    }

    /// Returns the controller of a drive.
    pub fn controller_of(&self, drive: &Drive) -> Option<ControllerModel> {
        self.controllers.get(drive.controller?).map(|controller| controller.model)
    }

    /// Returns the bus of a drive, and its place there counted across the controllers of the bus: the inverse
    /// of [`Machine::attach`].
    pub fn position(&self, drive: &Drive) -> Option<(Bus, u32)> {
        let index = drive.controller?;
        let model = self.controllers.get(index)?.model;
        let before = self.controllers[..index].iter().filter(|one| one.model.bus() == model.bus()).count();
        let first = u32::try_from(before).ok()?.checked_mul(model.units())?;
        Some((model.bus(), first.checked_add(drive.unit)?))
    }

    /// Returns the drive with the content of a device.
    pub fn drive(&self, device: &str) -> Option<&Drive> {
        self.drives.iter().find(|drive| drive.device.as_deref() == Some(device))
    }

    /// Replaces the names of the devices by those that `renamed` returns for them. Removes the drives for
    /// which it returns `None`, but keeps those without a device.
    #[must_use]
    pub fn with_devices(mut self, renamed: impl Fn(&str) -> Option<String>) -> Self {
        self.drives.retain_mut(|drive| match &drive.device {
            Some(device) => {
                drive.device = renamed(device);
                drive.device.is_some()
            }
            None => true,
        });
        self
    }

    /// Returns the bootable drives and adapters in the boot order: the index in `drives` or in `nics`.
    pub fn boot_order(&self) -> Vec<BootEntry> {
        let drives = (0..).zip(&self.drives).map(|(index, drive)| (drive.boot, BootEntry::Drive(index)));
        let nics = (0..).zip(&self.nics).map(|(index, nic)| (nic.boot, BootEntry::Nic(index)));
        let mut order: Vec<(u32, BootEntry)> =
            drives.chain(nics).filter_map(|(boot, entry)| Some((boot?, entry))).collect();
        order.sort_by_key(|(boot, _)| *boot);
        order.into_iter().map(|(_, entry)| entry).collect()
    }
}

/// Entry of the boot order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootEntry {
    /// Index in [`Machine::drives`].
    Drive(usize),
    /// Index in [`Machine::nics`].
    Nic(usize),
}

impl Drive {
    /// Creates a drive that is not attached to a controller.
    pub fn new(kind: DriveKind, device: Option<&str>) -> Self {
        Self {
            kind,
            device: device.map(str::to_owned),
            controller: None,
            unit: 0,
            read_only: kind == DriveKind::Cdrom,
            boot: None,
        }
    }
}

impl Nic {
    /// Creates an adapter that is plugged in.
    pub fn new(model: NicModel) -> Self {
        Self { model, mac: None, network: None, connected: true, boot: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_on_a_bus_survive_attaching() {
        for model in ControllerModel::ALL {
            let mut machine = Machine::default();
            for position in [0, 1, 14, 15, 31, 100, MAX_POSITION] {
                let mut drive = Drive::new(DriveKind::Disk, None);
                assert!(machine.attach(&mut drive, *model, position));
                assert_eq!(machine.position(&drive), Some((model.bus(), position)), "{model}");
                assert_eq!(machine.controller_of(&drive), Some(*model));
            }
            let mut drive = Drive::new(DriveKind::Disk, None);
            assert!(!machine.attach(&mut drive, *model, MAX_POSITION + 1));
            assert_eq!(machine.position(&drive), None);
        }
    }

    #[test]
    fn buses_count_their_controllers_apart() {
        let mut machine = Machine::of_disks("web", ControllerModel::LsiLogic, ["a", "b"]);
        let mut cdrom = Drive::new(DriveKind::Cdrom, None);
        machine.attach(&mut cdrom, ControllerModel::Ide, 2);
        assert_eq!(machine.controllers.len(), 3);
        assert_eq!((cdrom.controller, cdrom.unit), (Some(2), 0));
        assert_eq!(machine.position(&machine.drives[1]), Some((Bus::Scsi, 1)));
        assert_eq!(machine.boot_order(), [BootEntry::Drive(0)]);
        let machine = machine.with_devices(|name| (name == "b").then(|| "c".to_owned()));
        assert_eq!(machine.drives.len(), 1);
        assert_eq!(machine.drive("c").map(|drive| drive.unit), Some(1));
    }

    #[test]
    fn tells_mac_addresses_from_other_texts() {
        let mac: MacAddress = "bc-24-11-00-0a-01".parse().expect("an address");
        assert_eq!(mac.to_string(), "BC:24:11:00:0A:01");
        assert_eq!("bc2411000A01".parse(), Ok(mac));
        for other in [
            "",
            "bc:24:11:00:00",
            "bc:24:11:00:00:01:02",
            "bc:24:11:00:00:+1",
            "bc:24:11:00:00:g1",
            "bc241100000g",
        ] {
            assert_eq!(other.parse::<MacAddress>(), Err(NoMacAddress), "{other}");
        }
    }

    #[test]
    fn json_has_the_words_of_people() {
        let mut machine = Machine::of_disks("web", ControllerModel::VirtioScsi, ["drive-scsi0"]);
        machine.nics.push(Nic { mac: "BC:24:11:00:00:01".parse().ok(), ..Nic::new(NicModel::Virtio) });
        let json = serde_json::to_value(&machine).expect("JSON");
        assert_eq!(json["controllers"][0]["model"], "virtio-scsi");
        assert_eq!(json["drives"][0]["kind"], "disk");
        assert_eq!(json["drives"][0]["read-only"], false);
        assert_eq!(json["nics"][0]["mac"], "BC:24:11:00:00:01");
        assert_eq!(json["firmware"], "bios");
        assert_eq!(json["uuid"], serde_json::Value::Null);
    }
}
