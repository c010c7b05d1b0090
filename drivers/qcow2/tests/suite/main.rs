//! Tests of the qcow2 driver: conformance laws, comparison with independent programs, damage.

#![allow(clippy::unwrap_used, missing_docs)]

mod checked;
mod conformance;
mod foreign;
mod hostile;
mod qcow2_rs;
mod readers;
mod repaired;
mod resized;
mod tools;
mod updated;
mod variants;
mod written;
