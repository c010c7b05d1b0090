//! Tests of the VHDX driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crafted;
mod differencing;
mod logs;
mod oracles;
mod sizes;
mod support;
mod updated;
