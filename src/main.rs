//! imgtool: converts virtual-machine disk images and whole-VM archives, any to any, in one pass.
//!
//! This file maps results to exit codes; everything else is in the modules.

use std::process::ExitCode;

mod args;
mod commands;
mod drivers;
mod exit;
mod images;
mod interrupt;
mod progress;
mod report;

fn main() -> ExitCode {
    let cli = args::parse(std::env::args_os());
    match commands::run(cli.verb) {
        Ok(exit) => exit.into(),
        Err(error) => {
            report::error(&error);
            report::exit_of(&error).into()
        }
    }
}
