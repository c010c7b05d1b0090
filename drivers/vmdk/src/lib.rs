//! imgtool driver: VMDK, the disk image of VMware and of OVA archives.
//!
//! A text descriptor lists the extents of a disk: files with the guest's bytes (FLAT, VMFS), files of grains
//! with tables (SPARSE, VMFSSPARSE, SESPARSE), zeros. A sparse file may also contain the descriptor, and then is
//! the whole image. In a streamOptimized image, grains are compressed and follow each other between markers.
//! The names of fields are those of VMware's *Virtual Disk Format 5.0*.
//!
//! All numbers are little-endian; most count sectors of 512 bytes.

mod check;
mod descriptor;
mod driver;
mod extents;
mod grains;
mod image;
mod inflate;
mod layout;
mod options;
mod parent;
mod sink;
mod source;
mod stream;

pub use driver::VmdkDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "vmdk";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VmdkDriver);
}
