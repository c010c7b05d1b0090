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
mod observe;
mod progress;
mod report;

fn main() -> ExitCode {
    interrupt::file_size_limit_is_an_error();
    let done = args::parse(std::env::args_os()).map(|cli| {
        commands::run(cli.verb).unwrap_or_else(|error| {
            report::error(&error);
            report::exit_of(&error)
        })
    });
    done.unwrap_or_else(|exit| exit).into()
}
