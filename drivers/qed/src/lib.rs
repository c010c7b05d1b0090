//! imgtool driver: QED, the "enhanced disk" format that QEMU wrote for a few versions.
//!
//! An image is a header, tables of 64-bit entries in two levels, and clusters. QEMU's documentation describes
//! the format (docs/interop/qed_spec.rst); the layout here was confirmed with images of qemu-img. All numbers
//! are little-endian.

mod check;
mod driver;
mod image;
mod layout;

pub use driver::QedDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "qed";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(QedDriver);
}
