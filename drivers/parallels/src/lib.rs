//! imgtool driver: Parallels, the expanding disk images of Parallels Desktop and Virtuozzo (`.hds`, `.hdd`).
//!
//! An image is a header of 64 bytes, a table (BAT) with an entry of 32 bits for each cluster of the disk, and
//! clusters. Parallels publishes no specification; the layout was established from images and from the
//! behaviour of the programs that read and write them (see the README). All numbers are little-endian.

mod bundle;
mod check;
mod driver;
mod image;
mod layout;

pub use driver::ParallelsDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "parallels";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(ParallelsDriver);
}
