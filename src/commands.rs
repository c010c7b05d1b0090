//! The commands and their dispatch.

use std::ffi::OsStr;

use imgtool_core::{Location, Result};

use imgtool_engine::SourceRequest;

use crate::args::Command;
use crate::exit::Exit;
use crate::sandbox::{self, Network, Writes};

pub(crate) mod check;
mod checksum;
mod compare;
mod convert;
mod create;
mod formats;
mod info;
mod map;
mod measure;
pub(crate) mod options;
mod resize;
mod shell;
mod vma;

/// True for a command that reads images and writes no file. The others enter the sandbox when they know what
/// they write.
fn only_reads(command: &Command) -> bool {
    match command {
        Command::Info(_)
        | Command::Map(_)
        | Command::Compare(_)
        | Command::Checksum(_)
        | Command::Measure(_) => true,
        Command::Check(args) => args.repair.is_none(),
        Command::Vma(args) => args.command.only_reads(),
        Command::Convert(_)
        | Command::Create(_)
        | Command::Resize(_)
        | Command::Formats(_)
        | Command::Completions(_)
        | Command::Man(_) => false,
    }
}

/// Returns the images that a command reads, as the user named them.
fn sources(command: &Command) -> Vec<&OsStr> {
    match command {
        Command::Convert(args) => args.paths.iter().map(|path| path.as_os_str()).collect(),
        Command::Info(args) => args.images.iter().map(|path| path.as_os_str()).collect(),
        Command::Checksum(args) => args.images.iter().map(|path| path.as_os_str()).collect(),
        Command::Map(args) => vec![args.image.as_os_str()],
        Command::Check(args) => {
            std::iter::once(&args.image).chain(&args.others).map(|path| path.as_os_str()).collect()
        }
        Command::Compare(args) => vec![args.first.as_os_str(), args.second.as_os_str()],
        Command::Measure(args) => args.image.iter().map(|path| path.as_os_str()).collect(),
        _ => Vec::new(),
    }
}

/// Returns the sockets that a command needs for its sources.
fn network(command: &Command) -> Network {
    let mut needed = Network::default();
    for name in sources(command) {
        if let Location::Url(url) = SourceRequest::parse(name).location {
            let is_local = url.scheme().to_ascii_lowercase().ends_with("+unix");
            needed.local |= is_local;
            needed.internet |= !is_local;
        }
    }
    if cfg!(feature = "net") { needed } else { Network::default() }
}

/// Runs a command.
pub fn run(command: Command) -> Result<Exit> {
    sandbox::permit(network(&command));
    if only_reads(&command) {
        sandbox::enter(Writes::nothing());
    }
    match command {
        Command::Convert(args) => convert::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Checksum(args) => checksum::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Vma(args) => vma::run(&args),
        Command::Formats(args) => formats::run(&args),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
    }
}
