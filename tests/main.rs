//! End-to-end tests: the built program against images that it did not make, and against programs
//! that we did not write.
//!
//! One module per promise. `support` holds the image generators, the archive builder and the
//! wrappers of the oracle programs. A test whose oracle is missing prints `SKIPPED: …` and passes;
//! with `CI` set it fails. What no package brings (loop devices, mounts) may be missing in CI too:
//! `.ci/run` lists such tests at its end.

#![allow(clippy::unwrap_used)]

mod support;

mod block_devices;
mod cli;
mod cli_archive;
mod cli_shell;
mod cli_vma;
mod damage;
mod faults;
mod faults_verbs;
mod fixtures;
mod hostile;
mod huge;
mod info;
mod injected;
mod json_reference;
mod matrix;
mod names;
mod qcow2_chains;
mod qcow2_maps;
mod real;
mod recipes;
mod refusals;
mod same_file;
mod shaky;
mod sharing;
mod sparse_size;
mod streams;
mod targets;
mod texts;
mod threads;
mod verbs;
mod verified;
mod vma_program;
mod vma_transcripts;
mod whole_vm;
