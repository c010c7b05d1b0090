//! Storage access: files, streams, outer compression, and sets of outputs that get their names together.
//!
//! * [`open`] opens a [`imgtool_core::Location`] as an input. It detects and removes outer compression, so
//!   drivers see only plain bytes.
//! * [`Outputs`] holds the outputs of one run. All of them get their final names, or none does.
//! * [`CompressedSink`] compresses the output of an append-only sink.
//! * [`os`] is the interface to the operating system: all platform-specific calls.

pub mod file;
mod folder;
mod identity;
mod image_lock;
pub mod open;
pub mod os;
pub mod outer;
mod outputs;
mod partial;
mod runs;
mod spool;
mod watch;

pub use identity::Identity;
pub use image_lock::Sharing;
pub use open::{OpenInput, Opening};
pub use outer::Compression;
pub use outer::frames::Framing;
pub use outer::writer::{CompressedSink, Compressors};
pub use outputs::{Cleaner, Links, OutputRequest, Outputs};
pub use watch::FileWatch;
