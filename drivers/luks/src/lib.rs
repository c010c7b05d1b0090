//! imgtool driver: LUKS version 1 containers, encrypted disks with the header that their key is stored in.
//!
//! A container is the header, the key material of eight passphrases, and the content in encrypted sectors. The
//! crate `imgtool-crypt` does the cryptography, which qcow2 uses as well.

mod check;
mod driver;
mod options;
mod sink;
mod source;

pub use driver::LuksDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "luks";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(LuksDriver);
}
