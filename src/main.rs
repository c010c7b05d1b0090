//! imgtool: converts VM disk images and whole-VM archives between formats, in one pass.
//!
//! This file maps results to exit codes; everything else is in the modules.

use std::process::ExitCode;

mod args;
mod commands;
mod compat;
mod exit;
mod image_name;
mod images;
mod interrupt;
#[cfg(feature = "net")]
mod network;
mod progress;
mod proxmox;
mod remedy;
mod report;
mod sandbox;
mod secrets;

fn main() -> ExitCode {
    interrupt::handle_harmless_signals();
    imgtool_storage::os::allow_most_open_files();
    let exit = args::parse(std::env::args_os()).map(|cli| {
        commands::run(cli.command).unwrap_or_else(|error| {
            report::error(&error);
            report::exit_of(&error)
        })
    });
    let exit = exit.unwrap_or_else(|exit| exit);
    interrupt::die_of_signal(exit);
    exit.into()
}
