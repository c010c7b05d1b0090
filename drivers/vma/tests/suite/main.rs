//! Tests of the VMA driver as a whole: the laws, archives of the reference program, archives built byte by
//! byte, damage, and the writer.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crafted;
mod damage;
mod fixtures;
mod hazards;
mod scale;
mod support;
mod writing;
