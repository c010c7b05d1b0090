//! Tests of the VHD driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crafted;
mod differencing;
mod oracles;
mod support;
