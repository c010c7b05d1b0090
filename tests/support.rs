//! The program under test and its surroundings: devices, mounts, a trace of its system calls.

pub mod devices;
pub mod run;
pub mod shaky;
pub mod trace;

pub use run::imgtool;
