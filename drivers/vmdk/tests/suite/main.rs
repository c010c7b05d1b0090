//! Tests of the VMDK driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crafted;
mod descriptors;
mod oracles;
mod parents;
mod redo_logs;
mod streams;
mod support;
