#![doc = include_str!("../../README.md")]

pub mod exercise;
pub mod mutate;
pub mod scenario;
pub mod sparse;
pub mod targets;
