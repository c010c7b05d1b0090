//! VMA archives built byte by byte: valid archives of every shape, and broken ones of every kind.
//!
//! This code follows the format's description and shares no code with the driver, so that the two can't be
//! wrong in the same way. [`ArchiveBuilder`] writes the bytes and can set every field. [`Archive`] arranges
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
