//! Disk encryption for drivers: ciphers of 512-byte sectors, and the LUKS version 1 header that holds their
//! key.
//!
//! qcow2 stores a LUKS header inside of its image, a LUKS container begins with one, and QCOW version 1 has the
//! encryption that qcow2 had first. Their drivers use this crate, since a driver knows no other driver. It follows "LUKS On-Disk Format Specification", version 1.2.3.
//!
//! Keys and what they are computed from are erased after use, and no type of this crate prints them.

mod af;
mod block;
mod create;
mod hash;
mod header;
mod iv;
pub mod options;
mod sector;
mod spec;
mod unlock;

pub use create::{
    DEFAULT_SLOT_TIME, Iterations, MAX_TIMED_ITERATIONS, MIN_ITERATIONS, MIN_TIMED_ITERATIONS, NewHeader,
    NewVolume,
};
pub use hash::Hash;
pub use header::{FACTS, HEADER_LEN, Header, KeySlot, MAGIC};
pub use sector::{LEGACY_NOTE, SECTOR, SectorCipher, in_sectors};
pub use spec::{Algorithm, CipherSpec, IvRule, Mode};
