//! What the fuzzer runs: functions that take any bytes, and panic when a promise of the project is broken.
//!
//! [`targets`] are one function for each parser; [`scenario`] and [`sparse`] are images in few bytes,
//! [`mutate`] changes them; [`exercise`] reads all that can be read and holds it to the promises. The
//! README of `fuzz/` tells how to use it.

pub mod exercise;
pub mod mutate;
pub mod scenario;
pub mod sparse;
pub mod targets;
