//! imgtool driver: DMG, the compressed disk images of macOS (UDIF).
//!
//! An image is a series of chunks, plain or compressed, a property list in XML with the tables of chunks, and
//! a trailer of 512 bytes. Apple publishes no specification; the layout was established from images and from
//! the behaviour of the programs that read them (see the README). All numbers are big-endian.

mod adc;
mod check;
mod checksums;
mod chunks;
mod decode;
mod driver;
mod image;
mod layout;
mod stored;
mod tables;

pub use driver::DmgDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "dmg";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(DmgDriver);
}
