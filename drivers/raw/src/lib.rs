//! imgtool driver: raw disk images and block devices.
//!
//! A raw image is the guest's bytes and nothing else, so any size in bytes is valid. The reader finds
//! holes with SEEK_DATA and SEEK_HOLE; the writer makes holes by skipping zeros. The size of an image
//! that is read from a stream, such as standard input, is unknown until the stream ends.

mod driver;
mod options;
mod resize;
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
