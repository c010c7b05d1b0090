//! imgtool driver: VDI, the disk image of VirtualBox.
//!
//! An image is a header, a map with an entry of 32 bits for each block, and blocks of one size, 1 MiB by
//! default. Oracle publishes no specification; the layout here was established from images and from the
//! behaviour of the programs that read and write them (see the README). All numbers are little-endian.
//!
//! The reader supports versions 0.1 and 1.1, every block size, images of all types but undo logs, and
//! differencing images over their parents. The writer makes dynamic and fixed images of version 1.1.

mod check;
mod driver;
mod image;
mod layout;
mod options;
mod parent;
mod sink;
mod source;

pub use driver::VdiDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "vdi";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VdiDriver);
}
