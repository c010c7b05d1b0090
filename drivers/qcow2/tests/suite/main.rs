//! The qcow2 driver against the laws, against programs that we did not write, and against damage.

#![allow(clippy::unwrap_used, missing_docs)]

mod checked;
mod conformance;
mod foreign;
mod hostile;
mod product;
mod qcow2_rs;
mod readers;
mod tools;
mod written;
