//! The descriptor of an OVF package (`.ovf`), DSP0243: OVF 1.x and 2.0, and VMware's 0.9 read; 1.1 written.
//!
//! A package is a descriptor, the files that it names and a manifest with their digests; an OVA is a tar of
//! them. This module knows the descriptor alone.

use imgtool_core::machine::{ControllerModel, Machine, Os};

mod hardware;
mod parse;
mod print;
#[cfg(test)]
mod tests;
mod units;

pub use parse::parse;
pub use print::{PackagedDisk, padded, print};

/// A descriptor.
#[derive(Debug, Clone, Default)]
pub struct Descriptor {
    /// The machine. Its drives have the names of `disks`.
    pub machine: Machine,
    /// Files of the package.
    pub files: Vec<FileRef>,
    /// Disks, in the order of the descriptor.
    pub disks: Vec<DiskRef>,
    /// Types of system that the hardware is made for, separated by blanks (`vmx-13 vmx-14`); empty if none is stated.
    pub system_type: String,
    /// Notes for the user, one sentence each.
    pub notes: Vec<String>,
}

/// A file of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    /// Identifier in the descriptor.
    pub id: String,
    /// Name: one path component, never `.` or `..`.
    pub href: String,
    /// Length in bytes that the descriptor states.
    pub size: Option<u64>,
    /// True if the file is compressed with gzip.
    pub gzip: bool,
    /// Length in bytes of each chunk (`href.000000000`, `href.000000001` …) of a file in chunks.
    pub chunk_size: Option<u64>,
}

/// A disk of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRef {
    /// Identifier in the descriptor.
    pub id: String,
    /// Name for the device, unique in the package: that of the file without extension, or the identifier.
    pub device: String,
    /// Index in [`Descriptor::files`]; `None` for an empty disk.
    pub file: Option<usize>,
    /// Virtual size in bytes that the descriptor states. The size of the image in the file counts.
    pub capacity: Option<u64>,
    /// URI of the format. A hint: the content decides.
    pub format: String,
}

/// Name of the descriptor's format in messages.
const WHAT: &str = "the OVF descriptor";

/// Number of an operating system in OVF (CIM_OperatingSystem), VMware's name of it, and the system that it
/// becomes. The first row of a system is the one that is written. VMware's names are those that its hardware
/// version 13 knows.
const SYSTEMS: &[(u32, &str, Os)] = &[
    (1, "otherGuest64", Os::Other),
    (101, "otherLinux64Guest", Os::Linux),
    (97, "other24xLinuxGuest", Os::Linux24),
    (29, "solaris10_64Guest", Os::Solaris),
    (58, "win2000ProGuest", Os::Windows2000),
    (67, "winXPProGuest", Os::WindowsXp),
    (69, "winNetStandardGuest", Os::Windows2003),
    (74, "winVista64Guest", Os::WindowsVista),
    (77, "winLonghorn64Guest", Os::Windows2008),
    (105, "windows7_64Guest", Os::Windows7),
    (114, "windows8_64Guest", Os::Windows8),
    (120, "windows9_64Guest", Os::Windows10),
    (122, "windows9_64Guest", Os::Windows11),
    (36, "", Os::Linux),
    (79, "", Os::Linux),
    (80, "", Os::Linux),
    (82, "", Os::Linux),
    (83, "", Os::Linux),
    (84, "", Os::Linux),
    (85, "", Os::Linux),
    (93, "", Os::Linux),
    (94, "", Os::Linux),
    (95, "", Os::Linux),
    (96, "", Os::Linux),
    (98, "", Os::Linux24),
    (99, "", Os::Linux),
    (100, "", Os::Linux),
    (106, "", Os::Linux),
    (107, "", Os::Linux),
    (108, "", Os::Linux),
    (109, "", Os::Linux),
    (81, "", Os::Solaris),
    (70, "", Os::Windows2003),
    (71, "", Os::WindowsXp),
    (73, "", Os::WindowsVista),
    (76, "", Os::Windows2008),
    (103, "", Os::Windows7),
    (112, "", Os::Windows8),
    (113, "", Os::Windows8),
    (115, "", Os::Windows8),
    (117, "", Os::Windows8),
    (118, "", Os::Windows8),
    (116, "", Os::Windows10),
    (119, "", Os::Windows10),
    (121, "", Os::Windows10),
    (123, "", Os::Windows11),
];

/// `ResourceType` and `ResourceSubType` of each controller, by VMware's names. virtio-scsi has VirtualBox's
/// name.
const CONTROLLERS: &[(u32, &str, ControllerModel)] = &[
    (5, "", ControllerModel::Ide),
    (6, "lsilogic", ControllerModel::LsiLogic),
    (6, "lsilogicsas", ControllerModel::LsiSas1068),
    (6, "buslogic", ControllerModel::BusLogic),
    (6, "VirtualSCSI", ControllerModel::Pvscsi),
    (6, "VirtioSCSI", ControllerModel::VirtioScsi),
    (20, "vmware.sata.ahci", ControllerModel::Ahci),
    (20, "AHCI", ControllerModel::Ahci),
    (20, "VirtioSCSI", ControllerModel::VirtioScsi),
    (20, "vmware.nvme.controller", ControllerModel::Nvme),
    (20, "NVMe", ControllerModel::Nvme),
];
