//! imgtool driver: Microsoft's VHDX format.
//!
//! Written from the public specification [MS-VHDX]; "section" in comments means one of its sections.
//!
//! The driver reads fixed, dynamic and differencing disks by position, from many threads at once. It
//! replays a pending log in memory: the file is opened read-only and never changed. It writes dynamic
//! and fixed disks, whose bytes depend on content and options alone.
//!
//! The specification's words are used throughout: a *payload block* holds guest data, a *sector-bitmap
//! block* tells which sectors of its payload blocks a differencing file holds.
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
mod replay;
mod sink;
mod source;
mod writer;

pub use driver::VhdxDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "vhdx";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VhdxDriver);
}
