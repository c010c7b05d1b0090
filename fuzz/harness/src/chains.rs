//! Random chains of conversions, run with the program and judged by other programs.
//!
//! A [`Chain`] converts random disks from format to format. After each step, [`judge`] compares the outputs
//! with the disks, without the program's own readers. [`run`] also repeats each step with another number of
//! threads, and from raw files of the same content: the outputs must have the same bytes.

pub mod content;
pub mod judge;
pub mod program;
pub mod run;
pub mod shrink;
pub mod spec;

pub use program::Program;
pub use run::{Failure, Totals};
pub use spec::Chain;
