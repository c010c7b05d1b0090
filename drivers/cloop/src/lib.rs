//! imgtool driver: cloop, the compressed loopback images of live CDs such as Knoppix.
//!
//! An image of version 2 is a header of 136 bytes, a table of file offsets, and blocks of one size, each
//! compressed with zlib. The layout was established from images and from the behaviour of qemu-img. All
//! numbers are big-endian.

mod check;
mod driver;
mod image;
mod layout;

pub use driver::CloopDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "cloop";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(CloopDriver);
}
