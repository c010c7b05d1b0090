//! End-to-end tests: the built program against images that it did not make, and against programs
//! that we did not write.
//!
//! One room per subject: `cli` is the command line and the texts, `formats` the content through every format,
//! `faults` errors and interruptions, `hostile` images made to harm, `vma` archives and `imgtool vma`, `library`
//! the library without the program. A test whose oracle is missing prints `SKIPPED: …` and passes; with `CI` set
//! it fails. What no package brings (loop devices, mounts) may be missing in CI too: `.ci/run` lists such tests at
//! its end.

#![allow(clippy::unwrap_used)]

mod cli;
mod faults;
mod formats;
mod hostile;
mod library;
mod support;
mod vma;
