//! imgtool driver: version 1 of QCOW, QEMU's first copy-on-write format.
//!
//! An image is a header, tables of 64-bit entries in two levels, and clusters, plain or compressed with
//! deflate. There is no specification; the layout was established from images and from the behaviour of
//! qemu-img. All numbers are big-endian. Later versions are another format, `qcow2`.

mod check;
mod driver;
mod image;
mod inflate;
mod layout;

pub use driver::Qcow1Driver;

use imgtool_core::Registry;

/// The driver's name, as in QEMU.
pub(crate) const FORMAT: &str = "qcow";

/// Adds the driver to a registry. It must precede a driver that claims all versions of QCOW in order to name
/// those that it does not support.
pub fn register(registry: &mut Registry) {
    registry.register(Qcow1Driver);
}
