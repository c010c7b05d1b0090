#![doc = include_str!("../README.md")]
// In test support, a failed `unwrap` fails the test.
#![allow(clippy::unwrap_used)]

pub mod conformance;
pub mod crafted;
mod files;
pub mod http;
pub mod images;
pub mod journal;
pub mod manifest;
pub mod memory;
pub mod oracles;
pub mod saved;
pub mod tar;
pub mod toy;
pub mod vma;
pub mod zip;

pub use files::{
    assert_same, assert_same_rounded, first_difference, fixture, names, occupied, sha256, sha256_file,
    snapshot, tempdir, text,
};
