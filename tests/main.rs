//! End-to-end tests of the built program, against images that it did not make and against independent
//! programs.
//!
//! One module per subject: `cli` tests the command line and its texts, `formats` the content through every
//! format, `faults` errors and interruptions, `hostile` malicious images, `vma` archives and `imgtool vma`,
//! `library` the library without the program, `remote` sources on servers, `qemu_img` the program in the place of
//! qemu-img, `boots` a guest that boots from converted disks. A test whose oracle is missing prints `SKIPPED: …` and
//! passes; with `CI` set, it fails. Loop devices and mounts, which no package provides, may be missing even with `CI`
//! set; `.ci/run` lists the skipped tests at its end.

#![allow(clippy::unwrap_used)]

mod boots;
mod cli;
mod faults;
mod formats;
mod hostile;
mod library;
mod qemu_img;
mod remote;
mod support;
mod vma;
