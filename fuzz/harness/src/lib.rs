//! Fuzzing harness: functions that accept any bytes, and panic if the project breaks a promise.
//!
//! [`targets`] has one function per parser. [`scenario`] and [`sparse`] describe images in few bytes, and
//! [`mutate`] changes them. [`exercise`] reads an image in every way and checks the promises. The README of
//! `fuzz/` explains how to use the harness.

pub mod exercise;
pub mod mutate;
pub mod scenario;
pub mod sparse;
pub mod targets;
