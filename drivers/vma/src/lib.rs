#![doc = include_str!("../README.md")]
//!
//! # Map of the crate
//!
//! * `driver`: the [`Driver`](imgtool_core::Driver) implementation
//! * [`layout`], [`extent`], [`header`]: the on-disk format, decoded and checked
//! * [`mod@reference`]: error messages shared with the reference program
//! * `bytes`, `walker`, `tracker`, `cluster`, `device_ids`: the strict walk over an archive
//! * `source`, `index`, `mask_cache`: random access to archives in files; `stream`: one pass over a pipe
//! * `window`, `scan`: the tolerant walk over a damaged archive; `salvage` and `check` use it
//! * `info`: facts for the `info` command
//! * `plan`, `options`, `sink`, `measure`: the writer

mod bytes;
mod check;
mod cluster;
mod device_ids;
mod driver;
pub mod extent;
pub mod header;
mod index;
mod info;
pub mod layout;
mod mask_cache;
mod measure;
mod options;
mod plan;
pub mod reference;
mod salvage;
mod scan;
mod sink;
mod source;
mod stream;
mod tracker;
mod walker;
mod window;

pub use driver::VmaDriver;
pub use header::ArchiveHeader;
pub use source::VmaSource;

use imgtool_core::Registry;

/// Adds the driver to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(VmaDriver);
}
