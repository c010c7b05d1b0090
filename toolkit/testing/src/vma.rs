//! VMA archives built byte by byte: legal ones of every shape, and every kind of broken one.
//!
//! Written from the format's description and without any code of the driver, so that the two can't be wrong
//! in the same way. [`ArchiveBuilder`] writes the bytes; every field of them can be set. [`Archive`] arranges
//! the content of disk images for it.

mod archive;
mod bytes;

pub use archive::{Archive, Built};
pub use bytes::{
    ArchiveBuilder, CTIME, Extent, Slot, UUID, block_content, extent, guest_content, hole, slot,
};

/// Size in bytes of a sub-block.
const BLOCK: usize = 4096;

/// Size in bytes of a cluster.
const CLUSTER: usize = 65_536;
