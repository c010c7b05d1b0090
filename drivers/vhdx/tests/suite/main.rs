//! Tests of the VHDX driver as a whole: the laws, foreign programs, and files crafted byte by byte.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crafted;
mod differencing;
mod logs;
mod oracles;
mod sizes;
mod support;
