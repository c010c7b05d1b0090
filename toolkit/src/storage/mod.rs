//! Storage: where the bytes of images come from and go to.
//!
//! * [`Input`]: a file read by position, or a stream; outer compression is found by content and
//!   undone here, so that no driver knows of it.
//! * [`Output`]: a file written by position, an existing target, or a stream.
//! * [`Outputs`]: the outputs of one run; they get their final names together, or none does.
//! * `os`: what asks the operating system for more than positional reads and writes.

mod input;
pub mod os;
pub mod outer;
mod output;
mod outputs;
mod partial;
mod runs;
mod spool;

pub use input::{Input, PROBE_LEN, RandomInput, ReadAt, Stream};
pub use outer::Compression;
pub use output::Output;
pub use outputs::{Cleaner, Links, Outputs, Wanted};
pub use partial::partial_name;
