//! imgtool driver: packages of virtual machines (OVA, OVF), and tar and zip archives of disk images.
//!
//! An OVF package is an XML document, the files that it lists, and a manifest with a digest of each. An OVA
//! is the same in a tar archive. The format follows DSP0243 1.1.1 of the DMTF, and POSIX.1-2001 with the
//! extensions of GNU tar; a zip archive PKWARE's APPNOTE 6.3.10. Every disk is opened by the driver of its
//! own format, from its place in the archive; nothing is unpacked.

mod archive;
mod check;
mod disk_archive;
mod disks;
mod driver;
mod files;
mod manifest;
mod member;
mod options;
mod pieces;
mod salvage;
mod sink;
mod source;
mod stream;
mod tar;
mod writer;
mod zip;

pub use driver::{OvaDriver, TarDriver, ZipDriver};

use imgtool_core::Registry;

/// The name of the driver for packages.
pub(crate) const OVA: &str = "ova";

/// The name of the driver for tar archives.
pub(crate) const TAR: &str = "tar";

/// The name of the driver for zip archives.
pub(crate) const ZIP: &str = "zip";

/// Adds the drivers to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(OvaDriver);
    registry.register(TarDriver);
    registry.register(ZipDriver);
}
