//! Tests of the laws themselves, against drivers that break them, and of the contracts that no driver of the
//! program uses yet: containers, several outputs.
#![allow(clippy::unwrap_used)]

mod conformance;
mod container;
mod disk;
mod outputs;
