//! `imgtool info`.
use imgtool_toolkit::Result;
use crate::args::InfoArgs;
use crate::exit::Exit;
/// Prints what images hold.
pub fn run(_args: &InfoArgs) -> Result<Exit> { Ok(Exit::Done) }
