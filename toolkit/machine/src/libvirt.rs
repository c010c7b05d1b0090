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

/// Number of SCSI drives on a controller that numbers them from 0 to 6.
const NARROW: u32 = 7;

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

/// Names of the SCSI controllers.
const CONTROLLERS: &[(&str, ControllerModel)] = &[
    ("virtio-scsi", ControllerModel::VirtioScsi),
    ("lsilogic", ControllerModel::LsiLogic),
    ("lsisas1068", ControllerModel::LsiSas1068),
    ("lsisas1078", ControllerModel::MegaSas),
    ("buslogic", ControllerModel::BusLogic),
    ("vmpvscsi", ControllerModel::Pvscsi),
];

/// Names of the network adapters.
const ADAPTERS: &[(&str, NicModel)] = &[
    ("virtio", NicModel::Virtio),
    ("e1000", NicModel::E1000),
    ("e1000e", NicModel::E1000e),
    ("pcnet", NicModel::Pcnet),
    ("rtl8139", NicModel::Rtl8139),
    ("vmxnet3", NicModel::Vmxnet3),
];
