//! imgtool driver: the growing disk images of the Bochs emulator.
//!
//! An image is a header of 512 bytes, a catalog with an entry of 32 bits for each extent of the disk, and
//! extents. An extent begins with a bitmap of the sectors that it contains. The layout was established from
//! images of bximage, and from the behaviour of qemu-img. All numbers are little-endian.

mod check;
mod driver;
mod image;
mod layout;

pub use driver::BochsDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "bochs";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(BochsDriver);
}
