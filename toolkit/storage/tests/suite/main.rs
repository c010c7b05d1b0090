//! Tests of outer compression against the programs that write and read it.
#![allow(clippy::unwrap_used)]

mod lzop;
mod outer;
mod packed;
