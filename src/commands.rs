//! The verbs, one file each.

use imgtool_toolkit::Result;

use crate::args::Verb;
use crate::exit::Exit;

mod convert;
mod formats;
mod info;

/// Does what was asked for.
///
/// # Errors
/// Whatever kept it from being done.
pub fn run(verb: Verb) -> Result<Exit> {
    match verb {
        Verb::Convert(args) => convert::run(&args),
        Verb::Info(args) => info::run(&args),
        Verb::Formats(args) => formats::run(&args),
    }
}
