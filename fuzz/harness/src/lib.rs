//! Fuzzing harness: functions that accept any bytes, and panic if the project breaks a promise; and random
//! conversions with the program.
//!
//! [`targets`] has one function per parser. [`scenario`] and [`sparse`] describe images in few bytes, and
//! [`mutate`] and [`fields`] change them. [`exercise`] reads an image in every way and checks the promises. [`chains`]
//! converts random disks from format to format. The README of `fuzz/` explains how to use the harness.

pub mod chains;
pub mod exercise;
pub mod fields;
pub mod mutate;
pub mod random;
pub mod scenario;
pub mod sparse;
pub mod targets;
