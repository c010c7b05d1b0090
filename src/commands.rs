//! The verbs, one file each.

use imgtool_toolkit::Result;

use crate::args::Verb;
use crate::exit::Exit;

mod check;
mod checksum;
mod compare;
mod convert;
mod create;
mod extras;
mod formats;
mod info;
mod map;
mod measure;
mod options;
mod shell;
mod vma;

/// Does what was asked for.
///
/// # Errors
/// Whatever kept it from being done.
pub fn run(verb: Verb) -> Result<Exit> {
    match verb {
        Verb::Convert(args) => convert::run(&args),
        Verb::Info(args) => info::run(&args),
        Verb::Map(args) => map::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Checksum(args) => checksum::run(&args),
        Verb::Measure(args) => measure::run(&args),
        Verb::Create(args) => create::run(&args),
        Verb::Vma(args) => vma::run(&args),
        Verb::Formats(args) => formats::run(&args),
        Verb::Completions(args) => shell::completions(&args),
        Verb::Man(args) => shell::man(&args),
    }
}
