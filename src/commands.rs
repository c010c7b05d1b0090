//! The commands and their dispatch.

use imgtool_core::Result;

use crate::args::Command;
use crate::exit::Exit;

mod check;
mod checksum;
mod compare;
mod convert;
mod create;
mod formats;
mod info;
mod map;
mod measure;
mod options;
mod shell;
mod vma;

/// Runs a command.
pub fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Convert(args) => convert::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Checksum(args) => checksum::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Vma(args) => vma::run(&args),
        Command::Formats(args) => formats::run(&args),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
    }
}
