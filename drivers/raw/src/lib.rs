//! imgtool driver: raw disk images and block devices.
//!
//! A raw image is the guest's bytes and nothing else. Reading finds holes with SEEK_DATA and
//! SEEK_HOLE; writing makes them by leaving zeros out. Any number of bytes is a valid size. Standard
//! input and output are streams, whose size is known only when they end.

mod driver;
mod options;
mod sink;
mod source;
mod writer;

pub use driver::RawDriver;

use imgtool_core::Registry;

/// The driver's name.
pub(crate) const FORMAT: &str = "raw";

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(RawDriver);
}
