//! imgtool driver: QEMU's qcow2 format, versions 2 and 3.
//!
//! Written from the specification "Qcow2 Image File Format" (QEMU's docs/interop/qcow2). See the
//! README for what is read, written and refused.

mod check;
mod compressed;
mod driver;
mod info;
mod l2_cache;
mod layout;
mod mapping;
mod measure;
mod options;
mod probe;
mod refcounts;
mod sink;
mod source;

pub use driver::Qcow2Driver;

use imgtool_toolkit::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "qcow2";

/// Adds the driver.
pub fn register(registry: &mut Registry) {
    registry.register(Qcow2Driver);
}
