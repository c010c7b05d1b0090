//! imgtool driver for QEMU's qcow2 format, versions 2 and 3.
//!
//! Written from the specification "Qcow2 Image File Format" (QEMU's docs/interop/qcow2). The README lists the
//! features that the driver reads, writes and refuses.

mod check;
mod compressed;
mod driver;
mod encryption;
mod info;
mod layout;
mod mapping;
mod measure;
mod options;
mod refcounts;
mod repair;
mod resize;
mod sink;
mod source;
mod update;

pub use driver::Qcow2Driver;

use imgtool_core::Registry;

/// Adds the driver to `registry`.
pub fn register(registry: &mut Registry) {
    registry.register(Qcow2Driver);
}
