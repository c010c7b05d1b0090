//! The domain XML of libvirt, for `virsh define`.

use imgtool_core::machine::{ControllerModel, NicModel, Os};

mod parse;
mod print;
#[cfg(test)]
mod tests;

pub use parse::parse;
pub use print::{DiskSource, print};

/// Name of the document in messages.
const WHAT: &str = "the domain XML";

/// Number of drives on a SCSI controller of QEMU, at most the places of the machine's controllers. LSI Logic
/// has the SCSI numbers 0 to 6, LSI SAS 1068 has 8 ports; the others have at least 64 targets.
fn scsi_width(model: ControllerModel) -> u32 {
    match model {
        ControllerModel::LsiLogic => 7,
        ControllerModel::LsiSas1068 => 8,
        other => other.units(),
    }
}

/// True if the drives of a SCSI controller are its units. libvirt makes LSI Logic's unit the SCSI number; on
/// the other models `target` is that number and `unit` the LUN, of which only virtio-scsi has many.
fn counts_units(model: ControllerModel) -> bool {
    matches!(
        model,
        ControllerModel::LsiLogic | ControllerModel::VirtioScsi | ControllerModel::VirtioScsiSingle
    )
}

/// The network that every installation of libvirt has.
const NETWORK: &str = "default";

/// Identifiers of operating systems in libosinfo. The first one of a system is the one that is written.
const SYSTEMS: &[(&str, Os)] = &[
    ("http://libosinfo.org/linux/2022", Os::Linux),
    ("http://oracle.com/solaris/11", Os::Solaris),
    ("http://microsoft.com/win/2k", Os::Windows2000),
    ("http://microsoft.com/win/xp", Os::WindowsXp),
    ("http://microsoft.com/win/2k3", Os::Windows2003),
    ("http://microsoft.com/win/vista", Os::WindowsVista),
    ("http://microsoft.com/win/2k8", Os::Windows2008),
    ("http://microsoft.com/win/7", Os::Windows7),
    ("http://microsoft.com/win/8", Os::Windows8),
    ("http://microsoft.com/win/10", Os::Windows10),
    ("http://microsoft.com/win/11", Os::Windows11),
    ("http://microsoft.com/win/2k8r2", Os::Windows7),
    ("http://microsoft.com/win/2k12", Os::Windows8),
    ("http://microsoft.com/win/2k12r2", Os::Windows8),
    ("http://microsoft.com/win/8.1", Os::Windows8),
    ("http://microsoft.com/win/2k16", Os::Windows10),
    ("http://microsoft.com/win/2k19", Os::Windows10),
    ("http://microsoft.com/win/2k22", Os::Windows11),
    ("http://microsoft.com/win/2k25", Os::Windows11),
];

/// Names of the SCSI controllers. The first one of a model is the one that is written.
const CONTROLLERS: &[(&str, ControllerModel)] = &[
    ("virtio-scsi", ControllerModel::VirtioScsi),
    ("virtio-transitional", ControllerModel::VirtioScsi),
    ("virtio-non-transitional", ControllerModel::VirtioScsi),
    ("lsilogic", ControllerModel::LsiLogic),
    ("lsisas1068", ControllerModel::LsiSas1068),
    ("lsisas1078", ControllerModel::MegaSas),
    ("buslogic", ControllerModel::BusLogic),
    ("vmpvscsi", ControllerModel::Pvscsi),
];

/// Names of the network adapters. The first one of a model is the one that is written.
const ADAPTERS: &[(&str, NicModel)] = &[
    ("virtio", NicModel::Virtio),
    ("virtio-transitional", NicModel::Virtio),
    ("virtio-non-transitional", NicModel::Virtio),
    ("e1000", NicModel::E1000),
    ("e1000e", NicModel::E1000e),
    ("pcnet", NicModel::Pcnet),
    ("rtl8139", NicModel::Rtl8139),
    ("vmxnet3", NicModel::Vmxnet3),
];
