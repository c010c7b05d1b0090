//! imgtool driver: VHD, the disk image of Virtual PC, Hyper-V and Azure, which QEMU calls vpc.
//!
//! A fixed image is the guest's bytes, followed by a footer of 512 bytes. A dynamic or differencing image has
//! a copy of the footer at the start, a header, a block allocation table (BAT), blocks of one size, each
//! with a bitmap of its sectors, and the footer. All numbers are big-endian. Section numbers refer to
//! Microsoft's *Virtual Hard Disk Image Format Specification*, version 1.0.
//!
//! The virtual size is the footer's current size, never the product of its geometry, which is often smaller.

mod check;
mod driver;
mod image;
mod layout;
mod options;
mod parent;
mod sink;
mod source;
mod stream;

pub use driver::VhdDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "vhd";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VhdDriver);
}
