//! imgtool driver: Microsoft's VHDX format.
//!
//! Written from the public specification [MS-VHDX]; comments refer to its sections by number.
//!
//! The driver reads fixed, dynamic and differencing disks by position, from many threads at once. It
//! replays a pending log in memory; it never changes the file. It writes dynamic and fixed disks. The
//! bytes of a new file depend only on the source, the options and the driver's version.
//!
//! Names follow the specification: a *payload block* stores guest data, and a *sector-bitmap block*
//! records which sectors of its payload blocks are stored in a differencing file.
//!
//! [MS-VHDX]: https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/

mod check;
mod driver;
mod file;
mod image;
mod layout;
mod options;
mod overlay;
mod parent;
mod repair;
mod replay;
mod sink;
mod source;
mod update;
mod writer;

pub use driver::VhdxDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "vhdx";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VhdxDriver);
}
