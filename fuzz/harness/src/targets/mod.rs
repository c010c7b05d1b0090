//! The targets: each accepts any bytes, and panics if the project breaks a promise.

use std::io::Read;
use std::sync::Arc;

use imgtool_core::{Input, Result};
use imgtool_storage::OpenInput;

use crate::scenario::Scenario;
use crate::sparse::SparseFile;

mod beside;
mod http;
mod luks;
mod machine;
mod map_file;
mod nbd;
mod outer;
mod ova;
mod qcow2;
mod raw;
mod small;
mod vdi;
mod vhd;
mod vhdx;
mod vma;
mod vmdk;
mod zip;

/// A target of the fuzzer.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Name of the target's program, and of the directories of its seeds and findings.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Builds the image in an input; `None` unless inputs are scenarios ([`crate::scenario`]).
    pub image: Option<fn(&[u8]) -> SparseFile>,
}

/// All targets.
pub const ALL: [Target; 21] = [
    Target { name: "raw", run: raw::run, image: None },
    Target { name: "qcow2", run: qcow2::run, image: Some(qcow2::image) },
    Target { name: "vhdx", run: vhdx::run, image: Some(vhdx::image) },
    Target { name: "vhd", run: vhd::run, image: Some(vhd::image) },
    Target { name: "vdi", run: vdi::run, image: Some(vdi::image) },
    Target { name: "vmdk", run: vmdk::run, image: Some(vmdk::image) },
    Target { name: "luks", run: luks::run, image: Some(luks::image) },
    Target { name: "small", run: small::run, image: Some(small::image) },
    Target { name: "vma_file", run: vma::run_file, image: Some(vma::image) },
    Target { name: "vma_stream", run: vma::run_stream, image: Some(vma::image) },
    Target { name: "vma_agree", run: vma::run_agree, image: Some(vma::image) },
    Target { name: "ova", run: ova::run, image: Some(ova::image) },
    Target { name: "zip", run: zip::run, image: None },
    Target { name: "outer", run: outer::run, image: None },
    Target { name: "lzop", run: outer::run_lzop, image: None },
    Target { name: "http", run: http::run, image: None },
    Target { name: "nbd", run: nbd::run, image: None },
    Target { name: "map_file", run: map_file::run, image: None },
    Target { name: "ovf", run: machine::run_ovf, image: None },
    Target { name: "domain", run: machine::run_domain, image: None },
    Target { name: "guest_config", run: machine::run_guest_config, image: None },
];

/// Finds the target called `name`.
pub fn by_name(name: &str) -> Option<Target> {
    ALL.into_iter().find(|target| target.name == name)
}

/// Runs an input through the target called `name`.
pub fn run(name: &str, input: &[u8]) {
    let target = by_name(name).expect("a target");
    (target.run)(input);
}

/// Decodes a scenario to its flags and its file, cut to `max_len` bytes.
fn file(input: &[u8], max_len: u64) -> (u8, SparseFile) {
    let mut scenario = Scenario::decode(input);
    scenario.len = scenario.len.min(max_len);
    (scenario.flags, scenario.file())
}

/// Makes an input that is read by position.
fn by_position(file: &Arc<SparseFile>) -> Input {
    Input::from_read_at("image", Arc::clone(file) as _)
}

/// Makes an input that is read in one pass, with outer compression undone.
fn from_pipe(name: &str, reader: impl Read + Send + 'static) -> Result<OpenInput> {
    OpenInput::of(Input::from_reader(name, Box::new(reader))?).decompressed()
}
