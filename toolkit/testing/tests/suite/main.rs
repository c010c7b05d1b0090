//! Tests of the laws themselves, against drivers that break them, and of the contracts for containers and for
//! images of several outputs, with toy drivers.
#![allow(clippy::unwrap_used)]

mod conformance;
mod container;
mod disk;
mod outputs;
